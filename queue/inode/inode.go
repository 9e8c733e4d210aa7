// Package inode handles the files of a queue by inode, which tells two files of
// one name apart: what a name is, who has it locked, how it is moved or removed
// without touching another's.
package inode

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
)

// Lstat says what a name is, in the form that a ledger keeps. It returns
// queue.ErrGone, and queue.ErrForeign for what is not a regular file.
func Lstat(path string) (queue.FileStat, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return queue.FileStat{}, OpenError(path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return queue.FileStat{}, fmt.Errorf("%s: %w: not a regular file", path, queue.ErrForeign)
	}
	return queue.FileStat{Dev: st.Dev, Ino: st.Ino, Size: st.Size, Mtime: time.Unix(st.Mtim.Unix())}, nil
}

// OpenError turns a failure to open path into an error of the queue.
func OpenError(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s: %w", path, queue.ErrGone)
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%s: %w: a symbolic link", path, queue.ErrForeign)
	}
	return &fs.PathError{Op: "open", Path: path, Err: err}
}

// Lock takes a lock on a whole file without waiting: flock, or ofd for MTAs
// that lock with fcntl. It returns queue.ErrBusy if another has it.
func Lock(f *os.File, kind string) error {
	var err error
	if kind == "ofd" {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
	} else {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EACCES) {
		return queue.ErrBusy
	}
	return err
}

// Dirs are directories that are locked for the life of the process, so that
// two daemons never work on one. The zero value is ready.
type Dirs struct {
	mu   sync.Mutex
	held map[string]*os.File
}

// Hold locks directories; one that is held already stays held. The error
// names who has the lock.
func (d *Dirs) Hold(paths ...string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, path := range paths {
		if d.held[path] != nil {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := Lock(f, "flock"); err != nil {
			f.Close()
			if errors.Is(err, queue.ErrBusy) {
				return fmt.Errorf("%s is in use by another Holdfast%s", path, holder(path))
			}
			return &fs.PathError{Op: "lock", Path: path, Err: err}
		}
		if d.held == nil {
			d.held = map[string]*os.File{}
		}
		d.held[path] = f
	}
	return nil
}

// Close lets go of all.
func (d *Dirs) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.held {
		f.Close()
	}
	d.held = nil
}

// holder looks the holder of a flock up in /proc/locks (proc_locks(5)).
func holder(dir string) string {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return ""
	}
	text, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 5 && f[5] == want {
			return " (process " + f[4] + ")"
		}
	}
	return ""
}
