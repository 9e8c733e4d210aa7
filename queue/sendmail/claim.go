package sendmail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
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
	in    place
	stats queue.Stats
	qf    *os.File // locked; the lock lives as long as it is open
	df    *os.File // set by Read
	dfIn  string   // path of the data file
	away  bool     // the data file is not where its queue directory says (d line)

	control *control
	env     queue.Envelope
	ident   queue.Identity
	decided *marker
	closed  bool
}

// Lock locks a message as sendmail does: open the control file, lock without
// waiting, and see that the name still is the same inode. Reading nothing,
// it records what lstat says (CUSTODY 1.1 and 1.2).
func (q *Queue) Lock(_ context.Context, e queue.Entry) (queue.Claim, error) {
	if !validID(e.ID.Name) {
		return nil, fmt.Errorf("%w: %.60q is no queue id", queue.ErrForeign, e.ID.Name)
	}
	c := &claim{q: q, entry: e, in: at(e.ID.Dir)}
	path := c.in.control(e.ID.Name)
	var err error
	if c.stats.Control, err = inode.Lstat(path); err != nil {
		return nil, err
	}
	c.dfIn = c.in.data(e.ID.Name)
	c.stats.Data, err = inode.Lstat(c.dfIn)
	if err != nil && !errors.Is(err, queue.ErrGone) {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, inode.OpenError(path, err)
	}
	c.qf = os.NewFile(uintptr(fd), path)
	if err := c.lock(path); err != nil {
		c.qf.Close()
		return nil, err
	}
	return c, nil
}

func (c *claim) lock(path string) error {
	if err := inode.Lock(c.qf, c.q.Config.Lock); err != nil {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(c.qf.Fd()), &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: path, Err: err}
	}
	now, err := inode.Lstat(path)
	if err != nil {
		return err
	}
	switch {
	case now.Ino != st.Ino || now.Dev != st.Dev || now.Ino != c.stats.Control.Ino:
		return fmt.Errorf("%s: %w: it was replaced while we locked it", path, queue.ErrBusy)
	case st.Size == 0:
		return fmt.Errorf("%s: %w: empty", path, queue.ErrIncomplete)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s: %w: others may write to it (mode %04o), which sendmail refuses", path, queue.ErrDamaged, st.Mode&0o7777)
	}
	return nil
}

func (c *claim) Entry() queue.Entry       { return c.entry }
func (c *claim) Stats() queue.Stats       { return c.stats }
func (c *claim) Identity() queue.Identity { return c.ident }
func (c *claim) Decided() bool            { return c.decided != nil }

// Close unlocks. Nothing else: the lock goes with the descriptor.
func (c *claim) Close() error {
	if c.closed {
		return nil
	}
	c.closed = true
	if c.df != nil {
		c.df.Close()
	}
	return c.qf.Close()
}

// Read reads the control file, bounded, and opens the data file. What a
// crash before the decision left of this message is removed here.
func (c *claim) Read(context.Context) (queue.Envelope, error) {
	path := c.in.control(c.entry.ID.Name)
	b, err := io.ReadAll(io.NewSectionReader(c.qf, 0, c.q.MaxControl+1))
	if err != nil {
		return queue.Envelope{}, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > c.q.MaxControl {
		return queue.Envelope{}, fmt.Errorf("%s: %w: larger than %d bytes (limits.control_file)", path, queue.ErrDamaged, c.q.MaxControl)
	}
	if c.control, err = parseControl(b, c.q.MaxRecipients); err != nil {
		return queue.Envelope{}, fmt.Errorf("%s: %w", path, err)
	}
	faultAtRead(b)
	c.env = c.control.envelope()
	if err := c.recognise(); err != nil {
		return c.env, err
	}
	// A decided message may have its body among the prepared files only.
	if err := c.openData(); err != nil && (c.decided == nil || c.df != nil) {
		return c.env, err
	}
	c.ident = queue.Identity{ID: c.entry.ID, T: c.control.creation(), Ino: c.stats.Data.Ino}
	return c.env, nil
}

// openData opens the body. A message whose body is missing must never
// become visible to a runner: it would deliver "<<< No Message Collected >>>".
func (c *claim) openData() error {
	fd, err := unix.Open(c.dfIn, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		if dir := string(c.control.first('d')); dir != "" {
			if !filepath.IsAbs(dir) {
				return fmt.Errorf("%s: %w: its d line names %.100q, which is no absolute path", c.qf.Name(), queue.ErrDamaged, dir)
			}
			c.away = true
			c.dfIn = at(filepath.Clean(dir)).data(c.entry.ID.Name)
			fd, err = unix.Open(c.dfIn, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: %w: the data file is missing", c.dfIn, queue.ErrDamaged)
	}
	if err != nil {
		return inode.OpenError(c.dfIn, err)
	}
	c.df = os.NewFile(uintptr(fd), c.dfIn)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: c.dfIn, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s: %w: not a regular file", c.dfIn, queue.ErrForeign)
	}
	if c.away {
		c.stats.Data = queue.FileStat{Dev: st.Dev, Ino: st.Ino, Size: st.Size, Mtime: time.Unix(st.Mtim.Unix())}
	} else if st.Ino != c.stats.Data.Ino || st.Dev != c.stats.Data.Dev {
		return fmt.Errorf("%s: %w: another data file than at the claim", c.dfIn, queue.ErrChanged)
	}
	return nil
}

// recognise reads our own traces. A marker counts only while the original
// control file that it names lies beside it: after publication it is inert.
// A prepared control file that was never exchanged is swept, by the inodes
// that it names itself; it needs no token for that, for the original, which it
// names too, is complete.
//
// A marker beside an original that is not clearly ours, because the token was
// lost or the files were copied, is a decision of somebody: taking the message
// for new mail would lose the recipients of its other groups.
func (c *claim) recognise() error {
	beside := c.in.newControl(c.entry.ID.Name, 0)
	st, err := inode.Lstat(beside)
	if errors.Is(err, queue.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	if m, ok := c.control.marker(); ok {
		if m.token == c.q.Token && m.self == c.stats.Control.Ino && m.orig == st.Ino {
			c.decided = &m
			return nil
		}
		return fmt.Errorf("%s: %w: it carries a decision of another installation of Holdfast, or of a copy: give this one that one's token (state/token), or rename %s back over it to have it judged again",
			c.qf.Name(), queue.ErrForeign, beside)
	}
	m, ok := c.q.readMarker(beside)
	if !ok || m.self != st.Ino || m.token != c.q.Token && m.orig != c.stats.Control.Ino {
		return nil // of unknown origin: it is put out of the way when its name is needed
	}
	return c.q.sweepPrepared(c.in, c.entry.ID.Name, m, nil)
}

// readMarker reads the marker of a prepared control file, whoever's it is.
func (q *Queue) readMarker(path string) (marker, bool) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return marker{}, false
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 2*q.MaxControl))
	if err != nil {
		return marker{}, false
	}
	c, err := parseControl(b, q.MaxRecipients)
	if err != nil {
		return marker{}, false
	}
	return c.marker()
}

// Render writes the message into a sealed memfd, or an unnamed file of the
// work area if it is large (CUSTODY 1.5).
func (c *claim) Render(ctx context.Context) (*os.File, error) {
	head := append(c.control.headerBlock(), '\n')
	f, err := render.File(c.q.Work, c.q.RenderInMemory, int64(len(head))+c.stats.Data.Size, func(w io.Writer) error {
		if _, err := w.Write(head); err != nil {
			return err
		}
		_, err := io.Copy(w, &contextReader{ctx, io.NewSectionReader(c.df, 0, 1<<62)})
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
