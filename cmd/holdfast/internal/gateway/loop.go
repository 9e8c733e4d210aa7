package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"holdfast/poison"
	"holdfast/poison/ledger"
	"holdfast/queue"
	"holdfast/scan"
)

// Run is the loop: it ends when ctx does, after putting back or finishing
// what is in flight, or, draining, when nothing can be claimed.
//
// Everything but listing directories and running workers happens in this one
// goroutine, in this order.
func (g *Gateway) Run(ctx context.Context) (Summary, error) {
	start := g.Now()
	listing, stopListing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopListing()
	for {
		g.Beat()
		g.look(ctx)
		if err := g.claim(ctx, listing); err != nil {
			g.unstamp()
			return g.summary(start), err
		}
		g.start(ctx)
		if g.over(ctx) {
			break
		}
		g.wait(ctx)
	}
	err := g.finish(ctx)
	g.unstamp() // an orderly end is nobody's death
	sum := g.summary(start)
	if g.Settings.Drain {
		g.remains(context.WithoutCancel(ctx), &sum)
	}
	return sum, err
}

// look reads what may stop claiming: the pause file, the disks, the clock.
func (g *Gateway) look(ctx context.Context) {
	g.lookAtPause()
	g.lookAtHolds()
	g.lookAtSpace()
	if ctx.Err() != nil && !g.stopping {
		g.stopping = true
		name := EventStopping
		if errors.Is(context.Cause(ctx), ErrReload) {
			name = EventReloading
		}
		g.Report(Event{Name: name, Fields: Fields{"in_flight": len(g.messages)}})
	}
	now := g.Now()
	for i := 0; i < len(g.waits); i++ {
		if w := g.waits[i]; !now.Before(w.at) {
			g.waits = append(g.waits[:i], g.waits[i+1:]...)
			g.act(g.machine.Step(poison.Waited{ID: w.id}))
			i = -1 // the step may have changed the list
		}
	}
}

// claim fills the lanes: lock, record durably, only then read.
func (g *Gateway) claim(ctx, listing context.Context) error {
	for !g.stopping && !g.paused && g.breaker == "" && g.lowSpace == "" && g.holdsUnread == "" && g.hungry() {
		batch := g.lock(ctx, listing)
		if len(batch) == 0 {
			return nil
		}
		groups, err := g.begin(ctx, batch)
		if err != nil {
			return err // nothing was read, nothing touched: the keeper starts us again
		}
		for _, ev := range groups {
			g.act(g.machine.Step(ev))
		}
	}
	return nil
}

// hungry says that a lane would be idle soon.
func (g *Gateway) hungry() bool {
	return len(g.pending)+len(g.isolate) < g.Settings.Workers && !g.exclusive() && g.solo == ""
}

// lock takes the MTA's lock on the messages of one batch. Nothing is read.
func (g *Gateway) lock(ctx, listing context.Context) []*message {
	s := g.Settings
	var batch []*message
	var bytes int64
	for range g.pickers {
		p := g.pickers[g.turn%len(g.pickers)]
		g.turn++
		for len(batch) < s.BatchMessages && bytes < s.BatchBytes {
			e, ok := p.take(g.Now(), s.NewestShare)
			if !ok {
				break
			}
			c, err := p.q.Lock(ctx, e)
			if err != nil {
				g.cannot(e.ID, "lock", err)
				continue
			}
			if g.heldByHand(c) {
				c.Close()
				continue
			}
			m := &message{key: poison.Key(e.ID.Key()), queue: p.q, claim: c, began: g.Now()}
			st := c.Stats()
			m.size = st.Control.Size + st.Data.Size
			if bytes += m.size; len(batch) > 0 && bytes > s.BatchBytes {
				c.Close() // first of the next batch
				p.next.any = append([]queue.Entry{e}, p.next.any...)
				break
			}
			g.backoff.claim(e.ID)
			batch = append(batch, m)
		}
		if p.empty() && !p.running && g.listDue(p) {
			p.seen = g.changes
			p.refresh(listing)
		}
		if len(batch) > 0 {
			break // one queue per batch: a commit is shared within a queue
		}
	}
	return batch
}

