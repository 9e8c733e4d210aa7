package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"holdfast/cmd/holdfast/internal/courier"
	"holdfast/cmd/holdfast/internal/sample"
)

// binaries are built once: the program, and the one with planted faults.
var normal, faulty string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "holdfast-test-")
	if err != nil {
		panic(err)
	}
	normal, faulty = dir+"/holdfast", dir+"/holdfast-faults"
	for bin, tags := range map[string]string{normal: "", faulty: "faults"} {
		if out, err := exec.Command("go", "build", "-tags", tags, "-o", bin, ".").CombinedOutput(); err != nil {
			panic(fmt.Sprintf("%v\n%s", err, out))
		}
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// site is one gateway on the disk.
type site struct {
	t            *testing.T
	dir, in, out string
	config       string
	messages     []sample.Message
	log          lockedBuffer // of the daemon
}

func newSite(t *testing.T, messages []sample.Message, extra string) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), messages: messages}
	s.in, s.out, s.config = s.dir+"/in", s.dir+"/out", s.dir+"/holdfast.yaml"
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{s.in, s.out} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range messages {
		if err := m.Write(s.in); err != nil {
			t.Fatal(err)
		}
	}
	s.write(extra)
	return s
}

func (s *site) write(extra string) {
	s.t.Helper()
	text := fmt.Sprintf("state: %s/state\nqueues: [{name: mta, type: sendmail, in: %s, out: %s, kick: none}]\nmin_free: 1MB\n%s", s.dir, s.in, s.out, extra)
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// run runs a command line of ours and returns its exit code and output.
func (s *site) run(bin string, args ...string) (code int, out, errs string) {
	s.t.Helper()
	cmd := exec.Command(bin, append(args, "-c", s.config)...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	if cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// items are the quarantined messages by queue id, with the reasons.
func (s *site) items() map[string]string {
	s.t.Helper()
	res := map[string]string{}
	for _, r := range s.itemRows() {
		if _, ok := res[r.ID]; ok {
			s.t.Errorf("%s is in quarantine twice", r.ID)
		}
		res[r.ID] = strings.Join(r.Reasons, "; ")
	}
	return res
}

func (s *site) itemRows() (out []itemRow) {
	s.t.Helper()
	_, text, errs := s.run(normal, "quarantine", "list", "--json")
	for line := range strings.Lines(text) {
		var r itemRow
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			s.t.Fatalf("%v in %q (%s)", err, line, errs)
		}
		out = append(out, r)
	}
	return out
}

// account checks every message: in the given ones' place, or out unchanged.
func (s *site) account(kept, left map[int]bool) {
	s.t.Helper()
	items := s.items()
	for i, m := range s.messages {
		_, quarantined := items[m.ID]
		body, err := os.ReadFile(filepath.Join(s.out, "df"+m.ID))
		control, qerr := os.ReadFile(filepath.Join(s.out, "qf"+m.ID))
		_, ierr := os.Lstat(filepath.Join(s.in, "qf"+m.ID))
		released := err == nil && qerr == nil && bytes.Equal(body, m.Body) && bytes.Equal(control, m.Control())
		switch {
		case kept[i] && (!quarantined || released || ierr == nil):
			s.t.Errorf("message %d: quarantined %v, released %v, queued %v", i, quarantined, released, ierr == nil)
		case left[i] && (quarantined || released || ierr != nil):
			s.t.Errorf("message %d must be left: quarantined %v, released %v, queued %v", i, quarantined, released, ierr == nil)
		case !kept[i] && !left[i] && (quarantined || !released || ierr == nil):
			s.t.Errorf("message %d must be released: quarantined %v (%s), released %v, queued %v", i, quarantined, items[m.ID], released, ierr == nil)
		}
	}
}

func withFault(n int, faults map[int]string) []sample.Message {
	ms := sample.Demo(n, -1, -1)
	for i, f := range faults {
		ms[i].Header += "X-Holdfast-Fault: " + f + "\n"
	}
	return ms
}

// TestOneOfThirtyKillsItsWorker: 29 out, 1 quarantined with the reason, for
// each way to die.
func TestOneOfThirtyKillsItsWorker(t *testing.T) {
	for fault, reason := range map[string]string{
		"segv@part": "SIGSEGV (crash) at part", "abort@parse": "SIGABRT (crash) at parse", "panic@signature": "(crash) at signature",
		"stack@parse": "stack overflow", "spin@part": "cpu time exceeded (hang)", "oom@parse": "out of memory (memory)",
		"exit@part": "exit status 3", "garbage@part": "protocol", "hang@part": "wall time exceeded", "flood@part": "protocol",
		"token@part": "protocol", "sequence@part": "protocol", "bye@part": "protocol",
	} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			// Only a death by a limit of time gets a short one: under load every
			// other would be in a race with it.
			limits := map[string]string{"spin@part": "cpu: 1s, ", "hang@part": "cpu: 2s, wall: 2s, "}[fault]
			s := newSite(t, withFault(30, map[int]string{11: fault}), "limits: {"+limits+"memory: 150MB, memory_retry: 200MB}\nbatch: {messages: 10}\nlog: {level: error}\n")
			code, out, errs := s.run(faulty, "run", "--drain")
			if code != 0 {
				t.Fatalf("exit %d\n%s%s", code, out, errs)
			}
			s.account(map[int]bool{11: true}, nil)
			if why := s.items()[s.messages[11].ID]; !strings.Contains(why, reason) {
				t.Errorf("the reason is %q, want %q", why, reason)
			}
		})
	}
}

