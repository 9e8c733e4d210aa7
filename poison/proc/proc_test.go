package proc

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/poison"
)

// The children are this test program, started again to do one thing.
const childEnv = "HOLDFAST_TEST_CHILD"

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		children[name]()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var children = map[string]func(){
	"well":   func() {},
	"exit 3": func() { os.Exit(3) },
	"exit 2": func() { os.Exit(2) },
	"segv":   func() { sh("kill -SEGV $PPID") },
	"kill":   func() { sh("kill -KILL $PPID") },
	"term":   func() { sh("kill -TERM $PPID") },
	"panic":  func() { panic("planted") },
	"bounds": func() { fmt.Println([]int{1}[len(os.Args)+5]) },
	"stack":  func() { fmt.Println(deeper(1)) },
	"spin": func() {
		for n := 1; n != 0; n |= 1 {
			_ = n
		}
	},
	"sleep": func() { time.Sleep(time.Hour) },
	"flood": func() {
		line := []byte(strings.Repeat("x", 1<<20))
		for range 100 {
			os.Stderr.Write(line)
		}
		os.Stderr.WriteString("the last words\n")
		os.Exit(3)
	},
	"grandchild": func() {
		cmd := exec.Command("/bin/sleep", "3600")
		cmd.Stderr = os.Stderr // holds our pipe open
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		os.WriteFile(os.Getenv("NOTE"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600)
	},
}

func deeper(n int) int {
	if n == 0 {
		return 0
	}
	return deeper(n+1) + 1
}

// sh runs a shell that signals its parent, which is us.
func sh(script string) {
	exec.Command("/bin/sh", "-c", script).Run()
	time.Sleep(time.Minute)
}

func start(t *testing.T, s *Starter, name string, change func(*Spec)) *Proc {
	t.Helper()
	spec := Spec{Path: "/proc/self/exe", Env: []string{childEnv + "=" + name, "GOTRACEBACK=single"}, Crash: -1, What: name}
	if change != nil {
		change(&spec)
	}
	p, err := s.Start(spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func starter(t *testing.T) *Starter {
	s := NewStarter()
	t.Cleanup(s.Close)
	return s
}

// TestEachEndIsToldApart: the class is what guilt depends on.
func TestEachEndIsToldApart(t *testing.T) {
	s := starter(t)
	for name, want := range map[string]string{
		"well":   "exit status 0 before its bye (failure)",
		"exit 3": "exit status 3 before its bye (failure)",
		"exit 2": "exit status 2 before its bye (failure)",
		"segv":   "SIGSEGV (crash)",
		"kill":   "SIGKILL (resource)",
		"term":   "SIGTERM (resource)",
		"spin":   "cpu time exceeded (hang)",
		"sleep":  "wall time exceeded (failure)",
		"panic":  "panic: planted < holdfast/poison/proc.init.func8 (crash)",
		"bounds": "panic: runtime error: index out of range (crash)",
		"stack":  "stack overflow (crash)",
	} {
		p := start(t, s, name, func(s *Spec) {
			s.Wall = time.Minute
			switch name {
			case "spin":
				s.CPU = 200 * time.Millisecond
			case "sleep":
				s.Wall = 200 * time.Millisecond
			}
		})
		x := p.Wait(t.Context())
		if strings.Contains(want, "(crash)") && x.Code == 2 {
			x.Crash = x.Stderr // a worker writes it to its crash slot
		}
		d := poison.Classify(x, "", false)
		if d == nil || !sameEnd(d.String(), want) {
			t.Errorf("%s: %v, want %s\n%.300s", name, d, want, x.Stderr)
		}
	}
}

func sameEnd(got, want string) bool {
	head, class, _ := strings.Cut(want, " (")
	first, _, _ := strings.Cut(head, " < ")
	return strings.Contains(got, first) && strings.Contains(got, "("+class)
}

// TestAFloodIsBounded: the last words are kept, and no more.
func TestAFloodIsBounded(t *testing.T) {
	x := start(t, starter(t), "flood", nil).Wait(t.Context())
	if len(x.Stderr) > tail || !strings.HasSuffix(x.Stderr, "the last words\n") || x.Code != 3 {
		t.Errorf("exit %d, %d bytes, ending in %q", x.Code, len(x.Stderr), x.Stderr[max(0, len(x.Stderr)-20):])
	}
}

// TestWhatAChildStartedDiesWithIt, and does not hold up its end.
func TestWhatAChildStartedDiesWithIt(t *testing.T) {
	note := filepath.Join(t.TempDir(), "pid")
	x := start(t, starter(t), "grandchild", func(s *Spec) { s.Env = append(s.Env, "NOTE="+note) }).Wait(t.Context())
	text, err := os.ReadFile(note)
	if err != nil || x.Code != 0 {
		t.Fatal(err, x)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if f, ok := statFields(pid); !ok || f[0] == "Z" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("the grandchild %d lives on", pid)
}

func TestStoppedIsNoDeath(t *testing.T) {
	p := start(t, starter(t), "sleep", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	x := p.Wait(ctx)
	if d := poison.Classify(x, "", false); d == nil || d.Class != poison.ClassResource || x.Killed != poison.KilledStopped {
		t.Errorf("%v, killed: %q", d, x.Killed)
	}
}

// TestNothingLeaks over many starts: descriptors, notes, zombies.
func TestNothingLeaks(t *testing.T) {
	s := starter(t)
	dir := t.TempDir()
	count := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	one := func() { start(t, s, "well", func(s *Spec) { s.RunDir = dir }).Wait(t.Context()) }
	one()
	before := count()
	for range 100 {
		one()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after 100 starts", before, after)
	}
	if e, _ := os.ReadDir(dir); len(e) > 0 {
		t.Errorf("%d notes left", len(e))
	}
	var ws syscall.WaitStatus
	if pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil); pid > 0 {
		t.Errorf("zombie %d, %v", pid, err)
	}
	if _, err := s.Start(Spec{Path: "/nonexistent", Crash: -1, What: "nothing"}); err == nil || !strings.Contains(err.Error(), "start nothing") {
		t.Errorf("a program that is not there: %v", err)
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors after a start that failed", after)
	}
}

// TestLeftoversAreKnownByTheirStartTime: a process number may be another's
// by now.
func TestLeftoversAreKnownByTheirStartTime(t *testing.T) {
	ours, others := exec.Command("/bin/sleep", "3600"), exec.Command("/bin/sleep", "3600")
	dir := t.TempDir()
	for i, cmd := range []*exec.Cmd{ours, others} {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { cmd.Process.Kill(); cmd.Wait() }()
		began, ok := StartTime(cmd.Process.Pid)
		if !ok {
			t.Fatal("no start time")
		}
		note := fmt.Sprintf("%d worker\n", began-uint64(i)) // the other's is one tick off
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(cmd.Process.Pid)), []byte(note), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"not-a-number", "1", "0", "-5"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("1 worker\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	killed, err := KillLeftovers(dir)
	if err != nil || len(killed) != 1 || !strings.Contains(killed[0], strconv.Itoa(ours.Process.Pid)) {
		t.Errorf("%q, %v", killed, err)
	}
	ours.Wait()
	if err := unix.Kill(others.Process.Pid, 0); err != nil {
		t.Errorf("a process that is not ours: %v", err)
	}
}

// TestChildrenDieWithTheirStarter: nothing of ours outlives us.
func TestChildrenDieWithTheirStarter(t *testing.T) {
	s := NewStarter()
	p := start(t, s, "sleep", nil)
	s.Close()
	if x := p.Wait(t.Context()); x.Signal != syscall.SIGKILL {
		t.Errorf("%+v", x)
	}
}
