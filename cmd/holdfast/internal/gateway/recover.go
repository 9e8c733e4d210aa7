package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"holdfast/poison"
	"holdfast/poison/evidence"
	"holdfast/poison/ledger"
	"holdfast/poison/recorder"
	"holdfast/queue"
	"holdfast/queue/history"
)

// deadlyLives is how many lives in a row must end on one message before it
// is set aside.
const deadlyLives = 2

// Recover tidies up after an earlier life, before the loop starts: what is
// set aside, the message that was stamped when we died, decided releases
// that were not finished, quarantine items that were prepared.
func (g *Gateway) Recover(ctx context.Context, last recorder.Last, death string) error {
	if death != "" {
		g.Report(Event{Name: EventCrash, Fields: died(death, last)})
	}
	if err := g.loadAside(); err != nil {
		return err
	}
	if err := g.recoverJournal(ctx); err != nil {
		return err
	}
	if err := g.recoverItems(ctx); err != nil {
		return err
	}
	if err := g.recoverEffects(ctx); err != nil {
		return err
	}
	return g.suspectOf(ctx, last)
}

// died says how the previous life ended, and at what, if that is known.
func died(how string, last recorder.Last) Fields {
	f := Fields{"how": how}
	if last.Step != "" {
		f["while"] = last.Step
	}
	if last.Item != "" {
		f["message"] = show(last.Item)
	}
	return f
}

// split takes a key apart again.
func split(key string) (queue.ID, bool) {
	f := strings.SplitN(key, "\x00", 3)
	if len(f) != 3 {
		return queue.ID{}, false
	}
	return queue.ID{Queue: f[0], Dir: f[1], Name: f[2]}, true
}

func show(key string) string {
	id, ok := split(key)
	if !ok {
		return key
	}
	return id.String()
}

func (g *Gateway) queueOf(id queue.ID) queue.Queue {
	for _, q := range g.Queues {
		if q.Name() == id.Queue {
			return q
		}
	}
	return nil
}

// setAside leaves a message alone, in this life and later ones.
func (g *Gateway) setAside(id queue.ID, st queue.Stats, why string) {
	stat, err := json.Marshal(st)
	if err == nil {
		err = g.Ledger.SetAside(ledger.Aside{Key: id.Key(), Stat: stat, Why: why, When: g.Now()})
	}
	if err != nil {
		g.Report(problem("ledger not written", err))
	}
	g.backoff.hold(id, g.Now().Add(forever), why)
}

const forever = 100 * 365 * 24 * time.Hour

// loadAside holds back what was set aside, unless another message has its
// place by now.
func (g *Gateway) loadAside() error {
	rows, err := g.Ledger.AsideRows()
	if err != nil {
		return fmt.Errorf("read what is set aside: %w", err)
	}
	for _, a := range rows {
		id, ok := split(a.Key)
		q := g.queueOf(id)
		if !ok || q == nil {
			continue // its queue is not in the configuration now
		}
		c, err := q.Lock(context.Background(), queue.Entry{ID: id})
		if err == nil {
			stat, merr := json.Marshal(c.Stats())
			c.Close()
			if merr == nil && string(stat) == string(a.Stat) {
				g.backoff.hold(id, g.Now().Add(forever), a.Why)
				continue
			}
		} else if !errors.Is(err, queue.ErrGone) {
			g.backoff.hold(id, g.Now().Add(forever), a.Why)
			continue
		}
		if err := g.Ledger.Return(a.Key); err != nil {
			return err
		}
	}
	return nil
}

