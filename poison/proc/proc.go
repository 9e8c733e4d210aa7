// Package proc starts child processes that are allowed to die, kills them
// with all that they started, and says how they ended.
package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/poison"
)

// Spec is a process to be started.
type Spec struct {
	Path   string
	Args   []string // without the name
	Env    []string
	Files  []*os.File // from descriptor 3 on
	UID    int        // with GID, and no other groups; 0 keeps ours
	GID    int
	CPU    time.Duration // killed beyond; 0: no limit
	Wall   time.Duration
	Crash  int // index in Files of a slot for the crash pipe, -1 for none
	What   string
	RunDir string // where the process is noted while it lives; "" nowhere
}

const (
	tail      = 64 << 10 // bytes kept of standard error: more than a Go trace of a hundred frames, or the line that names the death is lost
	crashText = 64 << 10
	watch     = 50 * time.Millisecond
	drainTime = 2 * time.Second // for pipes that a grandchild holds open
)

// Starter starts children from one thread: the parent-death signal is tied
// to the thread that forked, not to the process (golang/go#27505).
type Starter struct {
	jobs chan func()
	done chan struct{}
}

// NewStarter makes a starter; Close ends its thread, and its children.
func NewStarter() *Starter {
	s := &Starter{jobs: make(chan func()), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread()
		defer close(s.done)
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

// Close ends the starter.
func (s *Starter) Close() { close(s.jobs); <-s.done }

// Proc is a running child.
type Proc struct {
	cmd    *exec.Cmd
	note   string
	stderr *ring
	crash  *ring
	pipes  sync.WaitGroup

	mu     sync.Mutex
	reaped bool
	killed string
}

// Start starts a child in a process group of its own.
func (s *Starter) Start(spec Spec) (*Proc, error) {
	p := &Proc{stderr: &ring{max: tail}, crash: &ring{max: crashText, head: true}}
	cmd := exec.Command(spec.Path, spec.Args...)
	cmd.Env, cmd.Dir = spec.Env, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if spec.UID > 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(spec.UID), Gid: uint32(spec.GID), Groups: []uint32{}}
	}
	var mine, theirs []*os.File
	pipe := func() (*os.File, error) {
		r, w, err := os.Pipe()
		if err == nil {
			mine, theirs = append(mine, r), append(theirs, w)
		}
		return w, err
	}
	closeAll := func(fs []*os.File) {
		for _, f := range fs {
			f.Close()
		}
	}
	w, err := pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.What, err)
	}
	cmd.Stderr = w
	cmd.ExtraFiles = append([]*os.File{}, spec.Files...)
	if spec.Crash >= 0 {
		if w, err = pipe(); err != nil {
			closeAll(append(mine, theirs...))
			return nil, fmt.Errorf("start %s: %w", spec.What, err)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, w)
	}
	started := make(chan error, 1)
	s.jobs <- func() { started <- cmd.Start() }
	err = <-started
	closeAll(theirs)
	if err != nil {
		closeAll(mine)
		return nil, fmt.Errorf("start %s: %w", spec.What, err)
	}
	p.cmd = cmd
	for i, r := range mine {
		to := p.stderr
		if i == 1 {
			to = p.crash
		}
		p.pipes.Add(1)
		go func() {
			defer p.pipes.Done()
			defer r.Close()
			_, _ = io.Copy(to, r) // ends with the pipe; what was read is kept
		}()
	}
	p.remember(spec)
	go p.limit(spec)
	return p, nil
}

// limit kills the process beyond its CPU or wall time, both measured here.
func (p *Proc) limit(spec Spec) {
	start := time.Now()
	t := time.NewTicker(watch)
	defer t.Stop()
	for range t.C {
		p.mu.Lock()
		over := p.reaped
		p.mu.Unlock()
		switch {
		case over:
			return
		case spec.CPU > 0 && CPU(p.cmd.Process.Pid) > spec.CPU:
			p.Kill(poison.KilledCPU)
		case spec.Wall > 0 && time.Since(start) > spec.Wall:
			p.Kill(poison.KilledWall)
		}
	}
}

// Kill kills the process group; the first reason stays.
func (p *Proc) Kill(why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return // the number may be another process's by now
	}
	if p.killed == "" {
		p.killed = why
	}
	_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL) // gone already is as good
}

