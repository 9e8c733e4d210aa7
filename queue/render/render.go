// Package render makes the one copy of a message that workers, scanners and
// rewriting see: sealed memory, or an unnamed file that they cannot write
// (CUSTODY 1.5). No inode of a queue ever leaves the queue packages.
package render

import (
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// File renders what write produces, about size bytes: in memory up to limit,
// otherwise in the directory work. The caller closes it.
func File(work string, limit, size int64, write func(io.Writer) error) (*os.File, error) {
	if size <= limit {
		return inMemory(write)
	}
	fd, err := unix.Open(work, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o400)
	if err != nil {
		return nil, &fs.PathError{Op: "open O_TMPFILE", Path: work, Err: err}
	}
	f := os.NewFile(uintptr(fd), "message")
	defer f.Close()
	if err := write(f); err != nil {
		return nil, err
	}
	// An unnamed file cannot be sealed: what a worker gets is opened anew.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open the rendered message for reading: %w", err)
	}
	return ro, nil
}

func inMemory(write func(io.Writer) error) (*os.File, error) {
	fd, err := unix.MemfdCreate("message", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "message")
	if err = write(f); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