// recoverJournal sweeps what a crash after a decision left, and writes the
// trail that it came before. A message that is still there is claimed again:
// its marker, or a new scan, decides.
func (g *Gateway) recoverJournal(ctx context.Context) error {
	rows, err := g.Ledger.Journal()
	if err != nil {
		return fmt.Errorf("read the journal: %w", err)
	}
	var done []string
	var gone []decided
	for _, row := range rows {
		var d decided
		id, ok := split(row.Key)
		if err := json.Unmarshal(row.Data, &d); err != nil {
			g.Report(problem("journal not understood", fmt.Errorf("row of %s: %w", id, err)))
			continue
		}
		if ok && g.sweepDecided(ctx, id, row.Key, d) {
			done, gone = append(done, row.Key), append(gone, d)
		}
	}
	if err := g.publishPast(ctx, gone); err != nil {
		g.Report(problem("history not written", err))
	}
	return g.Ledger.Finish(ctx, done)
}

// sweepDecided removes what is left of a decided message that has left its
// queue; false if it has not, or cannot be told.
func (g *Gateway) sweepDecided(ctx context.Context, id queue.ID, key string, d decided) bool {
	q := g.queueOf(id)
	if q == nil {
		return false
	}
	c, err := q.Lock(ctx, queue.Entry{ID: id})
	if err == nil {
		c.Close()
		g.past[key] = d
	}
	if !errors.Is(err, queue.ErrGone) {
		return false // locked or odd: the loop meets it again
	}
	if err := q.Sweep(ctx, id, d.Stats); err != nil {
		g.Report(problem("leftovers not removed", err))
		return false
	}
	g.Report(Event{Name: EventSwept, ID: id, Fields: Fields{"decided": d.Disposition}})
	return true
}

// recoverItems settles quarantine items that were prepared (CUSTODY 3).
func (g *Gateway) recoverItems(ctx context.Context) error {
	items, err := g.Store.Prepared(ctx)
	if err != nil {
		return err
	}
	for _, m := range items {
		q := g.queueOf(m.Identity.ID)
		if q == nil {
			continue
		}
		c, err := q.Lock(ctx, queue.Entry{ID: m.Identity.ID})
		if errors.Is(err, queue.ErrGone) {
			if err := g.Store.CommitUncertain(ctx, m.Name); err != nil {
				return err
			}
			g.Report(Event{Name: EventSwept, ID: m.Identity.ID, Fields: Fields{"item": m.Name, "note": "quarantined before a crash"}})
			continue
		}
		if err != nil {
			continue // the next start meets it again
		}
		if err := g.recoverItem(ctx, q, c, m.Name, m.Identity); err != nil {
			return err
		}
	}
	return nil
}

func (g *Gateway) recoverItem(ctx context.Context, q queue.Queue, c queue.Claim, name string, id queue.Identity) error {
	defer c.Close()
	_, err := c.Read(ctx)
	switch {
	case err != nil:
		return nil // damaged or incomplete: the item stays prepared, nothing is lost
	case c.Decided():
		g.resumeItem(ctx, q, c)
		return nil
	case c.Identity() != id:
		return g.Store.CommitUncertain(ctx, name) // the queue id is another message's now
	}
	return g.Store.Abort(ctx, name) // it is still queued, and will be judged again
}

// resumeItem finishes a decided message that has an item, and writes it down.
func (g *Gateway) resumeItem(ctx context.Context, q queue.Queue, c queue.Claim) {
	id := c.Entry().ID
	out := q.Resume(ctx, c)
	if out.Err != nil {
		g.Report(problem("commit failed after a crash", out.Err))
		return
	}
	rec := g.past[id.Key()].Record
	if rec.ID == "" {
		rec = history.Record{Queue: id.Queue, Dir: id.Dir, ID: id.Name, Verdict: noteFinished}
	}
	rec.NewIDs, rec.Note = out.NewIDs, join(noteFinished, rec.Note)
	g.publish(ctx, rec)
	g.finished = append(g.finished, id.Key())
}

