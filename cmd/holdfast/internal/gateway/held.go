package gateway

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"holdfast/cmd/holdfast/internal/holds"
	"holdfast/queue"
	"holdfast/scan"
)

// lookAtHolds reads what people keep in the queues, if that has changed. While
// it cannot be read no mail is taken: it may be mail that must stay.
func (g *Gateway) lookAtHolds() {
	st, err := os.Stat(g.Holds.Path)
	if errors.Is(err, fs.ErrNotExist) {
		g.takeHolds(nil, time.Time{})
		return
	}
	if err == nil && st.ModTime().Equal(g.holdsAt) {
		return
	}
	var all []holds.Hold
	if err == nil {
		all, err = g.Holds.All()
	}
	if err != nil {
		g.setHoldsUnread(err)
		return
	}
	g.setHoldsUnread(nil)
	// A change within the clock's grain of the look is seen by the next one.
	at := st.ModTime()
	if g.Now().Sub(at) < time.Second {
		at = time.Time{}
	}
	g.takeHolds(all, at)
}

func (g *Gateway) setHoldsUnread(err error) {
	why := ""
	if err != nil {
		why = err.Error()
	}
	if why != g.holdsUnread {
		g.holdsUnread = why
		g.reportFlow(why)
	}
}

// takeHolds lets go of those that have ended.
func (g *Gateway) takeHolds(all []holds.Hold, at time.Time) {
	now := map[string]holds.Hold{}
	for _, h := range all {
		now[h.Key()] = h
	}
	for k, h := range g.holds {
		if _, ok := now[k]; !ok {
			g.backoff.forget(queue.ID{Queue: h.Queue, Dir: h.Dir, Name: h.ID})
			g.changes++
		}
	}
	g.holds, g.holdsAt = now, at
}

// heldByHand leaves a message where it is if a person keeps it there.
func (g *Gateway) heldByHand(c queue.Claim) bool {
	id := c.Entry().ID
	h, ok := g.holds[id.Key()]
	if !ok || !h.Means(c.Stats()) {
		return false
	}
	g.backoff.hold(id, g.Now().Add(forever), h.Text())
	g.Report(Event{Name: EventSkipped, ID: id, Fields: Fields{"why": h.Text()}})
	return true
}

// unchangeable has policy decide about a message that its queue cannot change
// without loss. It is never released as it is.
func (g *Gateway) unchangeable(ctx context.Context, m *message, err error) {
	wasKept := m.verdict.Disposition == scan.Quarantine
	m.verdict = scan.Unchangeable(g.Settings.Policy, m.verdict, err.Error())
	if wasKept || m.verdict.Disposition == scan.Hold {
		m.verdict.Disposition = scan.Hold // not even the quarantine can take it
		g.leave(m)
		return
	}
	c, err := m.queue.Lock(ctx, m.claim.Entry()) // the commit has let go of it
	if err == nil {
		was := m.claim.Identity()
		m.claim = c
		if _, err = c.Read(ctx); err == nil && c.Identity() != was {
			err = fmt.Errorf("%w: another message has its queue id", queue.ErrGone)
		}
	}
	if err != nil {
		g.cannot(m.id(), "commit", err)
		g.drop(m)
		return
	}
	g.commit(ctx, []*message{m})
}
