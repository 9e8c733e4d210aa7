//go:build e2e

package postfix

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/queue"
	"holdfast/queue/quarantine"
)

// mta is a private Postfix: its own configuration, queues and ports, and a
// smart host that records all it gets. .ci/postfix-setup installs the programs.
type mta struct {
	t              testing.TB
	dir            string // everything is in it, and other users may enter it
	etc, spool     string
	smtp, listener string // host:port; the second one is for changed mail
	sink           *sink
	expected       []*regexp.Regexp // warnings that a test brings about
}

// mtaOptions are what tests want otherwise.
type mtaOptions struct {
	main     []string // lines for main.cf
	byHeader bool     // header_checks hold, local mail too; otherwise smtpd does
	stopped  bool     // not started yet
}

// program builds the program once: with tags "" or "faults".
var program = func() func(t testing.TB, tags string) string {
	var mu sync.Mutex
	built := map[string]string{}
	return func(t testing.TB, tags string) string {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if built[tags] == "" {
			path := filepath.Join(binaryDir, "holdfast-"+tags)
			if out, err := exec.Command("go", "build", "-tags", tags, "-o", path, "holdfast/cmd/holdfast").CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			built[tags] = path
		}
		return built[tags]
	}
}()

var binaryDir string

func TestMain(m *testing.M) {
	var err error
	if binaryDir, err = os.MkdirTemp("", "holdfast-e2e-"); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(binaryDir)
	os.Exit(code)
}

