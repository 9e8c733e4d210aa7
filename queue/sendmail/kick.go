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
// mail: Kick does not wait for it, and its failure is reported as an event.
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
	if !k.running {
		k.running = true
		go k.run(q.Config.Kick, q.Work)
	}
	return nil
}

func (k *kicker) run(command []string, work string) {
	for {
		k.mu.Lock()
		n := min(len(k.waiting), maxKickIDs)
		ids := k.waiting[:n:n]
		k.waiting = k.waiting[n:]
		if n == 0 {
			k.running = false
			k.mu.Unlock()
			return
		}
		k.mu.Unlock()
		if err := kickOnce(command, work, ids); err != nil {
			k.report(Event{What: fmt.Sprintf("kick %d messages", len(ids)), Err: err})
		}
	}
}

// kickOnce writes the command's output to an unnamed file, not a pipe: the
// command must survive our death.
func kickOnce(command []string, work string, ids []string) error {
	args := append([]string{}, command[1:]...)
	for _, id := range ids {
		args = append(args, "-qI"+id)
	}
	cmd := exec.Command(command[0], args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	fd, err := unix.Open(work, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("output of %s: %w", command[0], &fs.PathError{Op: "open O_TMPFILE", Path: work, Err: err})
	}
	out := os.NewFile(uintptr(fd), "output")
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		size, serr := out.Seek(0, io.SeekEnd)
		if serr != nil {
			size = 0
		}
		tail := make([]byte, min(size, kickTail))
		if _, rerr := out.ReadAt(tail, size-int64(len(tail))); rerr != nil {
			tail = nil
		}
		return fmt.Errorf("%s: %w: %q", command[0], err, tail)
	}
	return nil
}
