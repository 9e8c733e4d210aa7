package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/poison"
	"holdfast/queue"
	"holdfast/scan"
)

// wait sleeps until something happens: a run ended, a listing came, somebody
// asks or wakes, or a second has passed.
func (g *Gateway) wait(ctx context.Context) {
	t := time.NewTimer(min(time.Second, g.Settings.Poll))
	defer t.Stop()
	select {
	case rr := <-g.results:
		g.ended(ctx, rr)
	case l := <-g.listed:
		g.heard(l)
	case <-g.wake:
		for _, p := range g.pickers {
			p.due = time.Time{}
		}
	case answer := <-g.ask:
		answer <- g.status(g.Now())
	case r := <-g.retries:
		r.answer <- g.retry(r.queue, r.name)
	case r := <-g.settles:
		r.answer <- g.settle(ctx, r.Order)
	case <-t.C:
	case <-ctx.Done():
		if g.stopping { // already known: do not spin on it
			<-t.C
		}
	}
}

// heard takes a listing into its picker and reports what it left alone.
func (g *Gateway) heard(l listed) {
	now := g.Now()
	p := l.by
	p.accept(l)
	if !l.done {
		return
	}
	p.due = now.Add(g.Settings.Poll)
	g.total = max(g.total, g.doneCount()+l.res.Messages)
	if l.err != nil && !errors.Is(l.err, context.Canceled) {
		g.Report(problem("queue not listed", fmt.Errorf("list queue %s: %w", p.q.Name(), l.err)))
		return
	}
	g.mu.Lock()
	changed := false
	for why, n := range l.res.Skipped {
		key := p.q.Name() + ": " + why
		changed = changed || g.skips[key] != n
		g.skips[key] = n
	}
	g.mu.Unlock()
	if changed {
		g.Report(Event{Name: EventLeftAlone, Fields: Fields{"queue": p.q.Name(), "what": counted(l.res.Skipped)}})
	}
	g.alarm(p, now)
}

// counted is "2 of this, 1 of that".
func counted(of map[string]int) string {
	var parts []string
	for what, n := range of {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, what))
		}
	}
	sort.Strings(parts)
	return strings.Join(parts, ", ")
}

func (g *Gateway) doneCount() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, c := range g.counts {
		n += int(c)
	}
	return n
}

// alarm tells of mail that waits too long, once per age and queue.
func (g *Gateway) alarm(p *picker, now time.Time) {
	level := 0
	var oldest time.Duration
	if len(p.next.old) > 0 {
		oldest = now.Sub(p.next.old[0].Arrived)
	}
	for i, age := range g.Settings.AlarmAges {
		if age > 0 && oldest > age {
			level = i + 1
		}
	}
	if level > g.alarmed[p.q.Name()] {
		g.Report(Event{Name: EventAlarm, ID: p.next.old[0].ID, Fields: Fields{
			"queue": p.q.Name(), "oldest": oldest.Round(time.Second).String(), "level": level,
		}})
	}
	g.alarmed[p.q.Name()] = level
}

// retry gives a message that was left alone another chance at once.
func (g *Gateway) retry(queueName, name string) int {
	n := 0
	for _, w := range g.backoff.waiting(g.Now()) {
		if w.ID.Name != name || queueName != "" && w.ID.Queue != queueName {
			continue
		}
		if err := g.Ledger.Return(w.ID.Key()); err != nil {
			g.Report(problem("ledger not written", err))
			continue
		}
		g.backoff.forget(w.ID)
		g.changes++
		n++
		g.Report(Event{Name: EventRetry, ID: w.ID})
	}
	for _, p := range g.pickers {
		p.due = time.Time{}
	}
	return n
}

// listDue says that p should list its directories now. A drain lists again
// until a listing that began after the last change finds nothing.
func (g *Gateway) listDue(p *picker) bool {
	return !p.listed || !g.Now().Before(p.due) || g.Settings.Drain && !g.settledSince(p)
}

func (g *Gateway) settledSince(p *picker) bool { return p.listed && p.empty() && p.seen == g.changes }

// exclusive says that a run that must be alone is running or next.
func (g *Gateway) exclusive() bool {
	for _, r := range g.running {
		if r.Exclusive {
			return true
		}
	}
	return len(g.isolate) > 0 && g.isolate[0].Exclusive
}

