package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/poison"
	"holdfast/poison/ledger"
	"holdfast/queue"
	"holdfast/scan"
)

// heldWhy says for people why policy holds a message.
func heldWhy(v scan.Verdict) string {
	var parts []string
	for _, r := range v.Reasons {
		text := r.Text
		if rule, _, ok := strings.Cut(r.Source, ","); ok {
			text += " (" + rule + ")"
		}
		parts = append(parts, text)
	}
	return "held: " + strings.Join(parts, "; ")
}

type settleRequest struct {
	control.Order
	answer chan error
}

// Settle asks the loop to release or quarantine a message that is held.
func (g *Gateway) Settle(ctx context.Context, o control.Order) error {
	r := settleRequest{o, make(chan error, 1)}
	select {
	case g.settles <- r:
	case <-ctx.Done():
		return fmt.Errorf("the loop does not answer: %w", ctx.Err())
	}
	return <-r.answer
}

// SettleAlone does it for a gateway whose loop does not run.
func (g *Gateway) SettleAlone(ctx context.Context, o control.Order) error {
	return errors.Join(g.settle(ctx, o), g.finish(ctx))
}

// settle carries out a person's decision about a held message, in the same
// order as one of policy: lock, ledger, read, commit, history.
func (g *Gateway) settle(ctx context.Context, o control.Order) error {
	held, err := g.heldBy(o)
	if err != nil {
		return err
	}
	m, err := g.claimHeld(ctx, held.ID)
	if err != nil {
		return err
	}
	m.verdict = scan.Verdict{Disposition: scan.Disposition(o.Do), Reasons: []scan.Reason{
		{Rule: "by hand", Text: "a person decided; before that, " + held.Why, Source: o.By},
	}}
	before := g.doneCount()
	g.commit(ctx, []*message{m})
	if why, _ := g.backoff.last(held.ID); g.backoff.held(held.ID, g.Now()) {
		return fmt.Errorf("it stays in the queue: %s", why)
	}
	if g.doneCount() == before {
		return fmt.Errorf("%s: %w", held.ID, queue.ErrGone)
	}
	if err := g.Ledger.Return(held.ID.Key()); err != nil {
		g.Report(problem("ledger", err)) // the row means a message that is gone
	}
	return nil
}

// heldBy finds the one held message that an order means.
func (g *Gateway) heldBy(o control.Order) (waiting, error) {
	now := g.Now()
	var found []waiting
	for _, w := range g.backoff.waiting(now) {
		if w.ID.Name == o.ID && (o.Queue == "" || w.ID.Queue == o.Queue) && w.Until.Sub(now) > forever/2 {
			found = append(found, w)
		}
	}
	switch len(found) {
	case 0:
		return waiting{}, control.ErrNotHeld
	case 1:
		return found[0], nil
	}
	return waiting{}, fmt.Errorf("%d messages have the id %s: name one as queue:id", len(found), o.ID)
}

// claimHeld locks, records and reads a message that stays held if that fails.
func (g *Gateway) claimHeld(ctx context.Context, id queue.ID) (*message, error) {
	q := g.queueOf(id)
	if q == nil {
		return nil, fmt.Errorf("no queue is named %s", id.Queue)
	}
	c, err := q.Lock(ctx, queue.Entry{ID: id})
	if err != nil {
		return nil, err
	}
	if g.lookAtHolds(); g.heldByHand(c) {
		c.Close()
		return nil, fmt.Errorf("%s: a person keeps it there, and holdfast queue retry ends that", id)
	}
	st := c.Stats()
	m := &message{key: poison.Key(id.Key()), queue: q, claim: c, began: g.Now(), size: st.Control.Size + st.Data.Size}
	stat, err := json.Marshal(st)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("encode lstat values of %s: %w", id, err)
	}
	found, err := g.Ledger.Begin(ctx, []ledger.Row{{Key: string(m.key), Stat: stat, Began: m.began}}, g.finished)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("record the claim of %s in the ledger: %w", id, err)
	}
	g.finished = nil
	if _, skip := g.origin(m, found); skip != "" {
		m.foreign = true
		g.drop(m)
		return nil, fmt.Errorf("%s: %s", id, skip)
	}
	g.stamp("read", m)
	m.env, err = c.Read(ctx)
	g.unstamp()
	if err == nil && c.Decided() {
		err = fmt.Errorf("%s: a crash cut its release short, and holdfast queue retry finishes that", id)
	}
	if err != nil {
		g.drop(m)
		return nil, err
	}
	return m, nil
}
