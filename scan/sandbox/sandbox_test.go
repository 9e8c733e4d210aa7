package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The attacks run in a process of their own: this test program, started
// again. Its exit code says how the attack went.
const (
	attackEnv = "HOLDFAST_TEST_ATTACK"
	shutInEnv = "HOLDFAST_TEST_SHUT_IN"
	greedyEnv = "HOLDFAST_TEST_GREEDY"
	succeeded = 40
	refused   = 41
	odd       = 42

	heldFD = 3 // the message that the worker holds, open for reading
)

func TestMain(m *testing.M) {
	if name := os.Getenv(attackEnv); name != "" {
		os.Exit(attack(name, os.Getenv(shutInEnv) != ""))
	}
	if g, ok := greedy[os.Getenv(greedyEnv)]; ok {
		if err := Restrict(g.limits); err != nil {
			fmt.Println("restrict:", err)
			os.Exit(odd)
		}
		g.up()
		os.Exit(succeeded)
	}
	os.Exit(m.Run())
}

func attack(name string, shutIn bool) int {
	if shutIn {
		if err := Restrict(Limits{Memory: 1 << 30, CPUSeconds: 60, FileSize: 1 << 20}); err != nil {
			fmt.Println("restrict:", err)
			return odd
		}
	}
	err := attacks[name](os.Getenv("DIR"))
	switch {
	case err == nil:
		return succeeded
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return refused
	}
	fmt.Println(err)
	return odd
}

func target() int {
	pid, err := strconv.Atoi(os.Getenv("TARGET"))
	if err != nil {
		panic(err)
	}
	return pid
}

func open(path string, flags int) error {
	fd, err := unix.Open(path, flags, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func dial(network, address string) error {
	c, err := net.Dial(network, address)
	if err == nil {
		c.Close()
	}
	return err
}

// attacks are tries to do what no parser needs. Each works outside.
var attacks = map[string]func(dir string) error{
	"read another message":     func(dir string) error { return open(dir+"/queue/dfOTHER", unix.O_RDONLY) },
	"read /etc/passwd":         func(string) error { return open("/etc/passwd", unix.O_RDONLY) },
	"list the queue":           func(dir string) error { return open(dir+"/queue", unix.O_RDONLY|unix.O_DIRECTORY) },
	"write a queue file":       func(dir string) error { return open(dir+"/queue/qfNEW", unix.O_WRONLY|unix.O_CREAT) },
	"unnamed file":             func(dir string) error { return open(dir+"/queue", unix.O_WRONLY|unix.O_TMPFILE) },
	"rename a message":         func(dir string) error { return unix.Rename(dir+"/queue/dfOTHER", dir+"/queue/dfMINE") },
	"link a message":           func(dir string) error { return unix.Link(dir+"/queue/dfOTHER", dir+"/queue/dfMINE") },
	"delete a message":         func(dir string) error { return unix.Unlink(dir + "/queue/dfOTHER") },
	"symbolic link":            func(dir string) error { return unix.Symlink("/etc/passwd", dir+"/queue/dfMINE") },
	"make a directory":         func(dir string) error { return unix.Mkdir(dir+"/queue/sub", 0o700) },
	"make a device":            func(dir string) error { return unix.Mknod(dir+"/queue/fifo", unix.S_IFIFO|0o600, 0) },
	"truncate another message": func(dir string) error { return unix.Truncate(dir+"/queue/dfOTHER", 0) },
	"cut the held message":     func(string) error { return writable(func(fd int) error { return unix.Ftruncate(fd, 0) }) },
	"write the held message": func(string) error {
		return writable(func(fd int) error { _, err := unix.Write(fd, []byte("x")); return err })
	},
	"TCP":                func(string) error { return dial("tcp", os.Getenv("TCP")) },
	"UDP":                func(string) error { return dial("udp", "127.0.0.1:9") },
	"the control socket": func(dir string) error { return dial("unix", dir+"/control.sock") },
	"listen": func(string) error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			l.Close()
		}
		return err
	},
	"run a program": func(string) error {
		return unix.Exec("/bin/sh", []string{"sh", "-c", fmt.Sprintf("exit %d", succeeded)}, nil)
	},
	"run a program by an open file": func(string) error {
		return exec.Command("/bin/true").Run()
	},
	"fork": func(string) error {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return errno
		}
		if pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
		}
		return nil
	},
	"trace a process":  func(string) error { return unix.PtraceSeize(target()) },
	"read its memory":  func(string) error { return open(fmt.Sprintf("/proc/%d/mem", target()), unix.O_RDWR) },
	"read its files":   func(string) error { return open(fmt.Sprintf("/proc/%d/environ", target()), unix.O_RDONLY) },
	"signal it":        func(string) error { return unix.Kill(target(), unix.SIGCONT) },
	"signal a group":   func(string) error { return unix.Kill(-target(), unix.SIGCONT) },
	"signal by number": func(string) error { return unix.Tgkill(target(), target(), unix.SIGCONT) },
	"take its descriptors": func(string) error {
		fd, err := unix.PidfdOpen(target(), 0)
		if err != nil {
			return err
		}
		_, err = unix.PidfdGetfd(fd, 0, 0)
		return err
	},
	"chmod":               func(dir string) error { return unix.Chmod(dir+"/queue/dfOTHER", 0o666) },
	"chmod what it holds": func(string) error { return unix.Fchmod(heldFD, 0o666) },
	"chown":               func(dir string) error { return unix.Lchown(dir+"/queue/dfOTHER", os.Getuid(), os.Getgid()) },
	"times":               func(dir string) error { return unix.Utimes(dir+"/queue/dfOTHER", []unix.Timeval{{}, {}}) },
	"attributes":          func(string) error { return unix.Fsetxattr(heldFD, "user.x", []byte("x"), 0) },
	"flock":               func(string) error { return unix.Flock(heldFD, unix.LOCK_EX) },
	"record lock":         func(string) error { return unix.FcntlFlock(heldFD, unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}) },
	"open file lock": func(string) error {
		return unix.FcntlFlock(heldFD, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
	},
	"io_uring": func(string) error {
		var params [120]byte
		_, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
		return ignoring(errno, unix.ENOSYS)
	},
	"a namespace of its own": func(string) error { return unix.Unshare(unix.CLONE_NEWNS) },
	"mount":                  func(dir string) error { return unix.Mount("tmpfs", dir+"/mnt", "tmpfs", 0, "") },
	"another user": func(string) error {
		_, _, errno := unix.RawSyscall(unix.SYS_SETUID, 65534, 0, 0)
		return ignoring(errno, 0)
	},
	"change directory": func(dir string) error { return open(".", unix.O_RDONLY|unix.O_DIRECTORY) },
}

