package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/courier"
	"holdfast/cmd/holdfast/internal/gateway"
	"holdfast/cmd/holdfast/internal/keeper"
	"holdfast/cmd/holdfast/internal/notify"
	"holdfast/cmd/holdfast/internal/progress"
	"holdfast/conf"
	"holdfast/poison/evidence"
	"holdfast/poison/ledger"
	"holdfast/poison/proc"
	"holdfast/poison/recorder"
	"holdfast/queue"
	"holdfast/queue/history"
	"holdfast/queue/inode"
	"holdfast/queue/outbox"
	"holdfast/queue/quarantine"
	"holdfast/queue/sendmail"
	"holdfast/scan"
	"holdfast/scan/wire"
)

const guardTime = 2 * time.Minute

// supervisor is one life with one configuration.
type supervisor struct {
	g       *global
	opts    runOptions
	read    *conf.Config // as it was read
	conf    *conf.Config // as it is used: a dry run has a state of its own
	log     *logrus.Logger
	started time.Time
	loaded  time.Time
	before  map[string]int64 // what earlier configurations settled
	refused atomic.Pointer[string]
	notify  notify.Socket
	closers []func() error
	gate    *gateway.Gateway
	courier *courier.Courier // nil: nobody wants to be told
	bar     *progress.Bar
	beaten  atomic.Int64 // when the loop last turned, unix nanoseconds
}