// suspectOf treats the message that was stamped when the last life ended:
// alone first; set aside, untouched, when two lives in a row ended on it and
// a message of our own passes the same steps.
func (g *Gateway) suspectOf(ctx context.Context, last recorder.Last) error {
	id, ok := split(last.Item)
	q := g.queueOf(id)
	if !ok || q == nil {
		return nil
	}
	c, err := q.Lock(ctx, queue.Entry{ID: id})
	if err != nil {
		return nil // gone, or somebody else's
	}
	if last.Deaths < deadlyLives {
		c.Close()
		g.solo = poison.Key(last.Item)
		return g.claimAlone(ctx, q, id)
	}
	defer c.Close()
	if g.Canary != nil {
		g.recorderStamp(last.Step, "canary")
		if err := g.Canary(ctx); err != nil {
			g.unstamp()
			return fmt.Errorf("the supervisor cannot handle a message of its own: %w", err)
		}
		g.unstamp()
	}
	why := fmt.Sprintf("Holdfast itself died %d times in a row at %s of it", last.Deaths, last.Step)
	g.setAside(id, c.Stats(), why)
	g.Report(Event{Name: EventAside, ID: id, Fields: Fields{"why": why}})
	return g.Recorder.Forget()
}

// claimAlone brings one message into the machine before any other.
func (g *Gateway) claimAlone(ctx context.Context, q queue.Queue, id queue.ID) error {
	c, err := q.Lock(ctx, queue.Entry{ID: id})
	if err != nil {
		g.solo = ""
		return nil
	}
	m := &message{key: poison.Key(id.Key()), queue: q, claim: c, began: g.Now()}
	st := c.Stats()
	m.size = st.Control.Size + st.Data.Size
	g.backoff.claim(id)
	events, err := g.begin(ctx, []*message{m})
	if err != nil {
		return err
	}
	for _, ev := range events {
		g.act(g.machine.Step(ev))
	}
	return nil
}

// origin says how a claimed message enters the machine, or why it is left.
func (g *Gateway) origin(m *message, found map[string]ledger.Found) (from poison.Origin, skip string) {
	f := found[string(m.key)]
	switch {
	case f.Recovery == ledger.Alive:
		return 0, fmt.Sprintf("in work by process %d", f.Row.Owner.PID)
	case f.Recovery == ledger.Young:
		return 0, "in work by another machine since " + f.Row.Began.Format(time.RFC3339)
	case m.key == g.solo:
		return poison.SupervisorDied, ""
	case f.Recovery == ledger.Old:
		return poison.AloneFirst, ""
	case f.Recovery == ledger.DeadHere:
		return poison.DeadHere, ""
	}
	return poison.Fresh, ""
}

func conviction(m *message, now time.Time) ledger.Conviction {
	text, err := json.Marshal(m.deaths)
	if err != nil {
		text = nil
	}
	return ledger.Conviction{Key: string(m.key), When: now, Deaths: text}
}

// keepEvidence writes what is known of a message that killed a worker.
func (g *Gateway) keepEvidence(m *message) {
	deaths, err := json.Marshal(m.deaths)
	if err != nil {
		deaths = nil
	}
	b := evidence.Bundle{
		Key: m.id().String(), When: g.Now(), Why: strings.Join(summaries(m.deaths), "; "), Deaths: deaths,
		Versions: map[string]string{"holdfast": g.Runner.Version()}, Stderr: m.stderr, Crash: m.crash,
	}
	name := fmt.Sprintf("%s-%d", m.id().Name, m.env.Arrived.Unix())
	if _, err = m.render.Seek(0, 0); err == nil {
		_, err = g.Evidence.Save(strings.Map(fileSafe, name), b, m.render)
	}
	if err != nil {
		g.Report(problem("evidence not kept", err))
	}
}

func fileSafe(r rune) rune {
	if r == '/' || r < ' ' || r > '~' {
		return '_'
	}
	return r
}

// reportDeath tells of a worker that died or failed.
func (g *Gateway) reportDeath(r *run, ev poison.Ended) {
	g.Report(Event{Name: EventDeath, Fields: Fields{
		"how": ev.Death.String(), "suspect": show(string(ev.Stamp)), "messages": len(r.Keys), "passed": len(ev.Passed),
	}})
}
