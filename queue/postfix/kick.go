package postfix

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	triggerIncoming = 'I' // scan incoming (qmgr(8))
	triggerTime     = 5 * time.Second
	triggerTail     = 500 // bytes of a failed command's output that are shown
)

// Kick wakes the queue manager once for all that was released: by its socket
// public/qmgr, as postkick(1) does, or by the configured command. It never
// asks for a flush of the deferred queue.
func (q *Queue) Kick(ctx context.Context, ids []string) error {
	if len(ids) == 0 || q.Trigger != nil && len(q.Trigger) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, triggerTime)
	defer cancel()
	if len(q.Trigger) > 0 {
		cmd := exec.CommandContext(ctx, q.Trigger[0], q.Trigger[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %.*q", q.Trigger[0], err, triggerTail, out)
		}
		return nil
	}
	return trigger(filepath.Join(q.Dir, "public", "qmgr"), triggerIncoming)
}

// trigger writes one request to a service's socket; there is no answer.
func trigger(path string, request byte) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if err == nil {
		_, err = unix.Write(fd, []byte{request})
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s: %w: Postfix is not running; it finds the mail when it starts", path, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
