//go:build e2e

package sendmail

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/queue"
	"holdfast/queue/quarantine"
)

// mta is a private sendmail: its own configuration, directories and port,
// unpacked by .ci/sendmail-unpack and never installed.
type mta struct {
	t             *testing.T
	root, dir     string
	in, out, conf string
	port          int
	sink          *sink
}

func newMTA(t *testing.T) *mta {
	t.Helper()
	m := &mta{t: t, root: "/var/cache/holdfast-test/sendmail", dir: t.TempDir()}
	if dir := os.Getenv("HOLDFAST_SENDMAIL"); dir != "" {
		m.root = dir
	}
	m.in, m.out = m.dir+"/mqueue.in", m.dir+"/mqueue"
	for _, d := range []string{m.in, m.out, m.dir + "/work"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	m.sink = newSink(t)
	m.port = freePort(t)
	m.configure()
	m.listen()
	return m
}

func freePort(t *testing.T) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (m *mta) configure() {
	cf := m.root + "/usr/share/sendmail/cf"
	mc := fmt.Sprintf(`divert(0)dnl
OSTYPE(linux)dnl
define(`+"`confDOMAIN_NAME', `mx.example.org'"+`)dnl
define(`+"`SMART_HOST', `esmtp:[127.0.0.1]'"+`)dnl
define(`+"`SMTP_MAILER_ARGS', `TCP $h %d'"+`)dnl
define(`+"`ESMTP_MAILER_ARGS', `TCP $h %d'"+`)dnl
define(`+"`confSERVICE_SWITCH_FILE', `%s/switch'"+`)dnl
define(`+"`QUEUE_DIR', `%s'"+`)dnl
define(`+"`ALIAS_FILE', `%s/aliases'"+`)dnl
define(`+"`STATUS_FILE', `/dev/null'"+`)dnl
define(`+"`confDONT_BLAME_SENDMAIL', `GroupWritableDirPathSafe,WorldWritableAliasFile,NonRootSafeAddr'"+`)dnl
define(`+"`confTO_IDENT', `0'"+`)dnl
FEATURE(nocanonify)dnl
FEATURE(accept_unresolvable_domains)dnl
FEATURE(accept_unqualified_senders)dnl
FEATURE(promiscuous_relay)dnl
FEATURE(no_default_msa)dnl
DAEMON_OPTIONS(`+"`Port=%d, Addr=127.0.0.1, Name=MTA'"+`)dnl
MAILER(smtp)dnl
`, m.sink.port, m.sink.port, m.dir, m.out, m.dir, m.port)
	for name, text := range map[string]string{"mc": mc, "switch": "hosts files\naliases files\n", "aliases": ""} {
		if err := os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o644); err != nil {
			m.t.Fatal(err)
		}
	}
	cmd := exec.Command("m4", "-D_CF_DIR_="+cf+"/", cf+"/m4/cf.m4", m.dir+"/mc")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		m.t.Fatalf("m4: %v\n%s", err, stderr.Bytes())
	}
	m.conf = m.dir + "/sendmail.cf"
	if err := os.WriteFile(m.conf, text, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mta) command(args ...string) *exec.Cmd {
	// A host name of its own: sendmail sleeps a minute when the machine's has no domain.
	const named = `echo mx.example.org >/proc/sys/kernel/hostname && exec "$@"`
	cmd := exec.Command("unshare", append([]string{
		"--uts", "sh", "-c", named, "sh", m.root + "/usr/libexec/sendmail/sendmail", "-C", m.conf, "-OPidFile=" + m.dir + "/pid",
	}, args...)...)
	lib := m.root + "/usr/lib/x86_64-linux-gnu"
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+lib+":"+m.root+"/lib/x86_64-linux-gnu")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// listen starts the queue-only daemon in the foreground.
func (m *mta) listen() {
	cmd := m.command("-bD", "-ODeliveryMode=queueonly", "-OQueueDirectory="+m.in, "-OPrivacyOptions=noetrn")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	for range 200 {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", m.port))
		if err == nil {
			c.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	m.t.Fatalf("sendmail does not listen: %s", out.String())
}

// deliver runs the outbound queue once.
func (m *mta) deliver() {
	m.t.Helper()
	cmd := m.command("-qf", "-OQueueDirectory="+m.out)
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("sendmail -q: %v\n%s", err, out)
	}
}

// mailq lists a queue with sendmail's own command.
func (m *mta) mailq(dir string) string {
	m.t.Helper()
	out, err := m.command("-bp", "-OQueueDirectory="+dir).CombinedOutput()
	if err != nil {
		m.t.Fatalf("mailq: %v\n%s", err, out)
	}
	return string(out)
}

// send speaks SMTP to the listener.
func (m *mta) send(from, params string, rcpts []string, message string) {
	m.t.Helper()
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", m.port))
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		m.t.Fatal(err)
	}
	r := bufio.NewReader(c)
	expect := func(code string) {
		m.t.Helper()
		for {
			line, err := r.ReadString('\n')
			if err != nil || !strings.HasPrefix(line, code) {
				m.t.Fatalf("want %s, got %q, %v", code, line, err)
			}
			if line[3] == ' ' {
				return
			}
		}
	}
	say := func(code, format string, args ...any) {
		m.t.Helper()
		fmt.Fprintf(c, format+"\r\n", args...)
		expect(code)
	}
	expect("220")
	say("250", "EHLO client.example.com")
	say("250", "MAIL FROM:<%s>%s", from, params)
	for _, to := range rcpts {
		say("250", "RCPT TO:%s", to)
	}
	say("354", "DATA")
	for line := range strings.Lines(message) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, ".") {
			line = "." + line
		}
		fmt.Fprintf(c, "%s\r\n", line)
	}
	say("250", ".")
	say("221", "QUIT")
}