// begin makes the claims durable in one transaction, then reads envelopes
// and renders each message once. It returns the arrivals for the machine.
func (g *Gateway) begin(ctx context.Context, batch []*message) ([]poison.Event, error) {
	rows := make([]ledger.Row, len(batch))
	for i, m := range batch {
		stat, err := json.Marshal(m.claim.Stats())
		if err != nil {
			return nil, fmt.Errorf("encode lstat values of %s: %w", m.id(), err)
		}
		rows[i] = ledger.Row{Key: string(m.key), Stat: stat, Began: m.began}
	}
	found, err := g.Ledger.Begin(ctx, rows, g.finished)
	if err != nil {
		for _, m := range batch {
			m.claim.Close()
			g.backoff.forget(m.id())
		}
		return nil, fmt.Errorf("record %d claims in the ledger: %w", len(batch), err)
	}
	g.finished = nil
	arrived := map[poison.Origin][]poison.Key{}
	for _, m := range batch {
		from, skip := g.origin(m, found)
		if skip != "" {
			g.putBack(m, skip)
			continue
		}
		if !g.read(ctx, m) {
			continue
		}
		g.messages[m.key] = m
		if m.size > g.Settings.Policy.MaxMessage {
			m.verdict = scan.TooLarge(g.Settings.Policy, m.size)
			g.commit(ctx, []*message{m})
			continue
		}
		arrived[from] = append(arrived[from], m.key)
	}
	var events []poison.Event
	for _, from := range []poison.Origin{poison.SupervisorDied, poison.AloneFirst, poison.DeadHere, poison.Fresh} {
		if keys := arrived[from]; len(keys) > 0 {
			events = append(events, poison.Arrived{Keys: keys, From: from})
		}
	}
	return events, nil
}

// read reads the envelope and renders the message; a decided one is resumed
// instead. It reports whether there is something for a worker.
func (g *Gateway) read(ctx context.Context, m *message) bool {
	ok := g.readStamped(ctx, m)
	g.unstamp() // never deferred: a panic must leave the stamp
	return ok
}

func (g *Gateway) readStamped(ctx context.Context, m *message) bool {
	g.stamp("read", m)
	env, err := m.claim.Read(ctx)
	if err != nil {
		g.cannot(m.id(), "read", err)
		g.drop(m)
		return false
	}
	m.env = env
	if m.claim.Decided() {
		g.stamp("resume", m)
		ctx := context.WithoutCancel(ctx) // decided: to be finished, not stopped
		out := m.queue.Resume(ctx, m.claim)
		g.effects(ctx, []*message{m}, []queue.Outcome{out})
		g.settled(ctx, m, out, noteFinished)
		return false
	}
	g.stamp("render", m)
	start := g.Now()
	if m.render, err = m.claim.Render(ctx); err == nil {
		m.size, err = sizeOf(m.render)
	}
	m.took("render", g.Now().Sub(start))
	if err != nil {
		g.cannot(m.id(), "render", err)
		g.drop(m)
		return false
	}
	return true
}

// start puts runs on free lanes: suspects on their own lane, so that they
// never wait for the main one nor it for them.
func (g *Gateway) start(ctx context.Context) {
	for _, c := range g.canaries {
		g.startCanary(ctx, c)
	}
	g.canaries = nil
	main, alone := 0, 0
	for _, r := range g.running {
		if r.Lane == poison.Isolation {
			alone++
		} else {
			main++
		}
	}
	for len(g.isolate) > 0 && alone < 1 && (!g.isolate[0].Exclusive || len(g.running) == 0) {
		g.startRun(ctx, pop(&g.isolate))
		alone++
	}
	for len(g.pending) > 0 && main < g.Settings.Workers && !g.exclusive() {
		g.startRun(ctx, pop(&g.pending))
		main++
	}
}

// over says that the loop may end.
func (g *Gateway) over(ctx context.Context) bool {
	if ctx.Err() != nil {
		return true // finish waits for what runs
	}
	if !g.Settings.Drain || len(g.messages) > 0 || len(g.running) > 0 {
		return false
	}
	if g.paused || g.breaker != "" || g.lowSpace != "" || g.holdsUnread != "" {
		return true // nothing is claimable, and waiting is not draining
	}
	for _, p := range g.pickers {
		if p.running || !g.settledSince(p) {
			return false
		}
	}
	return true
}

// ended takes the result of a run: passes are decided and committed at once,
// what the end means for the others is the machine's business.
func (g *Gateway) ended(ctx context.Context, rr runResult) {
	r := g.running[rr.id]
	delete(g.running, rr.id)
	if r.canary != nil {
		g.act(g.machine.Step(poison.CanaryEnded{
			Run: rr.id, Passed: rr.res.Death == nil, Death: rr.res.Death, Version: g.Runner.Version(),
		}))
		return
	}
	ev := poison.Ended{Run: rr.id, Death: rr.res.Death}
	var passed []*message
	for i, k := range r.Keys {
		m := g.messages[k]
		if report := rr.res.Reports[i]; report != nil {
			m.report, m.stages = report, append(m.stages, rr.res.Stages[i]...)
			ev.Passed = append(ev.Passed, k)
			passed = append(passed, m)
		}
		if i == rr.res.Stamped && rr.res.Death != nil {
			ev.Stamp = k
			m.stderr, m.crash = rr.res.Stderr, rr.res.Crash
		}
	}
	if rr.res.Death != nil {
		g.reportDeath(r, ev)
	}
	actions := g.machine.Step(ev)
	g.decide(ctx, passed)
	g.act(actions)
}

