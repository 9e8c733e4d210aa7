package gateway

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"holdfast/cmd/holdfast/internal/holds"
	"holdfast/poison"
	"holdfast/poison/ledger"
	"holdfast/poison/recorder"
	"holdfast/queue"
	"holdfast/queue/history"
	"holdfast/queue/quarantine"
	"holdfast/scan"
)

// rigid is a queue of one message that cannot be changed; quarantine is whether
// it can be kept.
type rigid struct {
	queue.Queue
	quarantine bool
	done       []queue.Disposition
}

func (q *rigid) Name() string { return "rigid" }

func (q *rigid) Lock(_ context.Context, e queue.Entry) (queue.Claim, error) {
	return &rigidClaim{entry: e}, nil
}

func (q *rigid) Commit(_ context.Context, plans []queue.Plan) (out []queue.Outcome) {
	for _, p := range plans {
		o := queue.Outcome{ID: p.Claim.Entry().ID, NewIDs: []string{"new"}}
		if do := p.Groups[0].Disposition; do == queue.Release || !q.quarantine {
			o.Err = fmt.Errorf("plan: %w", queue.ErrUnchangeable)
		} else {
			q.done = append(q.done, do)
		}
		out = append(out, o)
	}
	return out
}

func (q *rigid) Kick(context.Context, []string) error { return nil }

type rigidClaim struct {
	queue.Claim
	entry queue.Entry
}

func (c *rigidClaim) Entry() queue.Entry       { return c.entry }
func (c *rigidClaim) Stats() queue.Stats       { return queue.Stats{Control: queue.FileStat{Ino: 7}} }
func (c *rigidClaim) Identity() queue.Identity { return queue.Identity{ID: c.entry.ID, Ino: 7} }
func (c *rigidClaim) Close() error             { return nil }
func (c *rigidClaim) Read(context.Context) (queue.Envelope, error) {
	return queue.Envelope{}, nil
}

func newGateway(t *testing.T, p scan.Policy) *Gateway {
	t.Helper()
	dir := t.TempDir()
	led, err := ledger.Open(t.Context(), dir+"/ledger.db", nil, func(ledger.Event) {})
	if err != nil {
		t.Fatal(err)
	}
	rec, _, err := recorder.Open(dir + "/recorder")
	if err != nil {
		t.Fatal(err)
	}
	store, err := quarantine.New(dir+"/quarantine", nil)
	if err != nil {
		t.Fatal(err)
	}
	hist := &history.Writer{Dir: dir + "/history"}
	t.Cleanup(func() { hist.Close(); rec.Close(); led.Close() })
	return New(Deps{
		Settings: Settings{Policy: p, Workers: 1}, Ledger: led, Recorder: rec, Store: store, History: hist,
		Holds: holds.Dir{Path: dir + "/holds"}, Report: func(Event) {}, Now: time.Now,
	})
}

func (g *Gateway) rigidMessage(q *rigid, v scan.Disposition) *message {
	id := queue.ID{Queue: "rigid", Dir: "/x", Name: "1"}
	m := &message{key: poison.Key(id.Key()), queue: q, claim: &rigidClaim{entry: queue.Entry{ID: id}}, verdict: scan.Verdict{Disposition: v}}
	g.messages[m.key] = m
	return m
}

// What cannot be changed is kept or held, as policy says, and never released
// as it is.
func TestWhatCannotBeChangedFollowsPolicy(t *testing.T) {
	for _, c := range []struct {
		policy, verdict scan.Disposition
		quarantine      bool
		want            string
	}{
		{scan.Quarantine, scan.Release, true, "[quarantine]"},
		{scan.Hold, scan.Release, true, "[]"},
		{scan.Quarantine, scan.Release, false, "[]"},
		{scan.Quarantine, scan.Quarantine, false, "[]"},
		{scan.Release, scan.Release, true, "[]"}, // no policy says so; held all the same
	} {
		g := newGateway(t, scan.Policy{Unchangeable: scan.Rule{Do: c.policy}})
		q := &rigid{quarantine: c.quarantine}
		m := g.rigidMessage(q, c.verdict)
		g.commit(t.Context(), []*message{m})
		if got := fmt.Sprint(q.done); got != c.want {
			t.Errorf("policy %s, verdict %s, quarantine %v: %s, want %s", c.policy, c.verdict, c.quarantine, got, c.want)
		}
		aside, err := g.Ledger.AsideRows()
		if err != nil {
			t.Fatal(err)
		}
		if held := len(aside) == 1; held != (c.want == "[]") {
			t.Errorf("policy %s, verdict %s, quarantine %v: set aside %v", c.policy, c.verdict, c.quarantine, aside)
		}
	}
}

// A person may put a message on hold until the moment of its commit.
func TestAHoldCountsUpToTheCommit(t *testing.T) {
	g := newGateway(t, scan.Policy{})
	q := &rigid{quarantine: true}
	m := g.rigidMessage(q, scan.Quarantine)
	if err := g.Holds.Put(holds.Hold{Queue: "rigid", Dir: "/x", ID: "1", Ino: 7, By: "root", At: time.Now()}); err != nil {
		t.Fatal(err)
	}
	g.commit(t.Context(), []*message{m})
	if len(q.done) != 0 || !g.backoff.held(m.id(), time.Now()) {
		t.Errorf("done %v although it is on hold", q.done)
	}
	// Another message of that id is not meant.
	if err := g.Holds.Put(holds.Hold{Queue: "rigid", Dir: "/x", ID: "1", Ino: 8, By: "root", At: time.Now()}); err != nil {
		t.Fatal(err)
	}
	g.commit(t.Context(), []*message{g.rigidMessage(q, scan.Quarantine)})
	if len(q.done) != 1 {
		t.Errorf("done %v, want it kept", q.done)
	}
	// While the holds cannot be read, nothing is taken.
	if err := os.WriteFile(g.Holds.Path+"/rigid.x.0", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.lookAtHolds()
	if g.holdsUnread == "" {
		t.Error("a damaged hold was passed over")
	}
}
