// Package courier carries out what is ready in the outbox: so far, it tells a
// program of the operator's of each message that was kept back.
package courier

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue/outbox"
)

// Notify is the kind of effect that goes to the operator's program.
const Notify = "notify"

// Notice is what the program gets on standard input.
type Notice struct {
	ID         string   `json:"id"` // the same when it is told again
	Queue      string   `json:"queue"`
	QueueID    string   `json:"queue_id"`
	Item       string   `json:"item"` // in the quarantine
	From       string   `json:"from"`
	Recipients []string `json:"recipients"` // the first MaxRecipients
	MessageID  string   `json:"message_id"`
	Verdict    string   `json:"verdict"`
	Reasons    []string `json:"reasons"`
}

// MaxRecipients bounds a notice.
const MaxRecipients = 100

// Courier delivers. Report is told of what could not be done.
type Courier struct {
	Box     *outbox.Box
	Command []string
	Timeout time.Duration // for one run of the program
	GiveUp  time.Duration // age at which a notice is given up
	Report  func(error)
	Now     func() time.Time

	wake chan struct{}
}

const (
	idle        = time.Minute // between looks without a wake
	firstPause  = time.Second
	longPause   = 5 * time.Minute
	maxFailures = 3 // in a row end a round: the program is down
	maxOutput   = 500
)

// New makes a courier.
func New(c Courier) *Courier {
	c.wake = make(chan struct{}, 1)
	return &c
}

// Wake says that something is ready. It never blocks.
func (c *Courier) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run delivers until ctx ends. After a failure it waits longer each time.
func (c *Courier) Run(ctx context.Context) {
	pause := firstPause
	for {
		wait := idle
		if c.Round(ctx) {
			pause = firstPause
		} else {
			wait = pause
			pause = min(2*pause, longPause)
		}
		t := time.NewTimer(wait)
		wake := c.wake
		if wait != idle {
			wake = nil // new notices do not hurry a program that is down
		}
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-wake:
		case <-t.C:
		}
		t.Stop()
	}
}

// Round tries to deliver what is ready, and reports whether all of it went.
func (c *Courier) Round(ctx context.Context) bool {
	failures, well := 0, true
	_, err := c.Box.Deliver(ctx, func(ctx context.Context, e outbox.Effect) error {
		if failures >= maxFailures {
			well = false
			return errDown
		}
		err := c.deliver(ctx, e)
		if err == nil {
			failures = 0
			return nil
		}
		if ctx.Err() != nil {
			return err // stopped, not refused
		}
		failures++
		well = false
		if age := c.Now().Sub(e.When); age > c.GiveUp {
			c.Report(fmt.Errorf("gave up telling of %s after %s: %w", e.Identity.ID, age.Round(time.Second), err))
			return nil
		}
		c.Report(fmt.Errorf("tell of %s, to be tried again: %w", e.Identity.ID, err))
		return err
	}, c.Report)
	if err != nil && ctx.Err() == nil {
		c.Report(err)
		return false
	}
	return well
}

var errDown = errors.New("the program is down")

// deliver runs the program once. It and what it starts are killed when it
// takes too long, and then it will be told again. A stop waits for it: it may
// have taken the notice already.
func (c *Courier) deliver(ctx context.Context, e outbox.Effect) error {
	var n Notice
	if err := json.Unmarshal(e.Data, &n); err != nil {
		return fmt.Errorf("read a notice: %w", err)
	}
	n.ID = e.ID()
	text, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("write a notice: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Command[0], c.Command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second // for pipes that a grandchild holds open
	cmd.Stdin = bytes.NewReader(append(text, '\n'))
	out := &head{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("%s: %w: %q", c.Command[0], err, out.b)
	}
	return nil
}

// head keeps the first bytes of a program's output.
type head struct{ b []byte }

func (h *head) Write(p []byte) (int, error) {
	h.b = append(h.b, p[:min(len(p), maxOutput-len(h.b))]...)
	return len(p), nil
}
