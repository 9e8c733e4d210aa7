package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"holdfast/cmd/holdfast/internal/courier"
	"holdfast/queue"
	"holdfast/queue/outbox"
	"holdfast/queue/quarantine"
	"holdfast/scan"
)

// pend puts the side effects of decisions into the outbox, before them.
func (g *Gateway) pend(ctx context.Context, ms []*message) error {
	if g.Outbox == nil {
		return nil
	}
	var all []outbox.Effect
	for _, m := range ms {
		if m.verdict.Disposition != scan.Quarantine || g.Settings.Monitor {
			continue
		}
		text, err := json.Marshal(notice(m))
		if err != nil {
			return fmt.Errorf("describe %s: %w", m.id(), err)
		}
		all = append(all, outbox.Effect{
			Kind: courier.Notify, Identity: m.claim.Identity(), Outcome: string(m.verdict.Disposition), When: g.Now(), Data: text,
		})
	}
	return g.Outbox.Pend(ctx, all)
}

func notice(m *message) courier.Notice {
	n := courier.Notice{
		Queue: m.id().Queue, QueueID: m.id().Name, Item: quarantine.Name(m.claim.Identity(), 0),
		From: m.env.Sender, Verdict: string(m.verdict.Disposition), Recipients: []string{}, Reasons: []string{},
	}
	for i := range min(len(m.env.Recipients), courier.MaxRecipients) {
		n.Recipients = append(n.Recipients, m.env.Recipients[i].Address)
	}
	for _, r := range m.verdict.Reasons {
		n.Reasons = append(n.Reasons, r.Rule+": "+r.Text)
	}
	if m.report != nil {
		n.MessageID = m.report.MessageID
	}
	return n
}

// effects lets go of the side effects of what is settled, and takes back
// those of what will be judged again. A commit may also fail after its
// decision: then they stay pending for the life that finishes it.
func (g *Gateway) effects(ctx context.Context, ms []*message, outs []queue.Outcome) {
	if g.Outbox == nil {
		return
	}
	var errs []error
	for i, m := range ms {
		id := m.claim.Identity()
		if outs[i].Err == nil {
			errs = append(errs, g.Outbox.Ready(ctx, id))
			continue
		}
		there, err := g.isThere(ctx, m.queue, id)
		if errors.Is(outs[i].Err, queue.ErrGone) || err == nil && there == queued {
			err = g.Outbox.Cancel(ctx, id)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		g.Report(problem("notices not handled", err)) // what stays pending is settled at the next start
	}
	g.Deliver()
}

// recoverEffects settles what was pending when an earlier life ended: the
// message is gone, so its decision was carried out; or it is still there,
// and will be judged again, or resumed by its marker.
func (g *Gateway) recoverEffects(ctx context.Context) error {
	if g.Outbox == nil {
		return nil
	}
	all, err := g.Outbox.Pending(ctx, func(err error) { g.Report(problem("notices not handled", err)) })
	if err != nil {
		return err
	}
	for _, e := range all {
		q := g.queueOf(e.Identity.ID)
		if q == nil {
			continue
		}
		switch there, err := g.isThere(ctx, q, e.Identity); {
		case err != nil:
			g.Report(problem("notices not handled", fmt.Errorf("cannot tell what became of %s: %w", e.Identity.ID, err)))
		case there == decidedThere:
		case there == queued:
			err = g.Outbox.Cancel(ctx, e.Identity)
			if err != nil {
				return err
			}
		default:
			if err := g.Outbox.Ready(ctx, e.Identity); err != nil {
				return err
			}
			g.Report(Event{Name: EventSwept, ID: e.Identity.ID, Fields: Fields{"note": "its notice was waiting for a crash's end"}})
		}
	}
	return nil
}

type whereabouts int

const (
	away whereabouts = iota
	queued
	decidedThere
)

// isThere says whether a message is still in its queue.
func (g *Gateway) isThere(ctx context.Context, q queue.Queue, id queue.Identity) (whereabouts, error) {
	c, err := q.Lock(ctx, queue.Entry{ID: id.ID})
	if errors.Is(err, queue.ErrGone) {
		return away, nil
	}
	if err != nil {
		return away, err
	}
	defer c.Close()
	if _, err := c.Read(ctx); err != nil {
		return away, err
	}
	switch {
	case c.Decided():
		return decidedThere, nil
	case c.Identity() == id:
		return queued, nil
	}
	return away, nil
}
