package postfix

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Requests to the queue manager (qmgr(8)): scan a queue. Never "ignore the
// time stamps", which would retry all deferred mail.
const (
	scanIncoming = "I"
	scanDeferred = "D"
	triggerTime  = 5 * time.Second
)

// Kick wakes the queue manager once for all that was released: by its socket
// public/qmgr, as postkick(1) does, by postkick, or by the configured command.
func (q *Queue) Kick(ctx context.Context, ids []string) error {
	if len(ids) == 0 || q.Trigger != nil && len(q.Trigger) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, triggerTime)
	defer cancel()
	switch {
	case len(q.Trigger) > 0:
		return q.triggerCommand(ctx)
	case q.Release == ByPostsuper: // which moves mail to deferred
		return errors.Join(q.postkick(ctx, scanDeferred), q.postkick(ctx, scanIncoming))
	}
	return trigger(filepath.Join(q.Dir, "public", "qmgr"), scanIncoming)
}

// trigger writes one request to a service's socket; there is no answer.
func trigger(path, request string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if err == nil {
		_, err = unix.Write(fd, []byte(request))
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s: %w: Postfix is not running; it finds the mail when it starts", path, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
