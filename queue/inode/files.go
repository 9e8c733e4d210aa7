package inode

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"holdfast/queue"
	"holdfast/queue/durable"
)

// Files changes names in a queue beside an MTA and an administrator, who may
// replace any of them at any instant: a name is removed or moved only while it
// is the inode that is meant. Report is told of tidying that failed, by which
// nothing is lost.
type Files struct {
	FS     *durable.FS
	Report func(what string, err error)
}

// Remove removes a file of the queue that an administrator may replace at
// any instant: it is set aside, and then removed there.
// ErrGone: the name is another file's, or nobody's.
func (f Files) Remove(path, aside string, ino uint64) error {
	if err := f.SetAside(path, aside, ino); err != nil {
		return err
	}
	// It has left the queue with the rename; under this name it harms nobody.
	if err := f.FS.Unlink(aside); err != nil {
		f.Report("remove "+aside, err)
	}
	return nil
}

// SetAside takes a file out of the queue: it is renamed aside, looked at
// there, and put back if it is not the given inode.
func (f Files) SetAside(path, aside string, ino uint64) error {
	st, err := Lstat(path)
	if err != nil {
		return err
	}
	if st.Ino != ino {
		return fmt.Errorf("%s: %w: another file has its name", path, queue.ErrGone)
	}
	if err := f.free(aside, func() error { return f.FS.Rename(path, aside) }); err != nil {
		return Gone(err)
	}
	if st, err = Lstat(aside); err != nil {
		return err
	}
	if st.Ino != ino {
		if err := f.FS.Rename(aside, path); err != nil {
			return fmt.Errorf("a foreign file was renamed to %s and cannot go back: %w", aside, err)
		}
		return fmt.Errorf("%s: %w: replaced by another file", path, queue.ErrGone)
	}
	return nil
}

// Link gives an open file a name that only we use.
func (f Files) Link(file *os.File, path string) error {
	return f.free(path, func() error { return f.FS.Link(file, path) })
}

// free takes a name that only we use. What has it is a leftover that no journal
// and no marker names any more: it is not ours to remove, and must not stop a
// message, so it is put out of the way, where listings count it.
func (f Files) free(path string, take func() error) error {
	err := take()
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := Lstat(path)
	if err != nil {
		return err
	}
	old := fmt.Sprintf("%s.old-%d", path, st.Ino)
	if err := f.FS.Rename(path, old); err != nil {
		return err
	}
	f.Report("put out of the way", fmt.Errorf("%s is of unknown origin, and is now %s", path, old))
	return take()
}

// Unlink removes a name only while it is the given inode.
func (f Files) Unlink(path string, ino uint64) {
	st, err := Lstat(path)
	if err != nil || st.Ino != ino {
		return
	}
	if err := f.FS.Unlink(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.Report("remove "+path, err)
	}
}

// Move renames a prepared file; one that is missing was moved before.
func (f Files) Move(from, to string, ino uint64) error {
	st, err := Lstat(from)
	if errors.Is(err, queue.ErrGone) || err == nil && st.Ino != ino {
		return nil
	}
	if err != nil {
		return err
	}
	err = f.FS.Rename(from, to)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", to, queue.ErrCollision)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody took it just now: theirs
	}
	if err != nil {
		return err
	}
	if st, err := Lstat(to); err == nil && st.Ino != ino {
		if err := f.FS.Rename(to, from); err != nil {
			return fmt.Errorf("a foreign file was renamed to %s and cannot go back: %w", to, err)
		}
	}
	return nil
}

// Gone turns the error for a name that is not there into queue.ErrGone.
func Gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", queue.ErrGone, err)
	}
	return err
}
