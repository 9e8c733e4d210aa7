// Package durable does every file operation on mail at rest, so that the
// fault harness (queue/durable/fault) can stop, fail or undo each one.
//
// It adds nothing to the system calls but names, errors that say what was
// being done to what, and the hook. Nothing here fsyncs by itself: the order
// of operations belongs to the caller, where it can be read.
//
// Assumption: rename and exchange within one file system are atomic, across
// directories too (ext4, xfs, btrfs).
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Kind names an operation that changes what is on the disk.
type Kind string

// The operations. Reads are not among them: they change nothing.
const (
	Create   Kind = "create"   // Path, new and empty
	TmpFile  Kind = "tmpfile"  // an unnamed file in the directory Path
	Write    Kind = "write"    // Data at offset Off of the file Path
	Own      Kind = "own"      // owner and mode of the file Path
	Fsync    Kind = "fsync"    // the file Path
	FsyncDir Kind = "fsyncdir" // the directory Path
	Link     Kind = "link"     // Path2 becomes a name of File's inode
	Rename   Kind = "rename"   // Path to Path2, which must not exist
	Exchange Kind = "exchange" // Path and Path2 change places
	Unlink   Kind = "unlink"   // Path
	Mkdir    Kind = "mkdir"    // Path
	Rmdir    Kind = "rmdir"    // Path, empty
)

// Op is one operation, as the hook sees it.
type Op struct {
	Kind        Kind
	Path, Path2 string
	Off         int64
	Data        []byte   // Write only; not to be kept or changed
	File        *os.File // the open file for TmpFile (after), Write, Own, Fsync, Link
}

// A Hook sees every operation. Before may refuse it with an error, which the
// caller gets in its place; After is told how it ended.
type Hook interface {
	Before(Op) error
	After(Op, error)
}

// FS does the operations. The zero value and nil work, without a hook.
type FS struct{ Hook Hook }

func (f *FS) do(op Op, act func() error) error {
	if f == nil || f.Hook == nil {
		return act()
	}
	if err := f.Hook.Before(op); err != nil {
		return err
	}
	err := act()
	f.Hook.After(op, err)
	return err
}

// File is a file open for writing.
type File struct {
	f   *os.File
	fs  *FS
	off int64
}

// Create makes a new empty file, open for reading and writing. It never
// opens an existing one.
func (f *FS) Create(path string, perm fs.FileMode) (*File, error) {
	out := &File{fs: f}
	err := f.do(Op{Kind: Create, Path: path}, func() (err error) {
		out.f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, perm)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// TmpFile makes a file without a name in dir, which vanishes unless it is
// linked (open(2), O_TMPFILE).
func (f *FS) TmpFile(dir string, perm fs.FileMode) (*File, error) {
	out := &File{fs: f}
	op := Op{Kind: TmpFile, Path: dir}
	act := func() error {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, uint32(perm.Perm()))
		if err != nil {
			return &fs.PathError{Op: "open O_TMPFILE", Path: dir, Err: err}
		}
		out.f = os.NewFile(uintptr(fd), dir+"/(unnamed)")
		return nil
	}
	if f == nil || f.Hook == nil {
		err := act()
		return out, err
	}
	if err := f.Hook.Before(op); err != nil {
		return nil, err
	}
	err := act()
	op.File = out.f
	f.Hook.After(op, err)
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Write appends at the file's own offset.
func (w *File) Write(p []byte) (int, error) {
	n := 0
	err := w.fs.do(Op{Kind: Write, Path: w.f.Name(), Off: w.off, Data: p, File: w.f}, func() (err error) {
		n, err = w.f.WriteAt(p, w.off)
		return err
	})
	w.off += int64(n)
	return n, err
}

// Overwrite writes at the given offset, within what was written.
func (w *File) Overwrite(p []byte, off int64) error {
	return w.fs.do(Op{Kind: Write, Path: w.f.Name(), Off: off, Data: p, File: w.f}, func() error {
		_, err := w.f.WriteAt(p, off)
		return err
	})
}

// ReadAt reads what was written.
func (w *File) ReadAt(p []byte, off int64) (int, error) { return w.f.ReadAt(p, off) }

// Size is the number of bytes written.
func (w *File) Size() int64 { return w.off }

// Own sets owner, group and permission bits. -1 leaves the owner or group.
func (w *File) Own(uid, gid int, perm fs.FileMode) error {
	return w.fs.do(Op{Kind: Own, Path: w.f.Name(), File: w.f}, func() error {
		if err := w.f.Chown(uid, gid); err != nil {
			return err
		}
		return w.f.Chmod(perm)
	})
}

// Fsync makes the content durable, not the name.
func (w *File) Fsync() error {
	return w.fs.do(Op{Kind: Fsync, Path: w.f.Name(), File: w.f}, w.f.Sync)
}

// OS returns the open file, for stat and lock.
func (w *File) OS() *os.File { return w.f }

// Close closes the descriptor. Nothing is flushed.
func (w *File) Close() error { return w.f.Close() }

// FsyncDir makes the names in a directory durable.
func (f *FS) FsyncDir(dir string) error {
	return f.do(Op{Kind: FsyncDir, Path: dir}, func() error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Sync()
	})
}

// Link gives the inode of an open file a further name, or an unnamed one its
// first. It fails with fs.ErrExist if path exists.
func (f *FS) Link(file *os.File, path string) error {
	return f.do(Op{Kind: Link, Path: file.Name(), Path2: path, File: file}, func() error {
		src := "/proc/self/fd/" + strconv.Itoa(int(file.Fd()))
		if err := unix.Linkat(unix.AT_FDCWD, src, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
			return &os.LinkError{Op: "link", Old: file.Name(), New: path, Err: err}
		}
		return nil
	})
}

// Rename moves a name. It fails with fs.ErrExist if the new name exists.
func (f *FS) Rename(from, to string) error {
	return f.do(Op{Kind: Rename, Path: from, Path2: to}, func() error {
		return renameat2(from, to, unix.RENAME_NOREPLACE, "rename")
	})
}

// Exchange swaps two names, both of which must exist.
func (f *FS) Exchange(a, b string) error {
	return f.do(Op{Kind: Exchange, Path: a, Path2: b}, func() error {
		return renameat2(a, b, unix.RENAME_EXCHANGE, "exchange")
	})
}

func renameat2(from, to string, flags uint, what string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags); err != nil {
		return &os.LinkError{Op: what, Old: from, New: to, Err: err}
	}
	return nil
}