// decide judges messages that passed their workers and commits the plans.
func (g *Gateway) decide(ctx context.Context, passed []*message) {
	for _, m := range passed {
		g.stamp("decide", m)
		faultAt("decide", m)
		m.verdict = scan.Decide(g.Settings.Policy, m.env, *m.report)
	}
	g.unstamp()
	g.commit(ctx, passed)
}

// commit carries out the verdicts: side effects pending, journal, then the
// queue's own order of operations, then side effects ready, history and log.
// Messages of one batch share each phase.
func (g *Gateway) commit(ctx context.Context, ms []*message) {
	ctx = context.WithoutCancel(ctx) // never stopped half way
	byQueue := map[queue.Queue][]*message{}
	g.lookAtHolds()
	for _, m := range ms {
		if g.heldByHand(m.claim) {
			g.drop(m)
			continue
		}
		if g.Settings.DryRun || m.verdict.Disposition == scan.Hold && !g.Settings.Monitor {
			g.leave(m)
			continue
		}
		byQueue[m.queue] = append(byQueue[m.queue], m)
	}
	for q, ms := range byQueue {
		plans := make([]queue.Plan, len(ms))
		rows := make([]ledger.Decision, len(ms))
		for i, m := range ms {
			plans[i] = g.plan(m)
			rows[i] = ledger.Decision{Key: string(m.key), Data: g.decision(m)}
		}
		err := g.pend(ctx, ms)
		if err == nil {
			err = g.Ledger.Decided(ctx, rows)
		}
		if err != nil {
			g.Report(problem("decisions not recorded", fmt.Errorf("record %d decisions: %w", len(rows), err)))
			for _, m := range ms {
				g.cannot(m.id(), "commit", err)
				g.drop(m)
			}
			continue
		}
		g.recorderStamp("commit", "")
		start := g.Now()
		outs := q.Commit(ctx, plans)
		g.unstamp()
		for _, m := range ms {
			m.took("commit", g.Now().Sub(start)) // shared by the batch
		}
		g.effects(ctx, ms, outs)
		for i, m := range ms {
			g.settled(ctx, m, outs[i], "")
		}
	}
	g.kick(ctx)
}

// settled books the outcome of a commit.
func (g *Gateway) settled(ctx context.Context, m *message, out queue.Outcome, note string) {
	switch {
	case errors.Is(out.Err, queue.ErrGone):
		g.Report(Event{Name: EventGone, ID: m.id(), Err: out.Err})
		g.backoff.forget(m.id())
		g.drop(m)
		return
	case errors.Is(out.Err, queue.ErrUnchangeable):
		g.unchangeable(ctx, m, out.Err)
		return
	case out.Err != nil:
		g.cannot(m.id(), "commit", out.Err)
		g.drop(m)
		return
	}
	m.note = note
	g.stamp("log", m)
	faultAt("log", m)
	g.record(ctx, m, out)
	g.unstamp()
	if g.released(m, out) {
		g.kicks[m.queue] = append(g.kicks[m.queue], out.NewIDs...)
	}
	g.backoff.forget(m.id())
	g.drop(m)
}

// act carries out what the machine asks for.
func (g *Gateway) act(actions []poison.Action) {
	for _, a := range actions {
		switch a := a.(type) {
		case poison.Run:
			if a.Lane == poison.Isolation {
				g.isolate = append(g.isolate, a)
			} else {
				g.pending = append(g.pending, a)
			}
		case poison.RunCanary:
			g.canaries = append(g.canaries, a)
		case poison.Convict:
			g.convict(a.Key, a.Deaths, true)
		case poison.Unscannable:
			g.convict(a.Key, a.Deaths, false)
		case poison.Unexplained:
			g.Report(Event{Name: EventUnexplained, Fields: Fields{"messages": len(a.Keys), "deaths": len(a.Deaths)}})
		case poison.Breaker:
			g.setBreaker(a)
		case poison.Wait:
			g.waits = append(g.waits, wait{a.ID, g.Now().Add(a.For)})
		}
	}
}
