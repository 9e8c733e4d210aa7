//go:build faults

package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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
