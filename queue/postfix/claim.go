package postfix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/inode"
	"holdfast/queue/render"
)

// claim is one locked message.
type claim struct {
	q     *Queue
	entry queue.Entry
	stats queue.Stats
	f     *os.File // locked; the lock lives as long as it is open

	file    *file
	env     queue.Envelope
	ident   queue.Identity
	decided *plan
	re      *reinjection // decided, by SMTP
	odd     bool         // its file is not understood: Postfix's own program read it
	closed  bool
}

// Lock locks a message: nobody of Postfix locks what is on hold, but the lock
// keeps two of us apart. Reading nothing, it records what lstat says
// (CUSTODY 1.1 and 1.2).
func (q *Queue) Lock(_ context.Context, e queue.Entry) (queue.Claim, error) {
	if !validID(e.ID.Name) {
		return nil, fmt.Errorf("%w: %.60q is no queue id", queue.ErrForeign, e.ID.Name)
	}
	c := &claim{q: q, entry: e}
	path := q.path(holdDir, e.ID.Name)
	var err error
	if c.stats.Control, err = inode.Lstat(path); err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, inode.OpenError(path, err)
	}
	c.f = os.NewFile(uintptr(fd), path)
	if err := c.lock(path); err != nil {
		c.f.Close()
		return nil, err
	}
	return c, nil
}

func (c *claim) lock(path string) error {
	if err := inode.Lock(c.f, "flock"); err != nil {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(c.f.Fd()), &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: path, Err: err}
	}
	now, err := inode.Lstat(path)
	if err != nil {
		return err
	}
	switch {
	case now.Ino != st.Ino || now.Dev != st.Dev || now.Ino != c.stats.Control.Ino:
		return fmt.Errorf("%s: %w: it was replaced while we locked it", path, queue.ErrBusy)
	case st.Mode&complete != complete:
		return fmt.Errorf("%s: %w: its mode is %04o", path, queue.ErrIncomplete, st.Mode&0o7777)
	}
	return nil
}

func (c *claim) Entry() queue.Entry       { return c.entry }
func (c *claim) Stats() queue.Stats       { return c.stats }
func (c *claim) Identity() queue.Identity { return c.ident }
func (c *claim) Decided() bool            { return c.decided != nil || c.re != nil }

// Close unlocks.
func (c *claim) Close() error {
	if c.closed {
		return nil
	}
	c.closed = true
	return c.f.Close()
}

// Read reads the queue file, bounded, and says whether it is ours to touch.
// What a crash before the decision left of this message is removed here.
func (c *claim) Read(ctx context.Context) (queue.Envelope, error) {
	path := c.f.Name()
	var err error
	c.file, err = parse(c.f, c.stats.Control.Size, c.q.MaxControl, c.q.MaxRecipients)
	if errors.Is(err, errSurprise) {
		var oerr error
		if c.file, oerr = c.readOdd(ctx); oerr != nil {
			err = fmt.Errorf("%w; %w", err, oerr)
		} else {
			c.q.Report(Event{ID: c.entry.ID, What: "its queue file is read by postcat, and can only be released as it is, or stay on hold", Err: err})
			c.odd, err = true, nil
		}
	}
	if err != nil {
		return queue.Envelope{}, fmt.Errorf("%s: %w", path, err)
	}
	c.env = c.file.envelope()
	c.ident = queue.Identity{ID: c.entry.ID, T: c.env.Arrived.Unix(), Ino: c.stats.Control.Ino}
	if c.decided, err = c.q.recognise(ctx, c.ident); err != nil || c.decided != nil {
		return c.env, err
	}
	if c.decided = c.q.marked(c); c.decided != nil {
		return c.env, nil
	}
	if c.re = c.q.chosenFor(c.ident); c.re != nil {
		return c.env, nil
	}
	if c.re, err = c.q.copyOf(c); err != nil || c.re != nil {
		return c.env, err
	}
	return c.env, c.heldByPeople(path)
}

// heldByPeople recognises what was put on hold by hand: it has been tried
// before, or we have released it before. It stays there.
func (c *claim) heldByPeople(path string) error {
	if err := c.heldByMilter(path); err != nil {
		return err
	}
	for _, r := range c.file.all() {
		if r.kind == recDone {
			return fmt.Errorf("%s: %w: it is delivered in part, so somebody put it on hold by hand", path, queue.ErrForeign)
		}
	}
	id := c.entry.ID.Name
	if _, err := os.Lstat(c.q.path(deferDir, id)); err == nil {
		return fmt.Errorf("%s: %w: its delivery was tried before, so somebody put it on hold by hand", path, queue.ErrForeign)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if c.q.wasReleased(c.ident) {
		return fmt.Errorf("%s: %w: it was scanned and released before, so somebody put it on hold by hand", path, queue.ErrForeign)
	}
	return nil
}

// heldByMilter recognises what a milter has put on hold, if that is wanted.
func (c *claim) heldByMilter(path string) error {
	if c.q.HeldLog == nil {
		return nil
	}
	known, held, err := c.q.HeldLog.Ask(c.entry.ID.Name)
	switch {
	case err != nil:
		return err
	case held:
		return fmt.Errorf("%s: %w: a milter has put it on hold", path, queue.ErrForeign)
	case !known || time.Since(c.stats.Control.Mtime) < logDelay:
		return fmt.Errorf("%s: %w: Postfix's log does not tell of it yet (milter_held: leave)", path, queue.ErrIncomplete)
	}
	return nil
}

// content is the message as it is, to be read once.
func (c *claim) content() io.Reader { return c.file.content(c.f, c.stats.Control.Size) }

// Render writes the message into a sealed memfd, or an unnamed file of the
// work area if it is large (CUSTODY 1.5).
func (c *claim) Render(ctx context.Context) (*os.File, error) {
	f, err := render.File(c.q.Work, c.q.RenderInMemory, c.stats.Control.Size, func(w io.Writer) error {
		if c.odd {
			return c.writeOdd(ctx, w)
		}
		_, err := io.Copy(w, &contextReader{ctx, c.content()})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("render %s: %w", c.entry.ID, err)
	}
	return f, nil
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