// sink is an SMTP server that records what it gets.
type sink struct {
	port int
	mu   sync.Mutex
	got  []delivery
}

type delivery struct {
	mail    string
	rcpts   []string
	message string // LF line ends, dots unstuffed
}

func newSink(t *testing.T) *sink {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sink{port: l.Addr().(*net.TCPAddr).Port}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.session(c)
		}
	}()
	return s
}

func (s *sink) session(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	fmt.Fprint(c, "220 sink\r\n")
	var d delivery
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimRight(line, "\r\n")
		switch word := strings.ToUpper(line[:min(4, len(line))]); word {
		case "EHLO":
			fmt.Fprint(c, "250-sink\r\n250-8BITMIME\r\n250-DSN\r\n250-SIZE 100000000\r\n250 ENHANCEDSTATUSCODES\r\n")
		case "MAIL":
			d = delivery{mail: line}
			fmt.Fprint(c, "250 2.1.0 ok\r\n")
		case "RCPT":
			d.rcpts = append(d.rcpts, line)
			fmt.Fprint(c, "250 2.1.5 ok\r\n")
		case "DATA":
			fmt.Fprint(c, "354 go\r\n")
			var b strings.Builder
			for {
				l, err := r.ReadString('\n')
				if err != nil {
					return
				}
				if l == ".\r\n" {
					break
				}
				b.WriteString(strings.TrimPrefix(strings.ReplaceAll(l, "\r\n", "\n"), "."))
			}
			d.message = b.String()
			s.mu.Lock()
			s.got = append(s.got, d)
			s.mu.Unlock()
			fmt.Fprint(c, "250 2.0.0 taken\r\n")
		case "QUIT":
			fmt.Fprint(c, "221 bye\r\n")
			return
		default:
			fmt.Fprint(c, "250 ok\r\n")
		}
	}
}

// about returns the deliveries of the message with a subject.
func (s *sink) about(subject string) []delivery {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []delivery
	for _, d := range s.got {
		if strings.Contains(d.message, "\nSubject: "+subject+"\n") {
			out = append(out, d)
		}
	}
	return out
}

func (m *mta) queue(t *testing.T) (*Queue, *quarantine.Store) {
	store, err := quarantine.New(m.dir+"/quarantine", nil)
	if err != nil {
		t.Fatal(err)
	}
	q, err := New(Config{
		Name: "mta", In: []string{m.in}, Out: []string{m.out}, Work: m.dir + "/work", Token: "0123456789abcdef0123456789abcdef",
		RenderInMemory: 1 << 16, Lock: "flock", Store: store,
	})
	if err != nil {
		t.Fatal(err)
	}
	return q, store
}