// supervise runs the gateway until it ends, and again with each new
// configuration that SIGHUP brings.
func supervise(ctx context.Context, g *global, opts runOptions) (gateway.Summary, error) {
	c, err := g.load()
	if err != nil {
		return gateway.Summary{}, err
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	now := time.Now()
	s := &supervisor{g: g, opts: opts, read: c, conf: c, started: now, loaded: now, before: map[string]int64{}, notify: notify.FromEnv()}
	event := gateway.EventStarted
	var old *supervisor // the one that s takes the place of
	for {
		if err := s.open(ctx); err != nil {
			s.close()
			if old == nil || ctx.Err() != nil {
				return gateway.Summary{}, err
			}
			s, old, event = old.again(err), nil, gateway.EventReloaded
			continue
		}
		logEvent(s.log, gateway.Event{Name: event, Fields: s.describe()})
		next, sum, err := s.life(ctx, hup)
		if err != nil || next == nil {
			return s.whole(ctx, sum), err
		}
		s, old, event = s.next(next), s, gateway.EventReloaded
		s.before = maps.Clone(s.before)
		for k, n := range sum.Counts {
			s.before[k] += n
		}
		s.loaded = time.Now()
	}
}

// whole is the summary of all that a drain did: the configurations before a
// reload count, and the lives that died, of which history knows.
func (s *supervisor) whole(ctx context.Context, sum gateway.Summary) gateway.Summary {
	if !s.opts.drain || sum.Counts == nil {
		return sum
	}
	for k, n := range s.before {
		sum.Counts[k] += n
	}
	began, died := keeper.Began()
	if !died || s.opts.dryRun {
		return sum
	}
	counts := map[string]int64{}
	err := history.Since(context.WithoutCancel(ctx), s.conf.Paths.History, began, func(r history.Record) { counts[r.Verdict]++ })
	if err != nil {
		s.trouble("earlier lives not counted", err, nil)
		return sum
	}
	sum.Counts, sum.Took = counts, time.Since(began)
	return sum
}

// life runs one gateway that is open. It returns the new configuration if a
// reload ended it.
func (s *supervisor) life(ctx context.Context, hup <-chan os.Signal) (*conf.Config, gateway.Summary, error) {
	defer s.close()
	run, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	served := make(chan error, 1)
	if s.opts.dryRun {
		served = nil
	} else {
		go func() { served <- control.Serve(run, s.conf.Paths.Control, s) }()
	}
	type ended struct {
		sum gateway.Summary
		err error
	}
	done := make(chan ended, 1)
	go func() {
		sum, err := s.gate.Run(run)
		done <- ended{sum, err}
	}()
	s.say("READY=1\nSTATUS=taking mail")
	go s.watch(run)
	go s.purgeDaily(run)
	defer s.deliver(run)()
	var next *conf.Config
	for {
		select {
		case e := <-done:
			if ctx.Err() != nil {
				s.say("STOPPING=1")
			}
			return next, e.sum, e.err
		case err := <-served:
			if err != nil {
				stop(err)
				e := <-done
				return nil, e.sum, errors.Join(err, e.err)
			}
		case <-hup:
			if c := s.reload(ctx); c != nil { // a bad one takes nothing back
				next = c
				stop(gateway.ErrReload)
			}
		}
	}
}

func (s *supervisor) say(state string) {
	if err := s.notify.Send(state); err != nil {
		s.trouble("systemd not told", err, nil)
	}
}

// trouble logs what failed outside the loop.
func (s *supervisor) trouble(what string, err error, f gateway.Fields) {
	logEvent(s.log, gateway.Event{Name: what, Err: err, Trouble: true, Fields: f})
}

// Status adds what the loop does not know.
func (s *supervisor) Status(ctx context.Context) (control.Status, error) {
	st, err := s.gate.Status(ctx)
	st.PID, st.Version, st.Started = os.Getpid(), version, s.started
	st.Loaded = s.loaded
	if why := s.refused.Load(); why != nil {
		st.ReloadRefused = *why
	}
	for k, n := range s.before {
		st.Counts[k] += n
	}
	return st, err
}

// Retry asks the loop.
func (s *supervisor) Retry(ctx context.Context, queue, id string) (int, error) {
	return s.gate.Retry(ctx, queue, id)
}

// Settle asks the loop.
func (s *supervisor) Settle(ctx context.Context, o control.Order) error { return s.gate.Settle(ctx, o) }

// Sources are the files of the configuration in force.
func (s *supervisor) Sources() []conf.Source { return s.conf.Sources() }

// Wake wakes the loop.
func (s *supervisor) Wake() { s.gate.Wake() }

func (s *supervisor) close() {
	for i := len(s.closers) - 1; i >= 0; i-- {
		if err := s.closers[i](); err != nil {
			s.trouble("not closed in order", err, nil)
		}
	}
}

func (s *supervisor) later(f func() error) { s.closers = append(s.closers, f) }

// open opens everything in the order in which a failure is cheapest.
func (s *supervisor) open(ctx context.Context) error {
	c := s.conf
	var out io.Writer = s.g.err
	if s.opts.drain {
		s.bar = progress.New(s.g.err, "messages")
		out = clearing{s.bar, s.g.err}
	}
	var err error
	if s.log, err = newLogger(c.Log, out); err != nil {
		return err
	}
	if s.opts.dryRun {
		if err := s.throwAway(); err != nil {
			return err
		}
		c = s.conf
	}
	if err := makeState(c); err != nil {
		return err
	}
	if err := s.lockAll(ctx); err != nil {
		return err
	}
	led, err := ledger.Open(ctx, c.Paths.Ledger, guard, func(e ledger.Event) {
		s.trouble("damaged ledger moved aside", e.Err, gateway.Fields{"moved": e.Moved})
	})
	if err != nil {
		return err
	}
	s.later(led.Close)
	led.Age = c.Ledger.Age
	token, err := installationToken(filepath.Join(c.State, "token"), led)
	if err != nil {
		return err
	}
	store, err := quarantine.New(c.Paths.Quarantine, nil)
	if err != nil {
		return err
	}
	queues, err := makeQueues(ctx, c, queueParts{store: store, token: token, notes: led, report: func(e gateway.Event) { logEvent(s.log, e) }})
	if err != nil {
		return err
	}
	rec, last, err := recorder.Open(filepath.Join(c.State, "recorder"))
	if err != nil {
		return err
	}
	s.later(rec.Close)
	return s.build(ctx, parts{led, store, queues, rec, last})
}

// lockAll takes the locks by which two daemons never work on one state
// directory or one queue, before anything in them is opened: what the first
// one has open is not damaged. A dry run changes neither.
func (s *supervisor) lockAll(ctx context.Context) error {
	if s.opts.dryRun {
		return nil
	}
	var state inode.Dirs
	s.later(func() error { state.Close(); return nil })
	if err := state.Hold(s.conf.State); err != nil {
		return fmt.Errorf("state directory %w", err)
	}
	queues, err := makeQueues(ctx, s.conf, lookingOnly)
	if err != nil {
		return err
	}
	for _, q := range queues {
		s.later(func() error { q.Close(); return nil })
		if err := q.HoldDirs(); err != nil {
			return fmt.Errorf("queue directory %w", err)
		}
	}
	return nil
}

type parts struct {
	ledger *ledger.Ledger
	store  *quarantine.Store
	queues []mtaQueue
	rec    *recorder.Recorder
	last   recorder.Last
}

func (s *supervisor) build(ctx context.Context, p parts) error {
	c := s.conf
	killed, err := proc.KillLeftovers(runDir(c))
	if err != nil {
		return err
	}
	for _, what := range killed {
		logEvent(s.log, gateway.Event{Name: gateway.EventSwept, Fields: gateway.Fields{"killed": what}})
	}
	hist := &history.Writer{Dir: c.Paths.History}
	s.later(hist.Close)
	starter := proc.NewStarter()
	s.later(func() error { starter.Close(); return nil })
	uid, gid, err := workerUser(c)
	if err != nil {
		return err
	}
	d := gateway.Deps{
		Settings: s.settings(), Store: p.store, Ledger: p.ledger, Recorder: p.rec, History: hist,
		Evidence: evidence.Dir{Root: c.Paths.Evidence}, Holds: holdsOf(s.read), Now: time.Now, Beat: func() { s.beaten.Store(time.Now().UnixNano()) },
		Report: func(e gateway.Event) { logEvent(s.log, e) },
		Canary: func(ctx context.Context) error { return supervisorCanary(ctx, c) },
		Runner: &gateway.Workers{
			Path: "/proc/self/exe", Args: []string{childWorker}, Starter: starter, UID: uid, GID: gid, RunDir: runDir(c),
			MoreMemory: int64(c.Limits.MemoryRetry), CPU: c.Limits.CPU, Wall: c.Limits.Wall, Build: version,
			Settings: wire.Settings{
				BestEffort: c.Sandbox == conf.SandboxBestEffort, Memory: int64(c.Limits.Memory), FileSize: int64(c.Limits.FileSize),
				Parts: c.Limits.Parts, Depth: c.Limits.Depth, Header: int64(c.Limits.Header), Decoded: int64(c.Limits.Decoded),
			},
		},
	}
	if s.bar != nil {
		d.Progress = func(done, total int) { s.bar.Set(done, total, "") }
	}
	for _, q := range p.queues {
		d.Queues = append(d.Queues, q)
	}
	if err := s.openOutbox(&d); err != nil {
		return err
	}
	s.gate = gateway.New(d)
	return s.gate.Recover(ctx, p.last, keeper.LastDeath())
}

// openOutbox opens the outbox if somebody wants to be told.
func (s *supervisor) openOutbox(d *gateway.Deps) error {
	n := s.conf.Notify
	if len(n.Command.Words) == 0 || s.opts.dryRun {
		return nil
	}
	box, err := outbox.New(s.conf.Paths.Outbox, nil)
	if err != nil {
		return err
	}
	s.courier = courier.New(courier.Courier{
		Box: box, Command: n.Command.Words, Timeout: n.Timeout, GiveUp: n.GiveUp, Now: time.Now,
		Report: func(err error) { s.trouble("notice not delivered", err, nil) },
	})
	d.Outbox, d.Deliver = box, s.courier.Wake
	return nil
}

// deliver starts the courier; the returned function ends it after what is
// ready had one more chance.
func (s *supervisor) deliver(ctx context.Context) (finish func()) {
	if s.courier == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() { defer close(ended); s.courier.Run(ctx) }()
	return func() {
		cancel()
		<-ended
		last, done := context.WithTimeout(context.WithoutCancel(ctx), s.conf.Shutdown)
		defer done()
		s.courier.Round(last)
	}
}

// purge removes what is kept for long enough.
func (s *supervisor) purge() {
	c := s.conf
	gone, err := evidence.Dir{Root: c.Paths.Evidence}.Purge(time.Now(), c.Keep.Evidence, int64(c.Keep.EvidenceSize))
	days, herr := history.Purge(c.Paths.History, time.Now().Add(-c.Keep.History))
	if err = errors.Join(err, herr); err != nil {
		s.trouble("not purged", err, nil)
	}
	if len(gone)+len(days) > 0 {
		logEvent(s.log, gateway.Event{Name: gateway.EventPurged, Fields: gateway.Fields{"evidence": len(gone), "history_days": len(days)}})
	}
}

func (s *supervisor) settings() gateway.Settings {
	c := s.conf
	st := gateway.Settings{
		BatchMessages: c.Batch.Messages, BatchBytes: int64(c.Batch.Bytes), NewestShare: float64(c.NewestShare),
		Workers: c.Workers.Or(numCPU()), Poll: c.Poll, LedgerAge: c.Ledger.Age, ShutdownTimeout: c.Shutdown,
		MinFree: uint64(c.MinFree), FreeDirs: []string{c.State}, PauseFile: pauseFile(c), Policy: policy(c),
		Monitor: c.Monitor, DryRun: s.opts.dryRun, Drain: s.opts.drain, AlarmAges: []time.Duration{c.Alarm.Warning, c.Alarm.Urgent},
	}
	if c.Paths.Quarantine != "" {
		st.FreeDirs = append(st.FreeDirs, c.Paths.Quarantine)
	}
	return st
}

func policy(c *conf.Config) scan.Policy {
	rule := func(key string, a conf.Action) scan.Rule {
		return scan.Rule{Do: scan.Disposition(a), Source: "policy." + key + ", " + c.Pos("policy."+key)}
	}
	return scan.Policy{
		Infected: rule("infected", c.Policy.Infected), SpamTest: rule("spam_test", c.Policy.SpamTest),
		Incomplete: rule("incomplete", c.Policy.Incomplete), Unscannable: rule("unscannable", c.Policy.Unscannable),
		Convicted: rule("convicted", c.Policy.Convicted), Unchangeable: rule("unchangeable", c.Policy.Unchangeable), MaxMessage: int64(c.Limits.Message),
	}
}

func runDir(c *conf.Config) string { return filepath.Join(c.State, "run") }

// throwAway puts all state of a dry run into a directory that goes with it.
func (s *supervisor) throwAway() error {
	dir, err := os.MkdirTemp("", "holdfast-dry-run-")
	if err != nil {
		return fmt.Errorf("make a throw-away state: %w", err)
	}
	s.later(func() error { return os.RemoveAll(dir) })
	c := *s.conf
	c.State = dir
	c.Paths = conf.Paths{
		Ledger: dir + "/ledger.db", Work: dir + "/work", Outbox: dir + "/outbox", Quarantine: dir + "/quarantine",
		History: dir + "/history", Evidence: dir + "/evidence", Control: dir + "/control.sock",
	}
	s.conf = &c
	return nil
}

// watch tells systemd that all is well, for as long as no turn of the loop
// takes longer than the configured time.
func (s *supervisor) watch(ctx context.Context) {
	every := notify.WatchdogInterval()
	if every == 0 {
		return
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		if time.Since(time.Unix(0, s.beaten.Load())) < s.conf.Watchdog {
			s.say("WATCHDOG=1")
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// purgeDaily keeps what is over from growing: once a day at a quiet hour, and
// never because a life begins, for that may be just after what it should show.
func (s *supervisor) purgeDaily(ctx context.Context) {
	for {
		t := time.NewTimer(time.Until(nextPurge(time.Now())))
		select {
		case <-t.C:
			s.purge()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// nextPurge is half past three in the morning, local time. A fixed hour comes
// however often the configuration is read again.
func nextPurge(now time.Time) time.Time {
	at := time.Date(now.Year(), now.Month(), now.Day(), 3, 30, 0, 0, now.Location())
	if !at.After(now) {
		at = time.Date(now.Year(), now.Month(), now.Day()+1, 3, 30, 0, 0, now.Location())
	}
	return at
}

// guard opens and walks the ledger in a process that may die of it, or never
// end with it. That it could not be started, or is in use, is no damage.
func guard(ctx context.Context, path string) error {
	limited, cancel := context.WithTimeout(ctx, guardTime)
	defer cancel()
	cmd := exec.CommandContext(limited, "/proc/self/exe", childGuard, path)
	var out bytes.Buffer
	cmd.Stderr = &out
	err := cmd.Run()
	said := strings.TrimSpace(out.String())
	var ended *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil || !errors.As(err, &ended):
		return fmt.Errorf("looking at it: %w", err)
	case ended.ExitCode() == guardInUse:
		return ledger.ErrInUse
	case ended.ExitCode() == guardCannot:
		return fmt.Errorf("looking at it: %.500s", said)
	}
	return fmt.Errorf("%w: looking at it ended with %w: %.500s", ledger.ErrDamaged, err, said)
}

// workerUser is who workers run as: 0 keeps our own user.
func workerUser(c *conf.Config) (uid, gid int, err error) {
	if os.Geteuid() != 0 {
		return 0, 0, nil
	}
	if uid, err = strconv.Atoi(c.User); err == nil {
		gid = uid
	} else {
		u, err := user.Lookup(c.User)
		if err != nil {
			return 0, 0, fmt.Errorf("the workers' user: %w", err)
		}
		if uid, err = strconv.Atoi(u.Uid); err == nil {
			gid, err = strconv.Atoi(u.Gid)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("the workers' user %s: %w", c.User, err)
		}
	}
	if uid <= 0 {
		return 0, 0, fmt.Errorf("the workers' user %s is root: set user to one that owns nothing", c.User)
	}
	return uid, gid, nil
}

// clearing removes the bar before each line of the log.
type clearing struct {
	bar *progress.Bar
	w   io.Writer
}

func (c clearing) Write(p []byte) (int, error) {
	c.bar.Clear()
	return c.w.Write(p)
}

// supervisorCanary takes a message of our own through what the supervisor
// itself does with one: lock, read, render, decide.
func supervisorCanary(ctx context.Context, c *conf.Config) error {
	dir, err := os.MkdirTemp(c.Paths.Work, "canary-")
	if err != nil {
		return fmt.Errorf("make a canary: %w", err)
	}
	defer os.RemoveAll(dir)
	const control = "V8\nT1\nK0\nN0\nP1\nFbs\nS<canary@holdfast.invalid>\nRPFD:<canary@holdfast.invalid>\nH??Subject: all is well\n.\n"
	for name, text := range map[string]string{"dfcanary": "all is well\n", "qfcanary": control} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("make a canary: %w", err)
		}
	}
	q, err := sendmail.New(sendmail.Config{Name: "canary", In: []string{dir}, Out: []string{dir}, Work: dir, Token: "0000000000000000", RenderInMemory: 1 << 20, Lock: "flock"})
	if err != nil {
		return err
	}
	cl, err := q.Lock(ctx, queue.Entry{ID: queue.ID{Queue: "canary", Dir: dir, Name: "canary"}})
	if err != nil {
		return err
	}
	defer cl.Close()
	env, err := cl.Read(ctx)
	if err != nil {
		return err
	}
	f, err := cl.Render(ctx)
	if err != nil {
		return err
	}
	defer f.Close()
	if v := scan.Decide(policy(c), env, scan.Report{}); v.Disposition != scan.Release {
		return fmt.Errorf("a known good message gets the verdict %s", v.Disposition)
	}
	return nil
}