// stamp writes what is about to be done to m where a death cannot erase it.
func (g *Gateway) stamp(step string, m *message) { g.recorderStamp(step, string(m.key)) }

func (g *Gateway) recorderStamp(step, item string) {
	g.stamped = true
	if err := g.Recorder.Stamp(step, item); err != nil {
		g.Report(problem("flight recorder not written", err))
	}
}

// unstamp says that nothing dangerous is being done: every way out of a step
// comes by here, or the next life takes our orderly end for a death.
func (g *Gateway) unstamp() {
	if !g.stamped {
		return
	}
	g.stamped = false
	if err := g.Recorder.Clear(); err != nil {
		g.Report(problem("flight recorder not written", err))
	}
}

// patience is how many looks a message that is busy, or being written, is
// given before the log speaks of it: most are well at the next one.
const patience = 3

// cannot books that a step failed for one message: it is left as it is and
// tried again later. The log gets one line until the reason changes.
func (g *Gateway) cannot(id queue.ID, step string, err error) {
	if errors.Is(err, queue.ErrGone) {
		g.backoff.forget(id)
		if step != "lock" { // delivered, moved or removed by somebody else while we held it
			g.Report(Event{Name: EventGone, ID: id, Err: err, Fields: Fields{"step": step}})
		}
		return
	}
	if errors.Is(err, context.Canceled) {
		g.backoff.forget(id) // we are stopping: that is no failure of the message's
		return
	}
	why := step + ": " + err.Error()
	was, known := g.backoff.last(id)
	w := g.backoff.delay(id, g.Now(), why)
	e := Event{Name: EventSkipped, ID: id, Err: err, Fields: Fields{"step": step, "next_try": w.Until.Format(time.RFC3339)}}
	if step == "commit" {
		e.Name = EventCommitFailed
		delete(e.Fields, "step")
	}
	switch passing := errors.Is(err, queue.ErrBusy) || errors.Is(err, queue.ErrIncomplete); {
	case passing && w.Tries != patience:
		e.Quiet = true
	case !passing && known && was == why:
		return
	}
	g.Report(e)
}

// putBack unlocks a claimed message untouched; it will be claimed again.
func (g *Gateway) putBack(m *message, why string) {
	if why != "" {
		g.backoff.hold(m.id(), g.Now().Add(g.Settings.LedgerAge/4), why)
		g.Report(Event{Name: EventSkipped, ID: m.id(), Fields: Fields{"why": why}})
		m.foreign = true
	} else {
		g.backoff.forget(m.id())
	}
	g.drop(m)
}

// drop lets go of a message: lock, descriptors, and with the next Begin its
// row in the ledger.
func (g *Gateway) drop(m *message) {
	g.unstamp()
	m.claim.Close()
	if m.render != nil {
		m.render.Close()
		m.render = nil
	}
	delete(g.messages, m.key)
	if g.solo == m.key {
		g.solo = ""
	}
	g.changes++
	if !m.foreign {
		g.finished = append(g.finished, string(m.key))
	}
	g.mu.Lock()
	delete(g.stamps, m.key)
	g.mu.Unlock()
}

// leave keeps a message in the inbound queue: held by policy, or a dry run.
func (g *Gateway) leave(m *message) {
	until := g.Now().Add(forever)
	why := heldWhy(m.verdict)
	if g.Settings.DryRun {
		why = whyDryRun
	} else {
		g.setAside(m.id(), m.claim.Stats(), why)
	}
	g.record(context.Background(), m, queue.Outcome{ID: m.id()})
	g.backoff.hold(m.id(), until, why)
	g.drop(m)
}

// plan turns a verdict into groups of recipients. Monitor mode releases
// everything unmodified; what would have happened stands in the record.
func (g *Gateway) plan(m *message) queue.Plan {
	group := queue.Group{Disposition: queue.Release}
	if m.verdict.Disposition == scan.Quarantine && !g.Settings.Monitor {
		text, err := json.Marshal(m.verdict)
		if err != nil { // plain structs and strings: cannot happen, and the item must not be lost for it
			text = []byte(`{}`)
		}
		group = queue.Group{Disposition: queue.Quarantine, Item: text}
	}
	return queue.Plan{Claim: m.claim, Groups: faultPlan(m, []queue.Group{group})}
}

// released says that the outcome's ids are the MTA's.
func (g *Gateway) released(m *message, out queue.Outcome) bool {
	return len(out.NewIDs) > 0 && (m.verdict.Disposition != scan.Quarantine || g.Settings.Monitor)
}