// writable reopens the descriptor by its name under /proc, the classic way
// around an open mode.
func writable(use func(fd int) error) error {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", heldFD), unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return use(fd)
}

func ignoring(errno, but unix.Errno) error {
	if errno == 0 || errno == but {
		return nil
	}
	return errno
}

// TestAttacksFromInside runs every attack twice: outside it works, so the try
// is a real one, and inside it is refused.
func TestAttacksFromInside(t *testing.T) {
	if os.Getuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("some of the attacks need root to work outside the sandbox")
	}
	victim := exec.Command("/bin/sleep", "3600")
	victim.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { victim.Process.Kill(); victim.Wait() }()
	for name := range attacks {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			for _, in := range []string{"", "yes"} {
				want := map[string]int{"": succeeded, "yes": refused}[in]
				if code, out := launch(t, name, in, victim.Process.Pid); code != want {
					t.Errorf("shut in %q: exit %d, want %d\n%s", in, code, want, out)
				}
			}
		})
	}
}

func launch(t *testing.T, name, shutIn string, victim int) (int, string) {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"queue", "mnt"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"queue/dfOTHER", "held"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("text\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	sock, err := net.Listen("unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	held, err := os.Open(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Dir = dir
	cmd.Env = []string{
		attackEnv + "=" + name, shutInEnv + "=" + shutIn, "DIR=" + dir,
		"TCP=" + tcp.Addr().String(), "TARGET=" + strconv.Itoa(victim),
	}
	cmd.ExtraFiles = []*os.File{held}
	if name == "mount" || name == "a namespace of its own" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	}
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, string(out)
	}
	return -1, fmt.Sprint(err, string(out))
}

// TestAHeldMessageCannotBeChanged: the seals hold even where the sandbox
// does not.
func TestAHeldMessageCannotBeChanged(t *testing.T) {
	fd, err := unix.MemfdCreate("message", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("text")); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
		t.Error("a sealed message was written")
	}
	if err := unix.Ftruncate(fd, 0); err == nil {
		t.Error("a sealed message was cut")
	}
	if _, err := unix.Mmap(fd, 0, 4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		t.Error("a sealed message was mapped for writing")
	}
}

// TestLimitsEndAProcess: what a worker uses up is its own.
func TestLimitsEndAProcess(t *testing.T) {
	for name, want := range map[string]string{"memory": "out of memory", "cpu": "signal: killed", "stack": "stack overflow"} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{greedyEnv + "=" + name, "GOTRACEBACK=single"}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out)+err.Error(), want) {
			t.Errorf("%s: %v\n%.300s", name, err, out)
		}
	}
}

// greedy is what ends a process by its own limits.
var greedy = map[string]struct {
	limits Limits
	up     func()
}{
	"memory": {Limits{Memory: 256 << 20}, func() {
		var all [][]byte
		for range 1000 {
			all = append(all, bytes.Repeat([]byte{1}, 16<<20))
		}
		fmt.Println(len(all))
	}},
	"cpu": {Limits{CPUSeconds: 1}, func() {
		for n := uint64(1); n != 0; n++ {
			if n == 0 {
				return
			}
		}
	}},
	"stack": {Limits{Memory: 1 << 30}, func() { fmt.Println(deeper(1)) }},
}

func deeper(n int) int {
	if n == 0 {
		return 0
	}
	return deeper(n+1) + 1
}
