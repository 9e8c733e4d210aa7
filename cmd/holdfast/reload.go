package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/cmd/holdfast/internal/gateway"
	"holdfast/conf"
	"holdfast/queue/inode"
	"holdfast/queue/quarantine"
)

// reload reads the configuration again. One that is wrong, or that could not
// work here, changes nothing.
func (s *supervisor) reload(ctx context.Context) *conf.Config {
	next, err := s.g.load()
	if err == nil {
		err = s.workable(ctx, next)
	}
	if err != nil {
		logEvent(s.log, gateway.Event{Name: gateway.EventReloadRefused, Err: err})
		why := err.Error()
		s.refused.Store(&why)
		return nil
	}
	return next
}

// workable looks at what a new life would need, while the old one still runs:
// a configuration that cannot work must not end one that does.
func (s *supervisor) workable(ctx context.Context, c *conf.Config) error {
	queues, err := makeQueues(ctx, c, lookingOnly)
	if err != nil {
		return err
	}
	for _, q := range queues {
		if err := q.Passable(); err != nil {
			return fmt.Errorf("queue %s: %w", q.Name(), err)
		}
	}
	if _, _, err := workerUser(c); err != nil {
		return err
	}
	if words := c.Notify.Command.Words; len(words) > 0 {
		if _, err := exec.LookPath(words[0]); err != nil {
			return fmt.Errorf("notify: %w", err)
		}
	}
	if s.opts.dryRun {
		return nil
	}
	return s.stateReady(c)
}

// stateReady makes the directories of a configuration, and sees that they can
// be written and are nobody else's.
func (s *supervisor) stateReady(c *conf.Config) error {
	if err := makeState(c); err != nil {
		return err
	}
	if err := unix.Access(c.State, unix.W_OK); err != nil {
		return fmt.Errorf("state directory: %w", &os.PathError{Op: "write to", Path: c.State, Err: err})
	}
	if _, err := quarantine.New(c.Paths.Quarantine, nil); err != nil {
		return err
	}
	if c.State == s.read.State {
		return nil
	}
	var d inode.Dirs
	defer d.Close()
	if err := d.Hold(c.State); err != nil {
		return fmt.Errorf("state directory %w", err)
	}
	return nil
}

// makeState makes the directories that a life works in.
func makeState(c *conf.Config) error {
	for _, dir := range []string{c.State, c.Paths.Work, c.Paths.Outbox, c.Paths.Evidence, c.Paths.History, runDir(c)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
	}
	return nil
}

// next is the supervisor of a configuration that takes this one's place.
func (s *supervisor) next(c *conf.Config) *supervisor {
	return &supervisor{g: s.g, opts: s.opts, read: c, conf: c, started: s.started, before: s.before, notify: s.notify}
}

// again is a supervisor of the same configuration, after one that was to take
// its place could not be opened.
func (s *supervisor) again(why error) *supervisor {
	logEvent(s.log, gateway.Event{Name: gateway.EventReloadFailed, Err: why, Fields: gateway.Fields{"now": "the old configuration is used again"}})
	a := s.next(s.read)
	a.loaded = s.loaded
	text := why.Error()
	a.refused.Store(&text)
	return a
}

// describe says what this life is, for the log.
func (s *supervisor) describe() gateway.Fields {
	c := s.read
	var queues []string
	for i := range c.Queues {
		q := &c.Queues[i]
		if q.Type == conf.Postfix {
			queues = append(queues, fmt.Sprintf("%s: %s", q.Name, q.Dir))
			continue
		}
		queues = append(queues, fmt.Sprintf("%s: %s to %s", q.Name, strings.Join(q.In, " "), strings.Join(q.Out, " ")))
	}
	f := gateway.Fields{"version": version, "pid": os.Getpid(), "config": s.g.config, "queues": queues, "workers": c.Workers.Or(numCPU())}
	for name, on := range map[string]bool{"monitor": c.Monitor, "dry_run": s.opts.dryRun, "drain": s.opts.drain} {
		if on {
			f[name] = true
		}
	}
	return f
}
