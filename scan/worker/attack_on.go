//go:build faults

package worker

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"holdfast/scan/wire"
)

// exitAttack is how a worker ends that could do what it must not.
const exitAttack = 99

// attack tries one thing that no parser needs, and stamps that it was
// refused. If it was not, the worker ends in a way that nobody can miss.
func (w *worker) attack(name string, args []string) {
	do, ok := attacks[name]
	if !ok {
		fmt.Fprintln(os.Stderr, "no such attack:", name)
		os.Exit(exitAttack)
	}
	if err := do(args); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		fmt.Fprintf(os.Stderr, "the attack %s was not refused: %v\n", name, err)
		os.Exit(exitAttack)
	}
	lost(w.stamp("refused-"+name, ""))
}

// attacks get paths and addresses from the message, as an attacker who knows
// the machine would.
var attacks = map[string]func(args []string) error{
	"read-batch":   func([]string) error { return readBatch() },
	"read-message": func(a []string) error { return tryOpen(a[0], unix.O_RDONLY) },
	"read-parent": func([]string) error {
		return tryOpen(fmt.Sprintf("/proc/%d/fd", os.Getppid()), unix.O_RDONLY|unix.O_DIRECTORY)
	},
	"read-memory":  func([]string) error { return tryOpen(fmt.Sprintf("/proc/%d/mem", os.Getppid()), unix.O_RDWR) },
	"read-passwd":  func([]string) error { return tryOpen("/etc/passwd", unix.O_RDONLY) },
	"write-queue":  func(a []string) error { return tryOpen(a[0], unix.O_WRONLY|unix.O_CREAT) },
	"link-queue":   func(a []string) error { return unix.Link(a[0], a[1]) },
	"remove-queue": func(a []string) error { return unix.Unlink(a[0]) },
	"rename-queue": func(a []string) error { return unix.Rename(a[0], a[1]) },
	"connect-tcp": func(a []string) error {
		port, err := strconv.Atoi(a[0])
		if err != nil {
			return err
		}
		return connect(unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	},
	"connect-unix": func(a []string) error { return connect(unix.AF_UNIX, &unix.SockaddrUnix{Name: a[0]}) },
	"exec":         func([]string) error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"fork": func([]string) error {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return errno
		}
		if pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
		}
		return nil
	},
	"ptrace": func([]string) error { return unix.PtraceSeize(os.Getppid()) },
	"signal": func([]string) error { return unix.Kill(os.Getppid(), unix.SIGKILL) },
	"chmod":  func(a []string) error { return unix.Chmod(a[0], 0o4777) },
	"chown":  func(a []string) error { return unix.Lchown(a[0], os.Getuid(), os.Getgid()) },
	"flock": func([]string) error {
		return anyHeld(func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	},
	"lock": func([]string) error {
		return anyHeld(func(fd int) error {
			return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
		})
	},
	"truncate": func(a []string) error { return unix.Truncate(a[0], 0) },
	"setxattr": func(a []string) error { return unix.Setxattr(a[0], "user.x", []byte("x"), 0) },
	"mount":    func(a []string) error { return unix.Mount("tmpfs", a[0], "tmpfs", 0, "") },
	"unshare":  func([]string) error { return unix.Unshare(unix.CLONE_NEWUSER | unix.CLONE_NEWNS) },
}

func tryOpen(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func connect(family int, to unix.Sockaddr) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, to)
}

const maxFD = 256

// held lists the open files of this process that are messages, not what it
// was started with, nor the files of its own control group, which Go's runtime
// reads to know its share of the processors.
func held() (fds []int) {
	for fd := CrashFD + 1; fd < maxFD; fd++ {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		var fs unix.Statfs_t
		if err := unix.Fstatfs(fd, &fs); err == nil && (fs.Type == unix.CGROUP_SUPER_MAGIC || fs.Type == unix.CGROUP2_SUPER_MAGIC) {
			continue
		}
		fds = append(fds, fd)
	}
	return fds
}

// readBatch looks for a message of the batch besides the one in hand: among
// the open files, and in what the supervisor may have sent ahead.
func readBatch() error {
	if n := len(held()); n != 1 {
		return fmt.Errorf("%d files are open, and one message is in hand", n)
	}
	n, _, _, _, err := unix.Recvmsg(ConnFD, make([]byte, wire.MaxFrame), make([]byte, unix.CmsgSpace(4)), unix.MSG_DONTWAIT)
	if !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("%d bytes were sent ahead, %v", n, err)
	}
	return unix.EPERM
}

// anyHeld does something to the message in hand.
func anyHeld(do func(fd int) error) error {
	for _, fd := range held() {
		return do(fd)
	}
	return errors.New("no message is in hand")
}
