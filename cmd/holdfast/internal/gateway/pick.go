package gateway

import (
	"container/heap"
	"context"
	"sort"
	"time"

	"holdfast/queue"
)

// A picker chooses which mail is next in one queue: the oldest and the
// newest over all directories, and some of each directory in turn so that
// none starves. Listing runs beside the loop; until the first listing of a
// huge queue has ended, its pages serve in any order.
type picker struct {
	q       queue.Queue
	backoff *backoff
	oldest  int // how many of the oldest one listing keeps
	newest  int
	perDir  int // how many of each directory's own oldest it keeps

	found   chan<- listed // shared by all pickers of a loop
	running bool
	listed  bool      // a listing has ended
	due     time.Time // of the next listing
	seen    int       // changes of the loop when the last listing began
	next    selection
	turn    int // which directory goes first
	toNew   float64
}

// listed is what a listing found: a page of the first one, or all of it.
type listed struct {
	by   *picker
	sel  selection
	done bool
	res  queue.Listing
	err  error
	took time.Duration
}

// selection is what is left to take, each part in the order of taking.
type selection struct {
	any    []queue.Entry // pages of an unfinished first listing
	old    []queue.Entry
	recent []queue.Entry
	dirs   map[string][]queue.Entry
	order  []string
}

const pageSize = 256

func newPicker(q queue.Queue, b *backoff, found chan<- listed, batch, lanes int) *picker {
	n := max(4*batch*lanes, 500)
	return &picker{q: q, backoff: b, oldest: n, newest: n / 2, perDir: max(batch/4, 4), found: found}
}

// refresh starts a listing unless one is running.
func (p *picker) refresh(ctx context.Context) {
	if p.running {
		return
	}
	p.running = true
	first := !p.listed
	go func() {
		start := time.Now()
		c := newCollector(p.oldest, p.newest, p.perDir)
		var page []queue.Entry
		res, err := p.q.List(ctx, func(e queue.Entry) bool {
			if p.backoff.held(e.ID, start) {
				return ctx.Err() == nil
			}
			if first && len(page) < pageSize {
				if page = append(page, e); len(page) == pageSize {
					select {
					case p.found <- listed{by: p, sel: selection{any: page}}:
						page = nil
					default: // the loop still has work: this page is full
					}
				}
			}
			c.add(e)
			return ctx.Err() == nil
		})
		select {
		case p.found <- listed{by: p, sel: c.selection(), done: true, res: res, err: err, took: time.Since(start)}:
		case <-ctx.Done():
		}
	}()
}

// accept takes what a listing found into the selection.
func (p *picker) accept(l listed) {
	if !l.done {
		p.next.any = append(p.next.any, l.sel.any...)
		return
	}
	p.running, p.listed = false, true
	p.next = l.sel
}

// empty says that nothing is left to take until the next listing.
func (p *picker) empty() bool {
	return len(p.next.any) == 0 && len(p.next.old) == 0 && len(p.next.recent) == 0
}

// take returns the next entry that nobody holds back, or false. share is
// the part of all takes that goes to the newest, 0 to 1.
func (p *picker) take(now time.Time, share float64) (queue.Entry, bool) {
	for !p.empty() {
		e := p.one(share)
		if !p.backoff.held(e.ID, now) {
			return e, true
		}
	}
	return queue.Entry{}, false
}

// one takes in this rhythm: the newest by their share, each eighth of the
// others from a directory in turn, the rest from the oldest.
func (p *picker) one(share float64) queue.Entry {
	n := &p.next
	if len(n.any) > 0 {
		return pop(&n.any)
	}
	p.toNew += share
	if p.toNew >= 1 && len(n.recent) > 0 {
		p.toNew--
		return pop(&n.recent)
	}
	p.turn++ // counts only takes that are not for the newest, or the two rhythms could coincide for ever
	if p.turn%8 == 0 && len(n.order) > 1 {
		dir := n.order[(p.turn/8)%len(n.order)]
		if d := n.dirs[dir]; len(d) > 0 {
			e := pop(&d)
			n.dirs[dir] = d
			return e
		}
	}
	if len(n.old) > 0 {
		return pop(&n.old)
	}
	return pop(&n.recent)
}

func pop[T any](s *[]T) T {
	e := (*s)[0]
	*s = (*s)[1:]
	return e
}

// collector keeps the bounded selection of a stream of entries.
type collector struct {
	old, recent *bounded
	perDir      int
	dirs        map[string]*bounded
}

func newCollector(oldest, newest, perDir int) *collector {
	return &collector{
		old:    &bounded{max: oldest, less: older},
		recent: &bounded{max: newest, less: func(a, b queue.Entry) bool { return older(b, a) }},
		perDir: perDir, dirs: map[string]*bounded{},
	}
}

func older(a, b queue.Entry) bool {
	if !a.Arrived.Equal(b.Arrived) {
		return a.Arrived.Before(b.Arrived)
	}
	return a.ID.Name < b.ID.Name
}

func (c *collector) add(e queue.Entry) {
	c.old.add(e)
	c.recent.add(e)
	d := c.dirs[e.ID.Dir]
	if d == nil {
		d = &bounded{max: c.perDir, less: older}
		c.dirs[e.ID.Dir] = d
	}
	d.add(e)
}

func (c *collector) selection() selection {
	s := selection{old: c.old.sorted(), recent: c.recent.sorted(), dirs: map[string][]queue.Entry{}}
	for dir, d := range c.dirs {
		s.dirs[dir] = d.sorted()
		s.order = append(s.order, dir)
	}
	sort.Strings(s.order)
	return s
}

// bounded keeps the max first entries in the order of less; as a heap its
// top is the last of them, the first to go.
type bounded struct {
	max  int
	less func(a, b queue.Entry) bool
	e    []queue.Entry
}

func (b *bounded) Len() int           { return len(b.e) }
func (b *bounded) Less(i, j int) bool { return b.less(b.e[j], b.e[i]) }
func (b *bounded) Swap(i, j int)      { b.e[i], b.e[j] = b.e[j], b.e[i] }
func (b *bounded) Push(x any)         { b.e = append(b.e, x.(queue.Entry)) }
func (b *bounded) Pop() any {
	last := b.e[len(b.e)-1]
	b.e = b.e[:len(b.e)-1]
	return last
}

func (b *bounded) add(e queue.Entry) {
	switch {
	case len(b.e) < b.max:
		heap.Push(b, e)
	case b.less(e, b.e[0]):
		b.e[0] = e
		heap.Fix(b, 0)
	}
}

func (b *bounded) sorted() []queue.Entry {
	sort.Slice(b.e, func(i, j int) bool { return b.less(b.e[i], b.e[j]) })
	return b.e
}
