package sendmail

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	maxKickIDs  = 500   // ids per call, well below the length of a command line
	maxKickWait = 20000 // ids that wait for a running call; the MTA's own runs find the rest
	kickTail    = 2048  // bytes of a failed call's output that are shown
)

// kicker runs one delivery command at a time and collects ids meanwhile.
type kicker struct {
	mu      sync.Mutex
	waiting []string
	running bool
	report  func(Event)
}

// Kick asks the MTA to deliver messages now (reference: A6). The command
// runs in a session of its own and is never killed by us, since it delivers
// mail. When Kick returns it has started, so that a command of ours may end;
// nobody waits for its end, and its failure is reported as an event.
func (q *Queue) Kick(_ context.Context, ids []string) error {
	if len(q.Config.Kick) == 0 || len(ids) == 0 {
		return nil
	}
	k := &q.kicks
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.waiting)+len(ids) > maxKickWait {
		return fmt.Errorf("%d messages wait for the MTA's own queue run: kicks are slower than releases", len(ids))
	}
	k.waiting = append(k.waiting, ids...)
	if k.running {
		return nil
	}
	first, err := k.start(q.Config.Kick, q.Work)
	if err != nil {
		return err
	}
	k.running = true
	go k.run(first, q.Config.Kick, q.Work)
	return nil
}

// run waits for a call, and makes the next with what has come meanwhile.
func (k *kicker) run(c *call, command []string, work string) {
	for c != nil {
		if err := c.wait(); err != nil {
			k.report(Event{What: fmt.Sprintf("kick %d messages", c.ids), Err: err})
		}
		c = k.next(command, work)
	}
}

// next starts the next call; nil if nothing waits.
func (k *kicker) next(command []string, work string) *call {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.waiting) > 0 {
		c, err := k.start(command, work)
		if err == nil {
			return c
		}
		k.report(Event{What: "kick", Err: err})
	}
	k.running = false
	return nil
}

// call is one run of the command.
type call struct {
	cmd *exec.Cmd
	out *os.File
	ids int
}

// start starts the command for the first of the waiting ids. It writes its
// output to an unnamed file, not a pipe: the command must survive our death.
func (k *kicker) start(command []string, work string) (*call, error) {
	n := min(len(k.waiting), maxKickIDs)
	args := append([]string{}, command[1:]...)
	for _, id := range k.waiting[:n] {
		args = append(args, "-qI"+id)
	}
	k.waiting = k.waiting[n:]
	cmd := exec.Command(command[0], args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	fd, err := unix.Open(work, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("output of %s: %w", command[0], &fs.PathError{Op: "open O_TMPFILE", Path: work, Err: err})
	}
	out := os.NewFile(uintptr(fd), "output")
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		out.Close()
		return nil, err
	}
	return &call{cmd, out, n}, nil
}

// wait waits for the command's end; a failed one's last words are told.
func (c *call) wait() error {
	defer c.out.Close()
	err := c.cmd.Wait()
	if err == nil {
		return nil
	}
	size, serr := c.out.Seek(0, io.SeekEnd)
	if serr != nil {
		size = 0
	}
	tail := make([]byte, min(size, kickTail))
	if _, rerr := c.out.ReadAt(tail, size-int64(len(tail))); rerr != nil {
		tail = nil
	}
	return fmt.Errorf("%s: %w: %q", c.cmd.Path, err, tail)
}