func newMTA(t testing.TB, o mtaOptions) *mta {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "holdfast-postfix-") // t.TempDir lets nobody else in
	if err != nil {
		t.Fatal(err)
	}
	m := &mta{t: t, dir: dir, etc: dir + "/etc", spool: dir + "/spool", sink: newSink(t)}
	t.Cleanup(func() {
		m.command("postfix", "stop").Run() //nolint:errcheck // it may be stopped
		m.inspect()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	m.smtp, m.listener = freeAddress(t), freeAddress(t)
	m.configure(o)
	if !o.stopped {
		m.start()
	}
	return m
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (m *mta) configure(o mtaOptions) {
	m.t.Helper()
	must := func(err error) {
		m.t.Helper()
		if err != nil {
			m.t.Fatal(err)
		}
	}
	must(os.Chmod(m.dir, 0o755))
	for _, d := range []string{m.spool, m.dir + "/data", m.dir + "/work"} {
		must(os.Mkdir(d, 0o755))
	}
	must(exec.Command("cp", "-rL", "/etc/postfix", m.etc).Run())
	if _, err := os.Stat(m.etc + "/master.cf"); err != nil {
		must(exec.Command("cp", "/usr/share/postfix/master.cf.dist", m.etc+"/master.cf").Run())
	}
	must(exec.Command("chown", "postfix", m.dir+"/data").Run())
	_, sinkPort, _ := net.SplitHostPort(m.sink.address)
	main := append([]string{
		"compatibility_level = 3.6", "queue_directory = " + m.spool, "data_directory = " + m.dir + "/data",
		"myhostname = mx.example.org", "mydestination =", "inet_protocols = ipv4", "mynetworks = 127.0.0.0/8",
		"relayhost = [127.0.0.1]:" + sinkPort, "alias_maps =", "alias_database =",
		"maillog_file = " + m.dir + "/log", "maillog_file_prefixes = " + m.dir,
		"smtp_line_length_limit = 0", // the sink wants to see what was in the queue file
		"in_flow_delay = 0", "smtpd_client_connection_count_limit = 0", "minimal_backoff_time = 5s", "queue_run_delay = 5s",
	}, o.main...)
	must(os.WriteFile(m.etc+"/main.cf", []byte(strings.Join(main, "\n")+"\n"), 0o644))
	m.run("postconf", "-MX", "smtp/inet")
	m.run("postconf", "-M", m.smtp+"/inet = "+m.smtp+" inet n - n - - smtpd", "postlog/unix-dgram = postlog unix-dgram n - n - 1 postlogd")
	m.run("postconf", "-P", m.smtp+"/inet/smtpd_recipient_limit=5000") // the second one has the usual 1000
	m.run("postconf", "-F", "*/*/chroot = n")
	m.setup(o.byHeader)
}

// setup does what `holdfast setup postfix --print` says, but for the reload.
func (m *mta) setup(byHeader bool) {
	m.t.Helper()
	args := []string{"setup", "postfix", "--print", "--postfix", m.etc, "--reinject", m.listener}
	if !byHeader {
		args = append(args, "--smtp-only")
	}
	out, err := exec.Command(program(m.t, ""), args...).Output()
	if err != nil {
		m.t.Fatal(err)
	}
	lines := slices.DeleteFunc(strings.Split(string(out), "\n"), func(s string) bool { return strings.HasPrefix(s, "postfix ") })
	cmd := exec.Command("sh", "-e")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n"))
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
}

// command is one of Postfix's.
func (m *mta) command(name string, args ...string) *exec.Cmd {
	return command(context.Background(), m.etc, name, args...)
}

func (m *mta) run(name string, args ...string) string {
	m.t.Helper()
	out, err := m.command(name, args...).CombinedOutput()
	if err != nil {
		m.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func (m *mta) stop() { m.t.Helper(); m.run("postfix", "stop") }

// start starts it and waits for both listeners.
func (m *mta) start() {
	m.t.Helper()
	m.run("postfix", "start")
	for _, address := range []string{m.smtp, m.listener} {
		m.until(address+" is listened to", func() bool {
			c, err := net.Dial("tcp", address)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
	}
}

// until waits for what must come. Only a test that has failed waits for long.
func (m *mta) until(what string, ok func() bool) {
	m.t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			log, _ := os.ReadFile(m.dir + "/log")
			m.t.Fatalf("it does not happen that %s\nqueues %v\n%s", what, m.queues(), log[max(0, len(log)-5000):])
		}
	}
}

// expect names a warning that Postfix may log, and why it is none.
func (m *mta) expect(pattern, why string) {
	m.t.Helper()
	if why == "" {
		m.t.Fatal("no reason")
	}
	m.expected = append(m.expected, regexp.MustCompile(pattern))
}

var complaint = regexp.MustCompile(`warning:|fatal:|panic:|error:`)

// inspect: Postfix had nothing to complain of, and set no file aside.
func (m *mta) inspect() {
	m.t.Helper()
	if bad := m.files("corrupt"); len(bad) > 0 {
		m.t.Errorf("Postfix takes these for corrupt: %q", bad)
	}
	log, err := os.ReadFile(m.dir + "/log")
	if err != nil {
		m.t.Error(err)
	}
	for line := range strings.Lines(string(log)) {
		known := slices.ContainsFunc(m.expected, func(r *regexp.Regexp) bool { return r.MatchString(line) })
		if complaint.MatchString(line) && !known {
			m.t.Errorf("Postfix says: %s", line)
		}
	}
	if m.t.Failed() {
		m.t.Logf("%s", log[max(0, len(log)-20_000):])
	}
}

// files are the files of one of the queues, at any depth, by queue id.
func (m *mta) files(queueName string) (ids []string) {
	err := filepath.WalkDir(filepath.Join(m.spool, queueName), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			ids = append(ids, d.Name())
		}
		return nil // what is gone meanwhile is not there
	})
	if err != nil {
		m.t.Error(err)
	}
	return ids
}

func (m *mta) held() []string { return m.files("hold") }

// queues says what is where.
func (m *mta) queues() map[string][]string {
	out := map[string][]string{}
	for _, name := range []string{"maildrop", "incoming", "active", "deferred", "hold", "corrupt"} {
		if ids := m.files(name); len(ids) > 0 {
			out[name] = ids
		}
	}
	return out
}

// settle waits until all is delivered that will be: then what the sink has is
// all that it will ever have.
func (m *mta) settle() {
	m.t.Helper()
	m.until("all mail is delivered", func() bool {
		for range 2 { // what moves from one to the next may be missed once
			for _, name := range []string{"maildrop", "incoming", "active", "deferred"} {
				if len(m.files(name)) > 0 {
					return false
				}
			}
		}
		return true
	})
}

// mail is one message as a client sends it.
type mail struct {
	from, params string
	rcpts        []string // with their brackets and parameters
	text         string   // LF line ends
}

// send speaks SMTP to Postfix, and returns the queue id.
func (m *mta) send(x mail) string {
	m.t.Helper()
	id, err := deliver(m.smtp, "client.example.com", x)
	if err != nil {
		m.t.Fatal(err)
	}
	return id
}

// deliver is one SMTP session. It returns the queue id that the server names.
func deliver(address, helo string, x mail) (id string, err error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return "", err
	}
	r := bufio.NewReader(c)
	say := func(code, line string) {
		if err != nil {
			return
		}
		if line != "" {
			_, err = c.Write([]byte(line + "\r\n"))
		}
		for err == nil {
			var reply string
			reply, err = r.ReadString('\n')
			switch {
			case err == nil && !strings.HasPrefix(reply, code):
				err = fmt.Errorf("%.80q is answered by %q", line, reply)
			case err == nil && reply[3] == ' ':
				if _, q, ok := strings.Cut(reply, "queued as "); ok {
					id = strings.TrimSpace(q)
				}
				return
			}
		}
	}
	say("220", "")
	say("250", "EHLO "+helo)
	say("250", "MAIL FROM:<"+x.from+">"+x.params)
	for _, to := range x.rcpts {
		say("250", "RCPT TO:"+to)
	}
	say("354", "DATA")
	say("250", wire(x.text)+".")
	say("221", "QUIT")
	return id, err
}

// wire is a text as SMTP transports it: CRLF line ends, dots doubled.
func wire(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if line[0] == '.' {
			b.WriteByte('.')
		}
		b.WriteString(strings.TrimSuffix(line, "\n") + "\r\n")
	}
	return b.String()
}

