//go:build faults

package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"holdfast/queue"
)

// faultAt panics, or never returns, if the message asks for it: a planted
// defect of the supervisor, for tests of what happens when Holdfast itself dies
// or its loop is wedged while the process lives.
func faultAt(step string, m *message) {
	header, _, _ := bytes.Cut(m.sniff(64<<10), []byte("\n\n"))
	switch {
	case bytes.Contains(header, []byte("X-Holdfast-Fault: panic@"+step)):
		panic(fmt.Sprintf("planted fault at %s on %s", step, m.id()))
	case bytes.Contains(header, []byte("X-Holdfast-Fault: hang@"+step)):
		select {}
	}
}

// faultPlan changes or splits a message that asks for it: until policy does
// that, it is how tests of the whole program reach these routes.
func faultPlan(m *message, groups []queue.Group) []queue.Group {
	header, _, _ := bytes.Cut(m.sniff(64<<10), []byte("\n\n"))
	edit := &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "X-Changed", Value: "yes"}}}
	n := len(m.env.Recipients)
	switch {
	case bytes.Contains(header, []byte("X-Holdfast-Fault: edit@plan")):
		groups[0].Edit = edit
	case bytes.Contains(header, []byte("X-Holdfast-Fault: split@plan")) && n > 2:
		last := queue.Group{Recipients: []int{n - 1}, Disposition: queue.Quarantine, Item: []byte("{}")}
		groups = []queue.Group{{Recipients: []int{0}, Disposition: queue.Release, Edit: edit}, {Disposition: queue.Release}, last}
		for i := 1; i < n-1; i++ {
			groups[1].Recipients = append(groups[1].Recipients, i)
		}
	}
	return groups
}

// sniff returns the first bytes of the rendered message.
func (m *message) sniff(n int64) []byte {
	if m.render == nil {
		return nil
	}
	b := make([]byte, min(n, m.size))
	k, err := m.render.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	return b[:k]
}