// TestOneFindingIsOneReason: GTUBE in a body is in a part and in the message,
// and stands once in the reasons.
func TestOneFindingIsOneReason(t *testing.T) {
	ms := sample.Demo(1, -1, -1)
	ms[0].Body = []byte("XJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-" + "ANTI-UBE-TEST-EMAIL*C.34X\n")
	s := newSite(t, ms, "")
	if code, out, errs := s.run(normal, "run", "--drain"); code != 0 || strings.Count(errs, "GTUBE test string found") != 1 {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	if why := s.items()[ms[0].ID]; why != "GTUBE test string found" {
		t.Errorf("the reasons are %q", why)
	}
}

// TestHoldfastItselfDies: a planted panic in the control file parser, in the
// decision or in the log line, on 1 of 300: 299 leave by themselves, without
// systemd, and the one is left untouched and listed with the reason. The one
// that kills the log line was released before it: it is out.
func TestHoldfastItselfDies(t *testing.T) {
	const deadly = 150
	for _, step := range []string{"qf", "decide", "log"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, withFault(300, map[int]string{deadly: "panic@" + step}), "log: {format: json}\n")
			code, out, errs := s.run(faulty, "run", "--drain")
			left, wantCode := map[int]bool{deadly: true}, exitPartly
			if step == "log" {
				left, wantCode = nil, 0
			}
			if code != wantCode {
				t.Fatalf("exit %d, want %d\n%s%.3000s", code, wantCode, out, errs)
			}
			s.account(nil, left)
			if !strings.Contains(errs, "planted fault") {
				t.Errorf("it did not die of it:\n%.3000s", errs)
			}
			if step == "log" {
				return
			}
			if !strings.Contains(out, s.messages[deadly].ID+": Holdfast itself died 2 times") {
				t.Errorf("the message is not listed with its reason:\n%s", out)
			}
			// The next start leaves it alone, and says so.
			if code, out, _ := s.run(faulty, "run", "--drain"); code != exitPartly || !strings.Contains(out, "left 1") {
				t.Errorf("again: exit %d, %s", code, out)
			}
			s.account(nil, left)
		})
	}
}

// TestADeathBeforeTheLogLine: the messages have left when Holdfast dies of
// writing about one. The next life writes down what the first had decided: each
// message has one line and one record, with verdict and reasons.
func TestADeathBeforeTheLogLine(t *testing.T) {
	ms := sample.Demo(30, 12, -1)
	for _, i := range []int{12, 20} {
		ms[i].Header = "X-Holdfast-Fault: panic@log\n" + ms[i].Header
	}
	s := newSite(t, ms, "")
	code, out, errs := s.run(faulty, "run", "--drain")
	if code != 0 || !strings.Contains(errs, "the supervisor died") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	s.account(map[int]bool{12: true}, nil)
	days, err := filepath.Glob(s.dir + "/state/history/*.jsonl")
	if err != nil || len(days) == 0 {
		t.Fatal(days, err)
	}
	text := ""
	for _, d := range days {
		b, err := os.ReadFile(d)
		if err != nil {
			t.Fatal(err)
		}
		text += string(b)
	}
	for i, m := range s.messages {
		if n := strings.Count(text, fmt.Sprintf("%q:%q", "id", m.ID)); n != 1 {
			t.Errorf("message %d has %d records", i, n)
		}
		if n := strings.Count(errs, "msg=message ") - len(s.messages); n != 0 {
			t.Errorf("%d lines too many about messages", n)
		}
	}
	for i, want := range map[int][]string{
		12: {"verdict     quarantine", "EICAR test file found, part 2", "decided before a crash", "became      quarantine item 2", "from        <sender12@example.com>", "to          bob@example.net"},
		20: {"verdict     release", "decided before a crash", "became      " + ms[20].ID},
	} {
		_, out, errs := s.run(normal, "explain", ms[i].ID)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("explain of message %d lacks %q:\n%s%s", i, w, out, errs)
			}
		}
	}
}

func TestADryRunChangesNothing(t *testing.T) {
	s := newSite(t, sample.Demo(40, 7, -1), "log: {level: error}\n")
	code, out, errs := s.run(normal, "run", "--drain", "--dry-run")
	if code != 0 || !strings.Contains(out, "would quarantine 1, would release 39; 40 still in the queue") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	if _, err := os.Stat(s.dir + "/state"); err == nil {
		t.Error("it made the state directory")
	}
	for _, m := range s.messages {
		if control, err := os.ReadFile(s.in + "/qf" + m.ID); err != nil || !bytes.Equal(control, m.Control()) {
			t.Errorf("%s: %v", m.ID, err)
		}
	}
}