// convict gives a message that killed its worker, or that no worker can
// scan, the verdict of policy, after keeping what is known of it.
func (g *Gateway) convict(key poison.Key, deaths []poison.Death, killed bool) {
	m := g.messages[key]
	if m == nil {
		return
	}
	m.deaths = deaths
	m.verdict = scan.DecideDeaths(g.Settings.Policy, killed, summaries(deaths))
	g.keepEvidence(m)
	name := EventUnscannable
	if killed {
		name = EventConvicted
		if err := g.Ledger.Convict(conviction(m, g.Now())); err != nil {
			g.Report(problem("ledger not written", err))
		}
	}
	g.Report(Event{Name: name, ID: m.id(), Fields: Fields{"deaths": summaries(deaths)}})
	g.commit(context.Background(), []*message{m})
}

// kick asks the MTA to deliver what was released. A failed kick costs time
// only: the MTA's own queue runs find the mail.
func (g *Gateway) kick(ctx context.Context) {
	for q, names := range g.kicks {
		delete(g.kicks, q)
		if err := q.Kick(context.WithoutCancel(ctx), names); err != nil {
			g.Report(problem("MTA not told of released mail", fmt.Errorf("kick %d messages of queue %s: %w", len(names), q.Name(), err)))
		}
	}
}

// startRun gives a run to a fresh worker.
func (g *Gateway) startRun(ctx context.Context, r poison.Run) {
	job := Job{More: r.More}
	for _, k := range r.Keys {
		m := g.messages[k]
		if m.started.IsZero() {
			m.started = g.Now()
			m.took("wait", m.started.Sub(m.began))
		}
		job.Messages = append(job.Messages, Input{File: m.render, Size: m.size})
	}
	keys := r.Keys
	job.Stamp = func(i int, stage, part string) {
		g.mu.Lock()
		defer g.mu.Unlock()
		if i >= 0 && i < len(keys) {
			g.stamps[keys[i]] = stamp{stage, part}
		}
	}
	g.spawn(ctx, &run{Run: r}, job)
}

// startCanary runs a benign message of the suspect's size.
func (g *Gateway) startCanary(ctx context.Context, c poison.RunCanary) {
	size, parts := int64(4096), 2
	if m := g.messages[c.Like]; m != nil {
		size = m.size
		if m.report != nil {
			parts = len(m.report.Parts)
		}
	}
	r := &run{Run: poison.Run{ID: c.ID, Lane: poison.Isolation}, canary: &c}
	f, err := g.Runner.Canary(size, parts)
	if err != nil {
		g.Report(problem("test message not made", err))
		g.running[c.ID] = r
		g.results <- runResult{id: c.ID, res: Result{Death: &poison.Death{Class: poison.ClassResource, Signature: "canary: " + err.Error()}}}
		return
	}
	g.spawn(ctx, r, Job{Messages: []Input{{File: f, Size: size}}, Stamp: func(int, string, string) {}})
}

func (g *Gateway) spawn(ctx context.Context, r *run, job Job) {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.cancel = cancel
	g.running[r.ID] = r
	go func() {
		defer cancel()
		res := g.Runner.Run(work, job)
		if r.canary != nil {
			job.Messages[0].File.Close()
		}
		g.results <- runResult{id: r.ID, res: res}
	}()
}

// finish ends the loop: what runs may end within the shutdown time, passes
// are committed, everything else is put back, nothing counts as a death.
func (g *Gateway) finish(ctx context.Context) error {
	deadline := time.NewTimer(g.Settings.ShutdownTimeout)
	defer deadline.Stop()
	for len(g.running) > 0 {
		select {
		case rr := <-g.results:
			g.lastResult(ctx, rr)
			continue
		case answer := <-g.ask:
			answer <- g.status(g.Now())
			continue
		case <-deadline.C:
		}
		for _, r := range g.running {
			r.cancel()
		}
	}
	for _, m := range g.messages {
		g.putBack(m, "")
	}
	if err := g.Ledger.Finish(context.WithoutCancel(ctx), g.finished); err != nil {
		return fmt.Errorf("empty the ledger at the end: %w", err)
	}
	g.finished = nil
	return nil
}

