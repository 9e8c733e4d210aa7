package gateway

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"holdfast/queue"
)

// fakeList is a queue that can only be listed.
type fakeList struct {
	queue.Queue
	entries []queue.Entry
	err     error
}

func (f *fakeList) List(_ context.Context, yield func(queue.Entry) bool) (queue.Listing, error) {
	for i, e := range f.entries {
		if !yield(e) {
			return queue.Listing{Messages: i}, nil
		}
	}
	return queue.Listing{Messages: len(f.entries)}, f.err
}

var epoch = time.Unix(1_700_000_000, 0)

func entry(dir string, age int) queue.Entry {
	return queue.Entry{
		ID:      queue.ID{Queue: "q", Dir: dir, Name: fmt.Sprintf("%s%06d", dir[1:], age)},
		Arrived: epoch.Add(-time.Duration(age) * time.Second),
	}
}

// list runs one listing to its end, its early pages included.
func list(t *testing.T, p *picker, found <-chan listed) (pages int) {
	t.Helper()
	p.refresh(t.Context())
	for p.running {
		l := <-found
		if !l.done {
			pages++
		}
		p.accept(l)
	}
	return pages
}

func testPicker(q queue.Queue, b *backoff) (*picker, <-chan listed) {
	found := make(chan listed, 1)
	return newPicker(q, b, found, 30, 2), found
}

func takeAll(p *picker, share float64, n int) []queue.Entry {
	var out []queue.Entry
	for len(out) < n {
		e, ok := p.take(epoch, share)
		if !ok {
			break
		}
		p.backoff.claim(e.ID)
		out = append(out, e)
	}
	return out
}

func TestABacklogDoesNotHoldUpNewMail(t *testing.T) {
	f := &fakeList{}
	for age := 50_000; age > 0; age-- {
		f.entries = append(f.entries, entry("/a", 1000+age))
	}
	f.entries = append(f.entries, entry("/a", 0))
	p, found := testPicker(f, newBackoff(1000))
	list(t, p, found)
	took := takeAll(p, 0.25, 30)
	var newest, oldest bool
	for _, e := range took {
		newest = newest || e.Arrived.Equal(epoch)
		oldest = oldest || e.Arrived.Equal(epoch.Add(-51_000*time.Second))
	}
	if !newest || !oldest {
		t.Fatalf("newest taken %v, oldest taken %v in the first 30 of 50,001", newest, oldest)
	}
}

func TestNoDirectoryStarves(t *testing.T) {
	f := &fakeList{}
	// One directory holds all the oldest and all the newest mail, four others mail of middle age.
	for i := range 20_000 {
		f.entries = append(f.entries, entry("/a", i), entry("/a", 100_000+i))
	}
	for _, dir := range []string{"/b", "/c", "/d", "/e"} {
		for i := range 50 {
			f.entries = append(f.entries, entry(dir, 50_000+i))
		}
	}
	p, found := testPicker(f, newBackoff(100_000))
	list(t, p, found)
	seen := map[string]int{}
	for _, e := range takeAll(p, 0.25, 120) {
		seen[e.ID.Dir]++
	}
	for _, dir := range []string{"/a", "/b", "/c", "/d", "/e"} {
		if seen[dir] == 0 {
			t.Errorf("nothing of %s in the first 120: %v", dir, seen)
		}
	}
}

func TestEachEntryIsTakenOnce(t *testing.T) {
	f := &fakeList{}
	for i := range 1000 {
		f.entries = append(f.entries, entry([]string{"/a", "/b", "/c"}[i%3], i))
	}
	p, found := testPicker(f, newBackoff(10_000))
	seen := map[string]bool{}
	for range 20 {
		pages := list(t, p, found)
		_ = pages
		for _, e := range takeAll(p, 0.25, 10_000) {
			if seen[e.ID.Key()] {
				t.Fatalf("%s taken twice", e.ID)
			}
			seen[e.ID.Key()] = true
		}
	}
	if len(seen) != 1000 {
		t.Fatalf("%d of 1000 taken", len(seen))
	}
}

func TestTheFirstPageOfAHugeQueueIsServedBeforeTheListingEnds(t *testing.T) {
	gate := make(chan struct{})
	f := &gatedList{gate: gate}
	p, found := testPicker(f, newBackoff(10_000))
	p.refresh(t.Context())
	p.accept(<-found) // comes while the listing waits at the gate
	if e, ok := p.take(epoch, 0.25); !ok || e.ID.Name == "" {
		t.Fatal("nothing to take although a page was listed")
	}
	close(gate)
	p.accept(<-found)
	if p.running {
		t.Fatal("listing did not end")
	}
}

type gatedList struct {
	queue.Queue
	gate chan struct{}
}

func (g *gatedList) List(_ context.Context, yield func(queue.Entry) bool) (queue.Listing, error) {
	for i := range pageSize + 1 {
		yield(entry("/a", i))
	}
	<-g.gate
	return queue.Listing{}, nil
}

func TestMessagesWithANotBeforeTimeAreLeftOut(t *testing.T) {
	f := &fakeList{entries: []queue.Entry{entry("/a", 1), entry("/a", 2)}}
	b := newBackoff(10)
	b.delay(f.entries[0].ID, epoch, "busy")
	p, found := testPicker(f, b)
	list(t, p, found)
	p.next.old = append([]queue.Entry{f.entries[0]}, p.next.old...) // held since it was listed
	got := takeAll(p, 0, 10)
	if len(got) != 1 || got[0].ID != f.entries[1].ID {
		t.Fatalf("took %v", got)
	}
	if w := b.waiting(epoch); len(w) != 1 || w[0].Why != "busy" {
		t.Fatalf("waiting: %v", w)
	}
	if b.held(f.entries[0].ID, epoch.Add(firstDelay)) {
		t.Fatal("still held after its time")
	}
}

func TestDelaysGrowToABound(t *testing.T) {
	b := newBackoff(10)
	id := entry("/a", 1).ID
	var last time.Duration
	for range 50 {
		w := b.delay(id, epoch, "busy")
		d := w.Until.Sub(epoch)
		if d < last || d > lastDelay {
			t.Fatalf("delay %v after %v", d, last)
		}
		last = d
	}
	if last != lastDelay {
		t.Fatalf("ends at %v", last)
	}
}

func TestAListingErrorReachesTheLoop(t *testing.T) {
	p, found := testPicker(&fakeList{err: errors.New("input/output error")}, newBackoff(10))
	p.refresh(t.Context())
	if l := <-found; l.err == nil {
		t.Fatal("lost")
	}
}