// sink is an SMTP server that records what it gets.
type sink struct {
	address string
	mu      sync.Mutex
	got     []delivery
	refuse  func(text string) bool // answers "later" instead; may be nil
}

type delivery struct {
	mail    string   // the command, without SIZE
	rcpts   []string // the commands
	message string   // LF line ends, dots undone
}

func newSink(t testing.TB) *sink {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sink{address: l.Addr().String()}
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

var sizeOf = regexp.MustCompile(` SIZE=\d+`)

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
		switch strings.ToUpper(line[:min(4, len(line))]) {
		case "EHLO":
			fmt.Fprint(c, "250-sink\r\n250-8BITMIME\r\n250-DSN\r\n250-SMTPUTF8\r\n250-SIZE 100000000\r\n250 ENHANCEDSTATUSCODES\r\n")
			continue
		case "MAIL":
			d = delivery{mail: sizeOf.ReplaceAllString(line, "")}
		case "RCPT":
			d.rcpts = append(d.rcpts, line)
		case "DATA":
			fmt.Fprint(c, "354 go\r\n")
			if d.message, err = dotted(r); err != nil {
				return
			}
			if !s.take(d) {
				fmt.Fprint(c, "451 4.0.0 later\r\n")
				continue
			}
		case "QUIT":
			fmt.Fprint(c, "221 bye\r\n")
			return
		}
		fmt.Fprint(c, "250 2.0.0 ok\r\n")
	}
}

// take records a delivery, before the client is told.
func (s *sink) take(d delivery) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse != nil && s.refuse(d.message) {
		return false
	}
	s.got = append(s.got, d)
	return true
}

