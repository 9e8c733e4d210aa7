package gateway

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/poison"
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
		{"commit", queue.ErrCollision, 1, EventCommitFailed},
	} {
		g, now, said := newBare(t)
		id := queue.ID{Queue: "mta", Dir: "/in", Name: "6ANC0000000790"}
		tries := 8
		if errors.Is(c.err, queue.ErrGone) {
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

// TestThatMailIsNotTakenIsSaidInWords: why, with the limit that was reached,
// and again when it is over.
func TestThatMailIsNotTakenIsSaidInWords(t *testing.T) {
	g, _, said := newBare(t)
	dir := t.TempDir()
	g.Settings.FreeDirs, g.Settings.MinFree, g.Settings.PauseFile = []string{dir}, 1<<62, dir+"/paused"
	g.lookAtSpace()
	g.lookAtSpace()
	g.Settings.MinFree = 0
	g.lookAtSpace()
	for _, pause := range []func() error{
		func() error { return os.WriteFile(dir+"/paused", nil, 0o600) },
		func() error { return os.Remove(dir + "/paused") },
	} {
		if err := pause(); err != nil {
			t.Fatal(err)
		}
		g.lookAtPause()
	}
	g.setBreaker(poison.Breaker{Open: true, Why: "a known good message cannot be scanned"})
	g.setBreaker(poison.Breaker{})
	var got []string
	for _, e := range *said {
		got = append(got, fmt.Sprintf("%s %v", e.Name, e.Fields["why"]))
	}
	want := regexp.MustCompile(`^mail is no longer taken ` + regexp.QuoteMeta(dir) + ` has \d+(\.\d)? [MG]B free, less than min_free \(4611686018\.4 GB\)
mail is taken again <nil>
paused <nil>
resumed <nil>
mail is no longer taken a known good message cannot be scanned
mail is taken again <nil>$`)
	if text := strings.Join(got, "\n"); !want.MatchString(text) {
		t.Errorf("%s", text)
	}
	if a, b := amount(123_400_000), amount(2_500_000_000); a != "123 MB" || b != "2.5 GB" {
		t.Errorf("%s, %s", a, b)
	}
	if s := counted(map[string]int{"b": 1, "a": 2, "c": 0}); s != "1 b, 2 a" {
		t.Errorf("%q", s)
	}
}
