package gateway

import (
	"fmt"
	"testing"
	"time"

	"holdfast/queue"
)

// newBare is a gateway without queues, on a clock of its own, that keeps what
// it reports.
func newBare(t *testing.T) (g *Gateway, now *time.Time, said *[]Event) {
	t.Helper()
	now, said = new(time.Time), new([]Event)
	*now = time.Unix(1_800_000_000, 0)
	return New(Deps{Now: func() time.Time { return *now }, Report: func(e Event) { *said = append(*said, e) }}), now, said
}

// TestEachMessageThatCannotBeTakenGetsOneLine, however often it is tried: at
// once if waiting will not help, at the third try if it mostly does.
func TestEachMessageThatCannotBeTakenGetsOneLine(t *testing.T) {
	for _, c := range []struct {
		step string
		err  error
		at   int // the try with the line, 0 for none
		name string
	}{
		{"lock", queue.ErrBusy, 3, EventSkipped},
		{"lock", queue.ErrIncomplete, 3, EventSkipped},
		{"read", queue.ErrIncomplete, 3, EventSkipped},
		{"read", queue.ErrDamaged, 1, EventSkipped},
		{"lock", queue.ErrForeign, 1, EventSkipped},
		{"lock", queue.ErrGone, 0, ""},
		{"read", queue.ErrGone, 1, EventGone},
		{"render", queue.ErrGone, 1, EventGone},
	} {
		g, now, said := newBare(t)
		id := queue.ID{Queue: "mta", Dir: "/in", Name: "6ANC0000000790"}
		tries := 8
		if c.name != EventSkipped {
			tries = 1
		}
		var at []int
		for try := 1; try <= tries; try++ {
			before := len(*said)
			g.backoff.claim(id)
			g.cannot(id, c.step, fmt.Errorf("qf%s: %w", id.Name, c.err))
			for _, e := range (*said)[before:] {
				if !e.Quiet {
					at = append(at, try)
					if e.Name != c.name || e.ID != id || e.Err == nil {
						t.Errorf("%s, %v: %+v", c.step, c.err, e)
					}
				}
			}
			*now = now.Add(time.Hour)
		}
		if c.at == 0 && len(at) > 0 || c.at > 0 && (len(at) != 1 || at[0] != c.at) {
			t.Errorf("%s, %v: lines at tries %v, want one at %d", c.step, c.err, at, c.at)
		}
	}
}
