package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"holdfast/queue"
	"holdfast/queue/history"
	"holdfast/queue/quarantine"
	"holdfast/scan"
)

// decided is what the journal knows of a decision: enough to sweep up after
// a crash between the release and the removal of what is left, and to write
// the trail that the crash came before.
type decided struct {
	Disposition string         `json:"disposition"`
	Stats       queue.Stats    `json:"stats"`
	When        time.Time      `json:"when"`
	Item        string         `json:"item,omitempty"` // in the quarantine
	Record      history.Record `json:"record"`
}

// Bounds of what the journal keeps of a record, for a transaction's sake.
const (
	maxJournalReasons = 20
	maxJournalText    = 300 // bytes of each text
)

func (g *Gateway) decision(m *message) []byte {
	d := decided{Disposition: string(m.verdict.Disposition), Stats: m.claim.Stats(), When: g.Now(), Record: cutShort(g.trail(m))}
	if m.verdict.Disposition == scan.Quarantine && !g.Settings.Monitor {
		d.Item = quarantine.Name(m.claim.Identity(), 0)
	}
	text, err := json.Marshal(d)
	if err != nil {
		return nil
	}
	return text
}

// cutShort is a record with its texts cut.
func cutShort(r history.Record) history.Record {
	cut := func(s string) string { return s[:min(len(s), maxJournalText)] }
	r.From, r.MessageID = cut(r.From), cut(r.MessageID)
	addresses, reasons := r.Addresses, r.Reasons
	r.Addresses, r.Reasons = nil, nil
	for _, a := range addresses {
		r.Addresses = append(r.Addresses, cut(a))
	}
	for _, why := range reasons[:min(len(reasons), maxJournalReasons)] {
		why.Text = cut(why.Text)
		r.Reasons = append(r.Reasons, why)
	}
	return r
}

// trail is what is known of a message once it is judged.
func (g *Gateway) trail(m *message) history.Record {
	rec := history.Record{
		Queue: m.id().Queue, Dir: m.id().Dir, ID: m.id().Name,
		T: m.env.Arrived.Unix(), From: m.env.Sender, Recipients: len(m.env.Recipients), Size: m.size,
		ClientAddr: m.env.ClientAddr, Verdict: string(m.verdict.Disposition), Stages: m.stages,
	}
	for i := range min(len(m.env.Recipients), history.MaxAddresses) {
		rec.Addresses = append(rec.Addresses, m.env.Recipients[i].Address)
	}
	for _, r := range m.verdict.Reasons {
		rec.Reasons = append(rec.Reasons, history.Reason{Rule: r.Rule, Text: r.Text, Part: r.Part, Source: r.Source})
	}
	if m.report != nil {
		rec.MessageID = m.report.MessageID
	}
	if g.Settings.Monitor {
		rec.Note = join(rec.Note, "monitor: released")
	}
	if g.Settings.DryRun {
		rec.Note = join(rec.Note, "dry run: left in the queue")
	}
	return rec
}

// record writes the trail and the log line of a settled message. Of one that
// an earlier life judged, the journal knows what there is to say.
func (g *Gateway) record(ctx context.Context, m *message, out queue.Outcome) {
	m.took("total", g.Now().Sub(m.began))
	rec := g.trail(m)
	if d, ok := g.past[string(m.key)]; ok && m.verdict.Disposition == "" {
		rec = d.Record
		rec.Stages = append(rec.Stages, m.stages...)
	}
	if rec.Verdict == "" {
		rec.Verdict = m.note
	}
	rec.NewIDs, rec.Note = out.NewIDs, join(m.note, rec.Note)
	g.publish(ctx, rec)
}

// publish is the one place that writes a record down.
func (g *Gateway) publish(ctx context.Context, rec history.Record) {
	rec.Time = g.Now()
	g.mu.Lock()
	g.counts[rec.Verdict]++
	g.mu.Unlock()
	g.Report(Event{Name: EventMessage, ID: queue.ID{Queue: rec.Queue, Dir: rec.Dir, Name: rec.ID}, Record: &rec})
	if g.Progress != nil {
		g.Progress(g.doneCount(), g.total)
	}
	if err := g.History.Append(ctx, []history.Record{rec}); err != nil {
		g.Report(problem("history not written", err))
	}
}

func join(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "; " + b
}

// notes of what a crash came before.
const (
	noteFinished = "finished after a crash"
	noteUnsaid   = "decided before a crash, written down after it"
)

// publishPast writes the records of messages that have left the queue, and of
// which a crash came before the trail. Most of a batch was written down: what
// history has already is not said twice.
func (g *Gateway) publishPast(ctx context.Context, gone []decided) error {
	if len(gone) == 0 {
		return nil
	}
	first := gone[0].When
	for _, d := range gone {
		if d.When.Before(first) {
			first = d.When
		}
	}
	known := map[string]bool{}
	key := func(r history.Record) string { return fmt.Sprintf("%s\x00%s\x00%s\x00%d", r.Queue, r.Dir, r.ID, r.T) }
	err := history.Since(ctx, g.History.Dir, first, func(r history.Record) { known[key(r)] = true })
	if err != nil {
		return err
	}
	for _, d := range gone {
		if d.Record.ID == "" || known[key(d.Record)] {
			continue
		}
		rec := d.Record
		rec.NewIDs, rec.Note = g.becameOf(d), join(noteUnsaid, rec.Note)
		g.publish(ctx, rec)
	}
	return nil
}

// becameOf is the new queue id, or the quarantine item, as far as it is known
// without the outcome.
func (g *Gateway) becameOf(d decided) []string {
	if d.Item != "" {
		return []string{d.Item}
	}
	q, ok := g.queueOf(queue.ID{Queue: d.Record.Queue}).(interface{ KeepsIDs() bool })
	if ok && q.KeepsIDs() {
		return []string{d.Record.ID}
	}
	return nil
}