// Wait reaps the process after killing what it started.
func (p *Proc) Wait(ctx context.Context) poison.Exit {
	stop := context.AfterFunc(ctx, func() { p.Kill(poison.KilledStopped) })
	defer stop()
	pid := p.cmd.Process.Pid
	// Until it is reaped its number, and its group's, stay its own.
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	_ = unix.Kill(-pid, unix.SIGKILL)
	p.mu.Lock()
	err := p.cmd.Wait()
	p.reaped = true
	killed := p.killed
	p.mu.Unlock()
	p.forget()
	drained := make(chan struct{})
	go func() { p.pipes.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(drainTime):
	}
	x := poison.Exit{Stderr: p.stderr.String(), Crash: p.crash.String(), Killed: killed, Code: -1}
	if st := p.cmd.ProcessState; st != nil {
		x.CPU = st.UserTime() + st.SystemTime()
		if ws, ok := st.Sys().(syscall.WaitStatus); ok {
			x.Code = ws.ExitStatus()
			if ws.Signaled() {
				x.Signal = ws.Signal()
			}
		}
		if ru, ok := st.SysUsage().(*syscall.Rusage); ok {
			x.MaxRSS = ru.Maxrss * 1024
		}
	} else if err != nil {
		x.Stderr += err.Error()
	}
	return x
}

// CPU is the time that a process has used, by /proc/PID/stat (proc(5)).
func CPU(pid int) time.Duration {
	f, ok := statFields(pid)
	if !ok {
		return 0
	}
	u, _ := strconv.ParseInt(f[11], 10, 64)
	s, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(u+s) * (time.Second / 100) // USER_HZ is 100 on every Linux that Go runs on
}

// StartTime is when a process started, in ticks since boot: with the process
// id it names a process for ever.
func StartTime(pid int) (uint64, bool) {
	f, ok := statFields(pid)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(f[19], 10, 64)
	return n, err == nil
}

// statFields are the fields after the name, which may hold anything.
func statFields(pid int) ([]string, bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, false
	}
	end := bytes.LastIndexByte(text, ')')
	f := strings.Fields(string(text[end+1:]))
	return f, end >= 0 && len(f) > 20
}

// remember notes a child, so that a later life can kill it.
func (p *Proc) remember(spec Spec) {
	if spec.RunDir == "" {
		return
	}
	pid := p.cmd.Process.Pid
	start, ok := StartTime(pid)
	if !ok {
		return
	}
	p.note = filepath.Join(spec.RunDir, strconv.Itoa(pid))
	if err := os.WriteFile(p.note, fmt.Appendf(nil, "%d %s\n", start, spec.What), 0o600); err != nil {
		p.note = "" // it dies with us anyway, by its parent-death signal
	}
}

func (p *Proc) forget() {
	if p.note != "" {
		_ = os.Remove(p.note)
	}
}

// KillLeftovers kills what an earlier life left running, by process id and
// start time, and returns what it killed.
func KillLeftovers(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list leftovers: %w", err)
	}
	var killed []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 1 {
			continue
		}
		path := filepath.Join(dir, e.Name())
		text, err := os.ReadFile(path)
		if err != nil {
			return killed, fmt.Errorf("read leftover: %w", err)
		}
		start, what, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
		if now, ok := StartTime(pid); ok && strconv.FormatUint(now, 10) == start {
			_ = unix.Kill(-pid, unix.SIGKILL)
			_ = unix.Kill(pid, unix.SIGKILL)
			killed = append(killed, fmt.Sprintf("%s (process %d)", what, pid))
		}
		if err := os.Remove(path); err != nil {
			return killed, fmt.Errorf("forget leftover: %w", err)
		}
	}
	return killed, nil
}

// ring keeps the first (head) or the last bytes of what is written to it.
type ring struct {
	mu   sync.Mutex
	max  int
	head bool
	b    []byte
}

func (r *ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.head {
		r.b = append(r.b, p[:min(len(p), r.max-len(r.b))]...)
		return len(p), nil
	}
	r.b = append(r.b, p[max(0, len(p)-r.max):]...)
	if len(r.b) > r.max {
		r.b = append([]byte(nil), r.b[len(r.b)-r.max:]...)
	}
	return len(p), nil
}

func (r *ring) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.b)
}