func TestMonitorReleasesEverythingAndSaysWhatItFound(t *testing.T) {
	s := newSite(t, sample.Demo(40, 7, -1), "monitor: true\nlog: {level: error}\n")
	if code, out, errs := s.run(normal, "run", "--drain"); code != 0 {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	s.account(nil, nil)
	_, out, _ := s.run(normal, "explain", s.messages[7].ID)
	for _, want := range []string{"verdict     quarantine", "EICAR", "monitor: released", "became      " + s.messages[7].ID, "default"} {
		if !strings.Contains(out, want) {
			t.Errorf("explain lacks %q:\n%s", want, out)
		}
	}
}

// TestAStoppedDrainSaysWhatIsLeft: with its own exit code for each signal, true
// counts, and no noise about what the stop cut short.
func TestAStoppedDrainSaysWhatIsLeft(t *testing.T) {
	for sig, want := range map[syscall.Signal]int{syscall.SIGINT: exitInterrupts, syscall.SIGTERM: exitPartly} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, sample.Demo(3000, 33, -1), "batch: {messages: 5}\nshutdown: 20s\n")
			s.tellsFile()
			cmd := exec.Command(normal, "run", "--drain", "-c", s.config)
			var out, errs lockedBuffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			s.until("a message leaves", func() bool { return strings.Contains(errs.String(), "msg=message") })
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // the exit code says it
			left, err := filepath.Glob(s.in + "/qf*")
			if err != nil || len(left) == 0 {
				t.Fatalf("%d left, %v: it was not stopped", len(left), err)
			}
			if code := cmd.ProcessState.ExitCode(); code != want {
				t.Errorf("exit %d, want %d", code, want)
			}
			text := out.String()
			if !strings.Contains(text, fmt.Sprintf(", left %d\n", len(left))) || strings.Count(text, "\nleft mta:") != 20 ||
				!strings.Contains(text, fmt.Sprintf("\nand %d more\n", len(left)-20)) {
				t.Errorf("%d are left:\n%s", len(left), text)
			}
			settled := 0
			for _, n := range regexp.MustCompile(`(?:release|quarantine) (\d+)`).FindAllStringSubmatch(text, -1) {
				k, err := strconv.Atoi(n[1])
				if err != nil {
					t.Fatal(err)
				}
				settled += k
			}
			if settled != len(s.messages)-len(left) {
				t.Errorf("%d of %d are left, and %d settled:\n%s", len(left), len(s.messages), settled, text)
			}
			if log := errs.String(); strings.Contains(log, "context canceled") || strings.Contains(log, "level=error") || strings.Contains(log, "level=warning") {
				t.Errorf("a stop is no error: %.2000s", regexp.MustCompile(`(?m)^.*(?:canceled|level=[ew]).*$`).FindAllString(log, 5))
			}
		})
	}
}

// tellsFile adds a notify program to the configuration, which writes down
// what it is told. It fails while there is a file called down.
func (s *site) tellsFile() (told string) {
	s.t.Helper()
	script := fmt.Sprintf("#!/bin/sh\ntest -e %[1]s/down && { echo no; exit 1; }\ncat >> %[1]s/told\n", s.dir)
	if err := os.WriteFile(s.dir+"/tell", []byte(script), 0o755); err != nil {
		s.t.Fatal(err)
	}
	text, err := os.ReadFile(s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.config, fmt.Appendf(text, "notify: {command: [%s/tell]}\n", s.dir), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return s.dir + "/told"
}

// TestAProgramIsToldOfWhatIsKept: once per quarantined message, after the
// fact; a program that fails is told again, with the same id.
func TestAProgramIsToldOfWhatIsKept(t *testing.T) {
	ms := sample.Demo(20, 7, 7)
	s := newSite(t, ms, "")
	told := s.tellsFile()
	if err := os.WriteFile(s.dir+"/down", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := s.run(normal, "run", "--drain"); code != 0 || !strings.Contains(errs, "to be tried again") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if err := os.Remove(s.dir + "/down"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if code, _, errs := s.run(normal, "run", "--drain"); code != 0 {
			t.Errorf("exit %d\n%s", code, errs)
		}
	}
	text, err := os.ReadFile(told)
	if err != nil {
		t.Fatal(err)
	}
	var n courier.Notice
	if err := json.Unmarshal(text, &n); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	if _, ok := s.items()[n.QueueID]; !ok || n.ID == "" || n.Verdict != "quarantine" || len(n.Reasons) == 0 || len(n.Recipients) == 0 {
		t.Errorf("%s", text)
	}
	if code, out, _ := s.run(normal, "quarantine", "show", n.Item); code != 0 || !strings.Contains(out, n.QueueID) {
		t.Errorf("the notice names item %s: exit %d, %s", n.Item, code, out)
	}
}