// claims claims every message, by subject.
func claims(t *testing.T, q *Queue) map[string]queue.Claim {
	t.Helper()
	out := map[string]queue.Claim{}
	_, err := q.List(t.Context(), func(e queue.Entry) bool {
		c, err := q.Lock(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		f, err := c.Render(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		text, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(text), "\nSubject: ")
		subject, _, _ := strings.Cut(rest, "\n")
		out[subject] = c
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func letter(subject, more, body string) string {
	return "From: a@example.com\nTo: b@example.net\nSubject: " + subject + "\nDate: Mon, 05 Jan 2026 10:00:00 +0000\nMessage-ID: <" + subject + "@example.com>\n" + more + "\n" + body
}

// TestE2EExactBytes: what the real sendmail receives, we release, and the
// real sendmail delivers: plain, modified, split, with every parameter.
func TestE2EExactBytes(t *testing.T) {
	m := newMTA(t)
	many := make([]string, 200)
	for i := range many {
		many[i] = fmt.Sprintf("<user%d@example.net>", i)
	}
	bob := []string{"<b@example.net>"}
	mails := []struct {
		subject, from, params, more, body string
		rcpts                             []string
	}{
		{"plain", "a@example.com", "", "", "hello\n.\n..dots\n", bob},
		{"eightbit", "a@example.com", " BODY=8BITMIME", "MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\nX-Raw: \xc3\x80\xff\x9f\n", "gr\xc3\xbc\xc3\x9fe \x80\xff\n", bob},
		{"dsn", "a@example.com", " RET=HDRS ENVID=QQ+2B1", "", "hello\n", []string{"<b@example.net> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@example.net"}},
		{"many", "a@example.com", "", "", "hello\n", many},
		{"nullsender", "", "", "", "hello\n", bob},
		{"emptybody", "a@example.com", "", "", "", bob},
		{"modified", "a@example.com", "", "X-Remove: me\nX-Change: old\n", "old body\n", bob},
		{"split", "a@example.com", "", "", "body\n", []string{"<b@example.net>", "<c@example.net>", "<d@example.net>"}},
	}
	for _, x := range mails {
		m.send(x.from, x.params, x.rcpts, letter(x.subject, x.more, x.body))
	}
	q, _ := m.queue(t)
	var plans []queue.Plan
	for subject, c := range claims(t, q) {
		groups := []queue.Group{{Disposition: queue.Release}}
		edit := &queue.Edit{Header: []queue.HeaderEdit{
			{Op: queue.HeaderAdd, Name: "X-Added", Value: "gr\u00fc\u00dfe\nRPFD:<evil@example.com>"},
			{Op: queue.HeaderRemove, Name: "X-Remove"},
			{Op: queue.HeaderReplace, Name: "X-Change", Value: "new"},
		}, Body: strings.NewReader("new body\n.\nend\n")}
		switch subject {
		case "modified":
			groups[0].Edit = edit
		case "split":
			groups = []queue.Group{
				{Recipients: []int{0}, Disposition: queue.Release},
				{Recipients: []int{1}, Disposition: queue.Release, Edit: edit},
				{Recipients: []int{2}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
			}
		}
		plans = append(plans, queue.Plan{Claim: c, Groups: groups})
	}
	for _, o := range q.Commit(t.Context(), plans) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
	}
	if list := m.mailq(m.out); !strings.Contains(list, "Total requests: 9") {
		t.Errorf("mailq of what we wrote:\n%s", list)
	}
	m.deliver()
	for _, x := range mails {
		got := m.sink.about(x.subject)
		want, head := letter(x.subject, x.more, x.body), "Received: "
		switch x.subject {
		case "modified", "split":
			continue
		}
		if len(got) == 0 {
			t.Errorf("%s: not delivered; left: %s", x.subject, m.mailq(m.out))
			continue
		}
		n := 0
		for _, d := range got {
			n += len(d.rcpts)
			if !strings.HasSuffix(d.message, want) || !strings.HasPrefix(d.message, head) {
				t.Errorf("%s: delivered\n%q\nwant\n%q", x.subject, d.message, want)
			}
		}
		if n != len(x.rcpts) {
			t.Errorf("%s: %d recipients of %d", x.subject, n, len(x.rcpts))
		}
	}
	m.checkParameters(t)
	m.checkChanged(t)
}

func (m *mta) checkParameters(t *testing.T) {
	for subject, want := range map[string][]string{
		"dsn":        {"RET=HDRS", "ENVID=QQ+2B1", "NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;b@example.net"},
		"nullsender": {"<>"}, "eightbit": {"BODY=8BITMIME"},
	} {
		for _, d := range m.sink.about(subject) {
			said := d.mail + " " + strings.Join(d.rcpts, " ")
			for _, w := range want {
				if !strings.Contains(said, w) {
					t.Errorf("%s: %s is missing from %q", subject, w, said)
				}
			}
		}
	}
}

func (m *mta) checkChanged(t *testing.T) {
	changed := m.sink.about("modified")
	if len(changed) != 1 {
		t.Fatalf("modified: delivered %d times", len(changed))
	}
	head, body, _ := strings.Cut(changed[0].message, "\n\n")
	if body != "new body\n.\nend\n" {
		t.Errorf("modified: body %q", body)
	}
	if strings.Contains(head, "X-Remove") || !strings.Contains(head, "X-Change: new") || !strings.Contains(head, "X-Added: gr\u00fc\u00dfe\n\tRPFD:<evil@example.com>") {
		t.Errorf("modified: header\n%s", head)
	}
	if len(changed[0].rcpts) != 1 {
		t.Errorf("modified: recipients %q", changed[0].rcpts)
	}
	parts := m.sink.about("split")
	slices.SortFunc(parts, func(a, b delivery) int { return strings.Compare(a.rcpts[0], b.rcpts[0]) })
	if len(parts) != 2 || !strings.Contains(parts[0].rcpts[0], "b@") || !strings.Contains(parts[1].rcpts[0], "c@") ||
		!strings.HasSuffix(parts[0].message, "\n\nbody\n") || !strings.HasSuffix(parts[1].message, "\n\nnew body\n.\nend\n") {
		t.Errorf("split: %+v", parts)
	}
}

// TestE2EQuarantineRelease: an item that is released is delivered to exactly
// its recipients, once.
func TestE2EQuarantineRelease(t *testing.T) {
	m := newMTA(t)
	m.send("a@example.com", "", []string{"<b@example.net>", "<c@example.net>"}, letter("kept", "", "gr\xc3\xbc\xc3\x9fe\n"))
	q, store := m.queue(t)
	c := claims(t, q)["kept"]
	out := q.Commit(t.Context(), []queue.Plan{{Claim: c, Groups: []queue.Group{
		{Recipients: []int{0}, Disposition: queue.Quarantine, Item: []byte(`{}`)}, {Recipients: []int{1}, Disposition: queue.Drop},
	}}})
	if out[0].Err != nil {
		t.Fatal(out[0].Err)
	}
	meta, err := store.Find(t.Context(), c.Entry().ID.Name)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time does nothing
		it, err := store.Open(meta)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := it.Release(t.Context(), q, "tester", false); err != nil {
			t.Fatal(err)
		}
		it.Close()
		m.deliver()
	}
	got := m.sink.about("kept")
	if len(got) != 1 || len(got[0].rcpts) != 1 || !strings.Contains(got[0].rcpts[0], "b@example.net") || !strings.HasSuffix(got[0].message, letter("kept", "", "gr\xc3\xbc\xc3\x9fe\n")) {
		t.Fatalf("%+v", got)
	}
}

// TestE2EBesideARunner: releases while sendmail runs the outbound queue all
// the time, and its runner finds our locks on the inbound one.
func TestE2EBesideARunner(t *testing.T) {
	m := newMTA(t)
	const n = 60
	for i := range n {
		m.send("a@example.com", "", []string{"<b@example.net>"}, letter(fmt.Sprintf("beside%d", i), "", fmt.Sprintf("body %d\n", i)))
	}
	q, _ := m.queue(t)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Add(1)
	go func() {
		defer running.Done()
		for ctx.Err() == nil {
			_, _ = m.command("-qf", "-OQueueDirectory="+m.out).CombinedOutput()
		}
	}()
	all := claims(t, q)
	cmd := m.command("-qf", "-OQueueDirectory="+m.in) // an administrator's mistake
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(m.sink.got) != 0 {
		t.Fatalf("sendmail delivered %d messages that we hold the lock on", len(m.sink.got))
	}
	var plans []queue.Plan
	for _, c := range all {
		plans = append(plans, queue.Plan{Claim: c, Groups: []queue.Group{{Disposition: queue.Release}}})
	}
	for _, o := range q.Commit(t.Context(), plans) {
		if o.Err != nil {
			t.Error(o.Err)
		}
	}
	stop()
	running.Wait()
	m.deliver()
	for i := range n {
		if got := m.sink.about(fmt.Sprintf("beside%d", i)); len(got) != 1 || !strings.HasSuffix(got[0].message, fmt.Sprintf("\n\nbody %d\n", i)) {
			t.Errorf("message %d was delivered %d times", i, len(got))
		}
	}
}
