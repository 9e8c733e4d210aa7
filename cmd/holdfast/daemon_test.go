package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/sample"
)

// daemon starts holdfast run, and stops it with the test.
func (s *site) daemon(bin string, env ...string) *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(bin, "run", "-c", s.config)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	log := &s.log
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if s.t.Failed() {
			s.t.Logf("%.4000s", log.String())
		}
	})
	s.until("the daemon answers", func() bool {
		_, err := control.Dial(s.dir + "/state/control.sock").Status(s.t.Context())
		return err == nil
	})
	return cmd
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (s *site) until(what string, ok func() bool) {
	s.t.Helper()
	for range 2400 {
		if ok() {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	s.t.Fatalf("it does not happen that %s", what)
}

// ear is a socket that stands for systemd's.
type ear struct {
	t *testing.T
	l *net.UnixConn
}

func (s *site) systemd() (e ear, env []string) {
	s.t.Helper()
	path := filepath.Join(s.dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	return ear{s.t, l}, []string{"NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=400000"}
}

// next is what is said within a time, "" for nothing.
func (e ear) next(within time.Duration) string {
	e.t.Helper()
	if err := e.l.SetReadDeadline(time.Now().Add(within)); err != nil {
		e.t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := e.l.Read(buf)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		e.t.Fatal(err)
	}
	return string(buf[:n])
}

// hear waits until something is said.
func (e ear) hear(want string) {
	e.t.Helper()
	for {
		switch said := e.next(time.Minute); {
		case strings.Contains(said, want):
			return
		case said == "":
			e.t.Fatalf("it never says %s", want)
		}
	}
}

// TestSystemdIsTold: READY, then WATCHDOG for as long as the loop turns,
// STOPPING at the end.
func TestSystemdIsTold(t *testing.T) {
	s := newSite(t, nil, "")
	e, env := s.systemd()
	cmd := s.daemon(normal, env...)
	for _, want := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"} {
		e.hear(want)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	e.hear("STOPPING=1")
}

// TestALoopThatIsWedgedIsNotPraised: one message makes the loop hang for ever.
// The process lives, its other goroutines work, and systemd hears nothing more.
func TestALoopThatIsWedgedIsNotPraised(t *testing.T) {
	s := newSite(t, nil, "watchdog: 1s\nshutdown: 1s\n")
	e, env := s.systemd()
	cmd := s.daemon(faulty, env...)
	st, err := control.Dial(s.dir + "/state/control.sock").Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(st.PID, syscall.SIGKILL) }) // it cannot stop in order
	e.hear("WATCHDOG=1")
	m := withFault(1, map[int]string{0: "hang@decide"})[0]
	if err := m.Write(s.in); err != nil {
		t.Fatal(err)
	}
	s.until("the loop does not answer", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		_, err := control.Dial(s.dir + "/state/control.sock").Status(ctx)
		return err != nil
	})
	for heard := 0; e.next(1200*time.Millisecond) != ""; heard++ { // six times as long as it is due
		if heard == 50 {
			t.Fatal("it is praised all the same")
		}
	}
	if err := syscall.Kill(st.PID, 0); err != nil {
		t.Errorf("the process does not live: %v", err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil { // so that the keeper does not start it again
		t.Fatal(err)
	}
}

// TestStoppedInTheMiddle: SIGTERM, again and again, while 600 messages pass:
// what is in work is finished or put back, the ledger is empty, nothing is
// lost or doubled.
func TestStoppedInTheMiddle(t *testing.T) {
	s := newSite(t, sample.Demo(600, 33, -1), "log: {level: error}\nbatch: {messages: 5}\nshutdown: 5s\n")
	for range 5 {
		cmd := s.daemon(normal)
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("an orderly stop ends with %v", err)
		}
		if n := s.rowsInWork(); n != 0 {
			t.Errorf("%d rows are left in the ledger after an orderly stop", n)
		}
	}
	if code, out, errs := s.run(normal, "run", "--drain"); code != 0 {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	s.account(map[int]bool{33: true}, nil)
}

// TestKilledInTheMiddle: SIGKILL of the supervisor at odd instants; the
// keeper starts it again, and everything arrives once.
func TestKilledInTheMiddle(t *testing.T) {
	s := newSite(t, sample.Demo(600, 33, -1), "log: {level: error}\nbatch: {messages: 5}\n")
	s.daemon(normal)
	client := control.Dial(s.dir + "/state/control.sock")
	for i := range 6 {
		var pid int
		s.until("a life answers", func() bool {
			st, err := client.Status(t.Context())
			pid = st.PID
			return err == nil
		})
		time.Sleep(time.Duration(i*7) * time.Millisecond)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	s.until("the inbound queue is empty", func() bool {
		left, err := filepath.Glob(s.in + "/*")
		return err == nil && len(left) == 0
	})
	s.account(map[int]bool{33: true}, nil)
}

// TestOneLogLinePerMessage: events, not prose. Every field of every line is
// what the message says, in JSON and in text.
func TestOneLogLinePerMessage(t *testing.T) {
	for _, format := range []string{"json", "text"} {
		ms := sample.Demo(30, 3, -1)
		ms[5].To = []string{"one@example.net", "two@example.net", "three@example.net"}
		ms[6].From = ""
		ms[7].From = "line\x1bend@example.com"
		s := newSite(t, ms, "log: {format: "+format+"}\n")
		start := time.Now().Add(-2 * time.Second) // text has whole seconds
		code, out, errs := s.run(normal, "run", "--drain")
		if code != 0 {
			t.Fatalf("exit %d\n%s%s", code, out, errs)
		}
		parse := textLines
		if format == "json" {
			parse = settledLines
		}
		lines := parse(t, errs)
		if len(lines) != len(ms) {
			t.Errorf("%s: lines about %d of %d messages", format, len(lines), len(ms))
		}
		items := map[string]string{}
		for _, r := range s.itemRows() {
			items[r.ID] = r.Item
		}
		for i, m := range ms {
			line := lines[m.ID]
			want := map[string]any{
				"msg": "message", "level": "info", "queue": "mta", "id": m.ID, "new_id": m.ID, "verdict": "release", "from": m.From,
				"recipients": float64(len(m.To)), "message_id": fmt.Sprintf("<sample%d@example.com>", i), "client": "192.0.2.1",
				"size": float64(len(m.Header) + len("\n") + len(m.Body)), "reasons": nil,
			}
			switch i {
			case 3:
				want["verdict"], want["new_id"] = "quarantine", items[m.ID]
				want["reasons"] = "signature/eicar: EICAR test file found (policy.infected, default)"
			case 7:
				want["from"] = `line\x1bend@example.com`
			}
			for field, v := range want {
				if got := line[field]; got != v {
					t.Errorf("%s, message %d: %s is %v, want %v", format, i, field, got, v)
				}
			}
			at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(line["time"]))
			if err != nil || at.Before(start) || at.After(time.Now()) {
				t.Errorf("%s, message %d: time %v, %v", format, i, line["time"], err)
			}
			for _, stage := range []string{"ms_render", "ms_wait", "ms_parse", "ms_part", "ms_signature", "ms_commit", "ms_total"} {
				if ms, ok := line[stage].(float64); !ok || ms < 0 || ms > time.Since(start).Seconds()*1000 {
					t.Errorf("%s, message %d: %s is %v", format, i, stage, line[stage])
				}
			}
		}
	}
}

var textField = regexp.MustCompile(`([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)`)

// textLines are the lines about messages of a log in text, by queue id.
func textLines(t *testing.T, text string) map[string]map[string]any {
	t.Helper()
	out := map[string]map[string]any{}
	for line := range strings.Lines(text) {
		m := map[string]any{}
		for _, f := range textField.FindAllStringSubmatch(line, -1) {
			v := f[2]
			if strings.HasPrefix(v, `"`) {
				var err error
				if v, err = strconv.Unquote(v); err != nil {
					t.Fatalf("%v: %s in %s", err, f[2], line)
				}
			}
			m[f[1]] = v
			if n, err := strconv.ParseFloat(v, 64); err == nil {
				m[f[1]] = n
			}
		}
		if m["msg"] != "message" {
			continue
		}
		id := fmt.Sprint(m["id"])
		if out[id] != nil {
			t.Errorf("two lines about %s", id)
		}
		out[id] = m
	}
	return out
}

// TestAReloadThatCannotWorkIsRefused: the old configuration stays, before the
// old life has ended, for everything that would keep a new one from working.
// One that cannot be opened all the same is put back, loudly.
func TestAReloadThatCannotWorkIsRefused(t *testing.T) {
	s := newSite(t, nil, "")
	other, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(other) })
	text, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.dir+"/state2/recorder", 0o700); err != nil { // in the way of a file
		t.Fatal(err)
	}
	good := string(text)
	cmd := s.daemon(normal)
	client := control.Dial(s.dir + "/state/control.sock")
	began, err := client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ config, why string }{
		{good + "nonsense: 1\n", "nonsense"},
		{good + "user: nosuchuser\n", "nosuchuser"},
		{strings.Replace(good, "out: "+s.out, "out: "+s.dir+"/missing", 1), "missing"},
		{strings.Replace(good, "out: "+s.out, "out: "+other, 1), "no outbound directory is on the file system"},
		{strings.Replace(good, "state: "+s.dir+"/state", "state: "+s.config+"/state", 1), "make state directory"},
		{good + "notify: {command: [" + s.dir + "/tell]}\n", s.dir + "/tell"},
		{strings.Replace(good, "state: "+s.dir+"/state", "state: "+s.dir+"/state2", 1), "flight recorder"},
	} {
		if err := os.WriteFile(s.config, []byte(c.config), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		s.until("the reload is refused because of "+c.why, func() bool {
			st, err := client.Status(t.Context())
			return err == nil && strings.Contains(st.ReloadRefused, c.why)
		})
		m := sample.Demo(i+1, -1, -1)[i]
		if err := m.Write(s.in); err != nil {
			t.Fatal(err)
		}
		s.messages = append(s.messages, m)
		s.until("mail passes after the refusal", func() bool {
			_, err := os.Stat(s.out + "/qf" + m.ID)
			return err == nil
		})
		st, err := client.Status(t.Context())
		if err != nil || st.PID != began.PID || !st.Loaded.Equal(began.Loaded) {
			t.Errorf("%s: process %d with the configuration of %s, %v", c.why, st.PID, st.Loaded, err)
		}
		if ended := strings.Count(s.log.String(), "msg=reloading"); ended > 0 && i < 6 {
			t.Errorf("%s: the old life was ended", c.why)
		}
	}
	log := s.log.String()
	for want, n := range map[string]int{
		"level=warning msg=\"reload refused\"": 6, "level=error msg=\"reload failed\"": 1, "the old configuration is used again": 1, "msg=stopping": 0,
	} {
		if strings.Count(log, want) != n {
			t.Errorf("%q is not %d times in the log", want, n)
		}
	}
	s.inOrder(`msg=started config=\S+ pid=\d+ queues="mta: \S+/in to \S+/out" version=\S+ workers=\d`, `msg=reloading`, `msg="reload failed"`, `msg=reloaded config=\S+ pid=\d+`)
	if err := os.WriteFile(s.config, []byte(good+"monitor: true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.until("the good one is taken", func() bool { return strings.Contains(s.log.String(), "monitor=true") })
	s.account(nil, nil)
}

// TestABadReloadRightAfterAGoodOne: the good one is being taken when the bad
// one is refused; the daemon goes on with the good one.
func TestABadReloadRightAfterAGoodOne(t *testing.T) {
	s := newSite(t, withFault(1, map[int]string{0: "hang@part"}), "limits: {cpu: 1s, wall: 4s}\n")
	text, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	cmd := s.daemon(faulty)
	client := control.Dial(s.dir + "/state/control.sock")
	s.until("a message is in work, which keeps the old life from ending at once", func() bool {
		st, err := client.Status(t.Context())
		return err == nil && len(st.InFlight) == 1 && st.InFlight[0].Stage == "part"
	})
	for _, c := range []struct{ more, want string }{{"monitor: true\n", "msg=reloading"}, {"nonsense: 1\n", `msg="reload refused"`}} {
		if err := os.WriteFile(s.config, append(append([]byte{}, text...), c.more...), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		s.until(c.want, func() bool { return strings.Contains(s.log.String(), c.want) })
	}
	s.inOrder("msg=reloading", `msg="reload refused"`)
	s.until("the good one is taken", func() bool {
		_, err := client.Status(t.Context())
		return err == nil && strings.Contains(s.log.String(), "monitor=true")
	})
}

// inOrder looks for lines in the daemon's log, one after the other.
func (s *site) inOrder(want ...string) {
	s.t.Helper()
	rest := s.log.String()
	for _, w := range want {
		at := regexp.MustCompile(w).FindStringIndex(rest)
		if at == nil {
			s.t.Errorf("the log lacks %q, or not in this order", w)
			return
		}
		rest = rest[at[1]:]
	}
}

// TestNothingIsPurgedBecauseALifeBegins: what is over may be just what
// somebody wants to see after a crash.
func TestNothingIsPurgedBecauseALifeBegins(t *testing.T) {
	s := newSite(t, nil, "")
	old := []string{s.dir + "/state/history/20200101.jsonl", s.dir + "/state/evidence/20200101-x/message"}
	for _, path := range old {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("{}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := os.Chtimes(filepath.Dir(old[1]), long, long); err != nil {
		t.Fatal(err)
	}
	cmd := s.daemon(normal)
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.until("it is reloaded", func() bool { return strings.Contains(s.log.String(), "msg=reloaded") })
	if strings.Contains(s.log.String(), "purged") {
		t.Error("it purged")
	}
	for _, path := range old {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

func TestPurgesComeOnceADay(t *testing.T) {
	for now, want := range map[string]string{
		"2026-11-24 00:00": "2026-11-24 03:30", "2026-11-24 03:29": "2026-11-24 03:30", "2026-11-24 03:30": "2026-11-25 03:30", "2026-12-31 23:59": "2027-01-01 03:30",
	} {
		at, err := time.Parse("2006-01-02 15:04", now)
		if err != nil {
			t.Fatal(err)
		}
		if got := nextPurge(at).Format("2006-01-02 15:04"); got != want {
			t.Errorf("at %s the next is at %s, not %s", now, got, want)
		}
	}
}