// Unlink removes a name of a file.
func (f *FS) Unlink(path string) error {
	return f.do(Op{Kind: Unlink, Path: path}, func() error {
		if err := unix.Unlink(path); err != nil {
			return &fs.PathError{Op: "unlink", Path: path, Err: err}
		}
		return nil
	})
}

// Mkdir makes a directory; its parent must exist.
func (f *FS) Mkdir(path string, perm fs.FileMode) error {
	return f.do(Op{Kind: Mkdir, Path: path}, func() error { return os.Mkdir(path, perm) })
}

// OwnDir gives a directory to an owner and group.
func (f *FS) OwnDir(path string, uid, gid int) error {
	return f.do(Op{Kind: Own, Path: path}, func() error { return os.Lchown(path, uid, gid) })
}

// Rmdir removes an empty directory.
func (f *FS) Rmdir(path string) error {
	return f.do(Op{Kind: Rmdir, Path: path}, func() error {
		if err := unix.Rmdir(path); err != nil {
			return &fs.PathError{Op: "rmdir", Path: path, Err: err}
		}
		return nil
	})
}

// MkdirAll makes a directory and what is missing above it, and fsyncs each
// parent in which it made a name.
func (f *FS) MkdirAll(path string, perm fs.FileMode) error {
	st, err := os.Stat(path)
	if err == nil {
		if !st.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: path, Err: unix.ENOTDIR}
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(path)
	if err := f.MkdirAll(parent, perm); err != nil {
		return err
	}
	if err := f.Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return f.FsyncDir(parent)
}

// WriteFile puts a complete, durable file in place under a name that must
// not exist: unnamed file, write, fsync, link, fsync of the directory. After
// a crash the name is there with all of its content, or not at all.
func (f *FS) WriteFile(path string, perm fs.FileMode, content func(io.Writer) error) error {
	dir := filepath.Dir(path)
	t, err := f.TmpFile(dir, perm)
	if err != nil {
		return fmt.Errorf("prepare %s: %w", path, err)
	}
	defer t.Close()
	if err := content(t); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := t.Fsync(); err != nil {
		return fmt.Errorf("fsync %s: %w", path, err)
	}
	if err := f.Link(t.f, path); err != nil {
		return err
	}
	return f.FsyncDir(dir)
}

// ReplaceFile is WriteFile for a name that may exist: the new content is
// linked beside it and exchanged with it, so that one of the two contents
// is there at every instant.
func (f *FS) ReplaceFile(path string, perm fs.FileMode, content func(io.Writer) error) error {
	err := f.WriteFile(path, perm, content)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	beside := path + ".new"
	if err := f.Unlink(beside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := f.WriteFile(beside, perm, content); err != nil {
		return err
	}
	if err := f.Exchange(beside, path); err != nil {
		return err
	}
	if err := f.FsyncDir(filepath.Dir(path)); err != nil {
		return err
	}
	return f.Unlink(beside)
}
