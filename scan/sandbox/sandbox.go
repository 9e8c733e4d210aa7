// Package sandbox takes every power from the process that calls it, before
// it reads the first hostile byte: no files, no network, no programs, no
// other processes. What it already holds by descriptor stays.
package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// Limits are resource limits, in bytes and seconds; 0 sets none.
type Limits struct {
	Memory     int64 // RLIMIT_DATA; address space is no measure for a Go program
	CPUSeconds int64 // RLIMIT_CPU, a backstop: the supervisor measures itself
	FileSize   int64
}

const (
	maxStack = 64 << 20 // bytes; the default of 1 GB takes seconds to overflow
	maxFiles = 64       // descriptors
)

// Restrict shuts the process in, all of its threads. It returns what could
// not be done on this kernel.
func Restrict(l Limits) error {
	debug.SetMaxStack(maxStack)
	if l.Memory > 0 {
		debug.SetMemoryLimit(l.Memory * 8 / 10) // collect before the hard limit bites
	}
	return errors.Join(limit(l), paths(), calls())
}

func limit(l Limits) error {
	set := func(what int, n uint64) error {
		if n == 0 {
			return nil
		}
		if err := unix.Setrlimit(what, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("set resource limit %d: %w", what, err)
		}
		return nil
	}
	core := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	return errors.Join(core, set(unix.RLIMIT_DATA, uint64(l.Memory)), set(unix.RLIMIT_CPU, uint64(l.CPUSeconds)),
		set(unix.RLIMIT_FSIZE, uint64(l.FileSize)), set(unix.RLIMIT_NOFILE, maxFiles))
}

// paths allows no path at all, and where the kernel can, no TCP port, no
// signal and no abstract socket outside (Landlock, kernel 5.13 and later).
func paths() error {
	if err := landlock.V6.BestEffort().Restrict(); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}

// denied are calls that a parser never needs. What Landlock's version lacks
// is covered here. A deny list: the Go runtime's own calls change.
var denied = []string{
	"execve", "execveat", "fork", "vfork",
	"socket", "socketpair", "connect", "bind", "listen", "accept", "accept4",
	"ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "kcmp",
	"rt_sigqueueinfo", "rt_tgsigqueueinfo", "tkill",
	"mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr",
	"bpf", "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "perf_event_open",
	"add_key", "request_key", "keyctl", "personality", "unshare", "setns", "open_by_handle_at", "name_to_handle_at",
	"chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "fchownat", "lchown",
	"utime", "utimes", "utimensat", "futimesat", "truncate", "ftruncate", "flock", "fallocate",
	"setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
	"sethostname", "setdomainname", "settimeofday", "clock_settime", "adjtimex", "acct", "quotactl", "syslog",
	"setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid", "capset",
	"setpgid", "setsid", "sched_setscheduler", "sched_setattr", "setpriority", "ioprio_set", "vhangup", "mq_open", "shmget", "msgget", "semget",
}

const cloneThread = 0x10000 // CLONE_THREAD

// calls installs the filter for all threads.
func calls() error {
	info, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	known := func(names []string) (out []string) {
		for _, n := range names {
			if _, ok := info.SyscallNames[n]; ok {
				out = append(out, n)
			}
		}
		return out
	}
	self := uint64(os.Getpid())
	conditional := []seccomp.NameWithConditions{
		{Name: "clone", Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.BitsNotSet, Value: cloneThread}}},
		{Name: "kill", Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.NotEqual, Value: self}}},
		{Name: "tgkill", Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.NotEqual, Value: self}}},
	}
	for _, cmd := range []uint64{unix.F_SETLK, unix.F_SETLKW, unix.F_OFD_SETLK, unix.F_OFD_SETLKW, unix.F_SETOWN, unix.F_SETLEASE, unix.F_NOTIFY} {
		conditional = append(conditional, seccomp.NameWithConditions{
			Name: "fcntl", Conditions: seccomp.ArgumentConditions{{Argument: 1, Operation: seccomp.Equal, Value: cmd}},
		})
	}
	filter := seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{
			{Names: known(denied), Action: seccomp.ActionErrno},
			{NamesWithCondtions: conditional, Action: seccomp.ActionErrno},
		},
	}}
	if err := seccomp.LoadFilter(filter); err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	return nil
}

// SelfTest tries what must not work, and returns what did, or could not be
// told. Each attempt is harmless where it is allowed.
func SelfTest() []string {
	var open []string
	refused := func(what string, err error, want ...error) {
		for _, w := range want {
			if errors.Is(err, w) {
				return
			}
		}
		open = append(open, what)
	}
	for what, try := range map[string]func() error{
		"reading files":        func() error { return tryOpen("/etc/passwd", unix.O_RDONLY) },
		"listing directories":  func() error { return tryOpen("/", unix.O_RDONLY|unix.O_DIRECTORY) },
		"writing files":        func() error { return tryOpen("/tmp", unix.O_TMPFILE|unix.O_WRONLY) },
		"reading other memory": func() error { return tryOpen(fmt.Sprintf("/proc/%d/mem", os.Getppid()), unix.O_RDONLY) },
		"sockets":              func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); return err },
		"unix sockets":         func() error { _, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); return err },
		"running programs":     func() error { return unix.Exec("/nonexistent/program", nil, nil) },
		"changing modes":       func() error { return unix.Fchmod(-1, 0) },
		"locking files":        func() error { return unix.Flock(-1, unix.LOCK_UN) },
		"tracing":              func() error { return unix.PtraceAttach(0x7FFFFFFF) },
		"signalling others":    func() error { return unix.Kill(0x7FFFFFFF, 0) },
		"other namespaces":     func() error { return unix.Setns(-1, 0) },
	} {
		refused(what, try(), unix.EPERM, unix.EACCES)
	}
	return open
}

func tryOpen(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err
}
