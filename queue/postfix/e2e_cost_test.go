//go:build e2e

package postfix

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"holdfast/queue"
)

// BenchmarkRoutes prints what a message costs on each way out of hold, in
// batches of 30, beside a bare rename of the same files, all in one run:
//
//	go test -tags e2e -run '^$' -bench Routes -benchtime 1x ./queue/postfix
func BenchmarkRoutes(b *testing.B) {
	const each, batch = 300, 30
	m := newMTA(b, mtaOptions{})
	edit := func() *queue.Edit {
		return &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "X-Changed", Value: "yes"}}}
	}
	release := func() queue.Group { return queue.Group{Disposition: queue.Release} }
	changed := func() queue.Group { return queue.Group{Disposition: queue.Release, Edit: edit()} }
	kept := func() queue.Group { return queue.Group{Disposition: queue.Quarantine, Item: []byte(`{}`)} }
	for range b.N {
		m.fill(b, each)
		bare := m.bareRename(b)
		b.Logf("%-28s %8.3f ms a message  %6.1f", "bare rename, no fsync", bare, 1.0)
		for _, way := range []struct {
			name   string
			how    Release
			modify Modify
			group  func() queue.Group
		}{
			{"released by rename", ByRename, ByReinjection, release},
			{"released by postsuper", ByPostsuper, ByReinjection, release},
			{"rewritten", ByRename, ByRewriting, changed},
			{"re-injected", ByRename, ByReinjection, changed},
			{"quarantined", ByRename, ByReinjection, kept},
		} {
			m.fill(b, each)
			q := open(b, m.config(way.how, way.modify))
			var all []queue.Claim
			for _, c := range claims(b, q) {
				all = append(all, c)
			}
			start := time.Now()
			for part := range slices.Chunk(all, batch) {
				var plans []queue.Plan
				for _, c := range part {
					plans = append(plans, queue.Plan{Claim: c, Groups: []queue.Group{way.group()}})
				}
				m.commit(q, plans...)
			}
			ms := float64(time.Since(start).Microseconds()) / 1000 / float64(len(all))
			b.Logf("%-28s %8.3f ms a message  %6.1f", way.name, ms, ms/bare)
			m.settle()
		}
	}
}

// fill puts messages on hold.
func (m *mta) fill(b *testing.B, n int) {
	b.Helper()
	for i := range n {
		m.send(mail{from: "a@example.com", rcpts: []string{"<b@example.net>"}, text: lettered(fmt.Sprintf("cost-%d", i), "", "hello\n")})
	}
}

// bareRename moves all that is on hold away and back, and to incoming at last;
// it returns milliseconds a rename.
func (m *mta) bareRename(b *testing.B) float64 {
	b.Helper()
	ids := m.held()
	from, to := filepath.Join(m.spool, "hold"), filepath.Join(m.spool, "incoming")
	start := time.Now()
	for _, id := range ids {
		if err := os.Rename(filepath.Join(from, id), filepath.Join(to, id)); err != nil {
			b.Fatal(err)
		}
	}
	ms := float64(time.Since(start).Microseconds()) / 1000 / float64(len(ids))
	m.run("postkick", "public", "qmgr", "I")
	m.settle()
	return ms
}