// dotted reads up to the line with the dot.
func dotted(r *bufio.Reader) (string, error) {
	var b strings.Builder
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return "", err
		}
		if line == ".\r\n" {
			return b.String(), nil
		}
		if cut, ok := strings.CutSuffix(line, "\r\n"); ok {
			line = cut + "\n"
		}
		b.WriteString(strings.TrimPrefix(line, "."))
	}
}

// about are the deliveries of the message with a subject.
func (s *sink) about(subject string) (out []delivery) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.got {
		if subjectOf(d.message) == subject {
			out = append(out, d)
		}
	}
	return out
}

func subjectOf(text string) string {
	_, rest, _ := strings.Cut(text, "\nSubject: ")
	subject, _, _ := strings.Cut(rest, "\n")
	return subject
}

// config is a queue over this Postfix, as the program makes it.
func (m *mta) config(release Release, modify Modify) Config {
	m.t.Helper()
	ask, err := Ask(context.Background(), m.etc)
	if err != nil {
		m.t.Fatal(err)
	}
	if ask.Dir != m.spool || !ask.Known() {
		m.t.Fatalf("Postfix says %+v", ask)
	}
	return Config{
		Name: "mta", Dir: ask.Dir, Hashed: ask.Hashed, Work: m.dir + "/work", Token: "0123456789abcdef0123456789abcdef",
		RenderInMemory: 1 << 16, PostfixConfig: m.etc, Release: release, Modify: modify, Listener: m.listener,
		RecipientLimit: ask.RecipientLimit, Store: m.store(), Journal: &fileJournal{path: m.dir + "/journal"},
		Report: func(e Event) { m.t.Errorf("reported: %+v", e) },
	}
}

func (m *mta) store() *quarantine.Store {
	m.t.Helper()
	s, err := quarantine.New(m.dir+"/quarantine", nil)
	if err != nil {
		m.t.Fatal(err)
	}
	return s
}

// open makes a queue.
func open(t testing.TB, c Config) *Queue {
	t.Helper()
	q, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Close)
	return q
}

// claims claims every message on hold, by subject.
func claims(t testing.TB, q *Queue) map[string]queue.Claim {
	t.Helper()
	out := map[string]queue.Claim{}
	_, err := q.List(context.Background(), func(e queue.Entry) bool {
		c, err := q.Lock(context.Background(), e)
		if err == nil {
			_, err = c.Read(context.Background())
		}
		if err != nil {
			t.Fatal(err)
		}
		out[subjectOf(rendered(t, c))] = c
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func rendered(t testing.TB, c queue.Claim) string {
	t.Helper()
	f, err := c.Render(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// commit carries out plans, wakes Postfix, and demands success.
func (m *mta) commit(q *Queue, plans ...queue.Plan) [][]string {
	m.t.Helper()
	var ids []string
	var out [][]string
	for _, o := range q.Commit(context.Background(), plans) {
		if o.Err != nil {
			m.t.Error(o.Err)
		}
		ids = append(ids, o.NewIDs...)
		out = append(out, o.NewIDs)
	}
	if err := q.Kick(context.Background(), ids); err != nil {
		m.t.Error(err)
	}
	return out
}

// configured writes a configuration of the program for this Postfix.
func (m *mta) configured(extra string) {
	m.t.Helper()
	text := fmt.Sprintf("state: %s/state\nqueues: [{name: mta, type: postfix, dir: %s, config: %s, reinject: %q%s}]\nmin_free: 1MB\nlog: {level: warning}\nworkers: 1\n",
		m.dir, m.spool, m.etc, m.listener, extra)
	if err := os.WriteFile(m.dir+"/holdfast.yaml", []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// holdfast runs the program to its end.
func (m *mta) holdfast(tags string, args ...string) (out string, err error) {
	m.t.Helper()
	b, err := exec.Command(program(m.t, tags), append(args, "-c", m.dir+"/holdfast.yaml")...).CombinedOutput()
	return string(b), err
}
