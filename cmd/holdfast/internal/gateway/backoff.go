package gateway

import (
	"sync"
	"time"

	"holdfast/queue"
)

// backoff knows which messages are not to be claimed now, and why: they are
// in flight, were busy or unfinished, or a commit failed. It lives in memory
// only; a restart asks each message again. Listings read it beside the loop.
type backoff struct {
	mu   sync.Mutex
	rows map[string]waiting
	max  int
}

// waiting is one message that is left alone for a while.
type waiting struct {
	ID    queue.ID
	Until time.Time // zero: until forget
	Tries int
	Why   string
}

// Delays of a message that could not be handled: doubling from the first to
// the last, so that a message in trouble costs little and is never given up.
const (
	firstDelay = 5 * time.Second
	lastDelay  = 10 * time.Minute
)

func newBackoff(max int) *backoff { return &backoff{rows: map[string]waiting{}, max: max} }

// claim keeps id out of listings until forget.
func (b *backoff) claim(id queue.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.rows[id.Key()]
	w.ID, w.Until = id, time.Time{}
	b.rows[id.Key()] = w
}

// delay leaves id alone for a while that grows with each try.
func (b *backoff) delay(id queue.ID, now time.Time, why string) waiting {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.rows[id.Key()]
	w.ID, w.Why = id, why
	d := firstDelay << min(w.Tries, 10)
	w.Tries++
	w.Until = now.Add(min(d, lastDelay))
	b.rows[id.Key()] = w
	if len(b.rows) > b.max {
		b.prune(now)
	}
	return w
}

// last is the reason of the last delay.
func (b *backoff) last(id queue.ID) (why string, known bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	w, ok := b.rows[id.Key()]
	return w.Why, ok && w.Tries > 0
}

// hold leaves id alone until the given time.
func (b *backoff) hold(id queue.ID, until time.Time, why string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rows[id.Key()] = waiting{ID: id, Until: until, Why: why}
}

// prune drops rows whose time has come: they would be tried again anyway.
func (b *backoff) prune(now time.Time) {
	for k, w := range b.rows {
		if !w.Until.IsZero() && now.After(w.Until) {
			delete(b.rows, k)
		}
	}
}

func (b *backoff) forget(id queue.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.rows, id.Key())
}

// held says that id is not to be claimed at the time now.
func (b *backoff) held(id queue.ID, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	w, ok := b.rows[id.Key()]
	return ok && (w.Until.IsZero() || now.Before(w.Until))
}

// waiting lists what is left alone for now, in flight not included.
func (b *backoff) waiting(now time.Time) []waiting {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []waiting
	for _, w := range b.rows {
		if !w.Until.IsZero() && now.Before(w.Until) {
			out = append(out, w)
		}
	}
	return out
}