func (g *Gateway) lastResult(ctx context.Context, rr runResult) {
	r := g.running[rr.id]
	delete(g.running, rr.id)
	if r.canary != nil {
		return
	}
	var passed []*message
	for i, k := range r.Keys {
		if rep := rr.res.Reports[i]; rep != nil {
			m := g.messages[k]
			m.report, m.stages = rep, append(m.stages, rr.res.Stages[i]...)
			passed = append(passed, m)
		}
	}
	g.decide(ctx, passed)
}

// summary is what this life did.
func (g *Gateway) summary(start time.Time) Summary {
	s := Summary{Counts: map[string]int64{}, Took: g.Now().Sub(start), Blocked: g.breaker + g.lowSpace + g.holdsUnread, Alone: map[string]string{}}
	if g.paused {
		s.Blocked = "paused"
	}
	g.mu.Lock()
	for k, n := range g.counts {
		s.Counts[k] = n
	}
	g.mu.Unlock()
	return s
}

// remains looks into the directories once more: what is there is left, whether
// we ever looked at it or not. A message with a reason is named before others.
func (g *Gateway) remains(ctx context.Context, s *Summary) {
	why := map[string]string{}
	for _, w := range g.backoff.waiting(g.Now()) {
		why[w.ID.Key()] = w.Why
	}
	var others []Left
	for _, q := range g.Queues {
		res, err := q.List(ctx, func(e queue.Entry) bool {
			s.Waiting++
			switch reason, ok := why[e.ID.Key()]; {
			case ok && reason == whyDryRun:
				s.Judged++
			case ok && len(s.Left) < maxNamed:
				s.Left = append(s.Left, Left{e.ID, reason})
			case len(others) < maxNamed:
				others = append(others, Left{e.ID, "not looked at yet"})
			}
			return true
		})
		if err != nil {
			g.Report(problem("queue not listed", fmt.Errorf("list queue %s: %w", q.Name(), err)))
		}
		if text := counted(res.Skipped); text != "" {
			s.Alone[q.Name()] = text
		}
	}
	for _, all := range [][]Left{s.Left, others} {
		sort.Slice(all, func(i, j int) bool { return all[i].ID.Key() < all[j].ID.Key() })
	}
	s.Left = append(s.Left, others[:min(len(others), maxNamed-len(s.Left))]...)
}

const (
	maxNamed  = 20 // messages that a summary names
	whyDryRun = "dry run"
)

// setBreaker opens or closes the breaker: while it is open no mail is taken.
func (g *Gateway) setBreaker(b poison.Breaker) {
	if b.Open == (g.breaker != "") {
		return
	}
	if g.breaker = ""; b.Open {
		g.breaker = b.Why
	}
	g.reportFlow(g.breaker)
}

// reportFlow says that mail is no longer taken, and why, or that it is again.
func (g *Gateway) reportFlow(why string) {
	if why == "" {
		g.Report(Event{Name: EventOpened})
		return
	}
	g.Report(Event{Name: EventClosed, Fields: Fields{"why": why}})
}

func (g *Gateway) lookAtPause() {
	_, err := os.Lstat(g.Settings.PauseFile)
	paused := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		paused = true // cannot tell: the careful reading
	}
	if paused != g.paused {
		g.paused = paused
		name := EventResumed
		if paused {
			name = EventPaused
		}
		g.Report(Event{Name: name})
	}
}

// lookAtSpace stops claiming while a file system is nearly full: mail waits
// in the MTA's queue, where it is safe.
func (g *Gateway) lookAtSpace() {
	low := ""
	for _, dir := range g.Settings.FreeDirs {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			low = fmt.Sprintf("cannot tell the free space of %s: %v", dir, err)
			break
		}
		if free := st.Bavail * uint64(st.Bsize); free < g.Settings.MinFree {
			low = fmt.Sprintf("%s has %s free, less than min_free (%s)", dir, amount(free), amount(g.Settings.MinFree))
			break
		}
	}
	if (low == "") != (g.lowSpace == "") {
		g.reportFlow(low)
	}
	g.lowSpace = low
}

// amount is a number of bytes as a person says it.
func amount(n uint64) string {
	if n >= 1e9 {
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	}
	return fmt.Sprintf("%.0f MB", float64(n)/1e6)
}

func summaries(deaths []poison.Death) []string {
	var out []string
	for _, d := range deaths {
		out = append(out, d.String())
	}
	return out
}

func sizeOf(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("size of the rendered message: %w", err)
	}
	return st.Size(), nil
}
