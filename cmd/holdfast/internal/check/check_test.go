package check

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/conf"
)

// world is a healthy machine, on which a test breaks one thing.
type world struct {
	t       *testing.T
	dir     string
	in, out string
	state   string
	extra   string // further lines of the configuration
	host    Host
}

func newWorld(t *testing.T) *world {
	t.Helper()
	// Not t.TempDir below /tmp if that is a tmpfs: the checks look at file systems.
	dir := t.TempDir()
	w := &world{t: t, dir: dir, in: dir + "/in", out: dir + "/out", state: dir + "/state"}
	for _, d := range []string{w.in, w.out, w.state, dir + "/proc/77", dir + "/mail"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	w.host = Host{
		Proc: dir + "/proc", MailDir: dir + "/mail",
		Sandbox: func(context.Context) ([]string, error) { return nil, nil },
		Daemon:  func(context.Context) (int, error) { return 0, nil },
	}
	return w
}

func (w *world) run() []Finding {
	w.t.Helper()
	path := filepath.Join(w.dir, "holdfast.yaml")
	text := fmt.Sprintf("queues: [{name: mta, type: sendmail, in: %s, out: %s}]\nstate: %s\nmin_free: 1MB\n%s", w.in, w.out, w.state, w.extra)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	c, err := conf.Load(path)
	if err != nil {
		w.t.Fatal(err)
	}
	return Run(w.t.Context(), c, w.host)
}

func TestAHealthyMachineHasNoComplaint(t *testing.T) {
	all := newWorld(t).run()
	if Worst(all) != OK {
		t.Fatalf("%+v", all)
	}
	topics := map[string]bool{}
	for _, f := range all {
		topics[f.Topic] = true
	}
	for _, want := range []string{"queue mta", "state", "rights", "user", "sandbox", "daemon", "bypass"} {
		if !topics[want] {
			t.Errorf("nothing is said about %s", want)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// inMemory makes a directory on a tmpfs of the test's own.
func inMemory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("none", dir, "tmpfs", 0, "size=8m"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func TestEachFaultIsFoundAndSaysWhatToDo(t *testing.T) {
	// Mounts of this test stay in a namespace of its thread.
	runtime.LockOSThread()
	must(t, unix.Unshare(unix.CLONE_NEWNS))
	must(t, unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))

	cases := []struct {
		name  string
		spoil func(t *testing.T, w *world)
		level Level
		topic string
		text  string
	}{
		{"inbound missing", func(t *testing.T, w *world) { must(t, os.Remove(w.in)) }, Failure, "queue mta", "does not exist"},
		{"pattern without match", func(_ *testing.T, w *world) { w.in = w.dir + "/q*" }, Failure, "queue mta", "does not exist"},
		{"a file for a directory", func(t *testing.T, w *world) { must(t, os.Remove(w.out)); write(t, w.out, "x") }, Failure, "queue mta", "not a directory"},
		{"open to all", func(t *testing.T, w *world) { must(t, os.Chmod(w.in, 0o777)) }, Failure, "queue mta", "everybody may write"},
		{"two file systems", func(t *testing.T, w *world) { w.out = inMemory(t) }, Failure, "queue mta", "another file system"},
		{"queue in memory", func(t *testing.T, w *world) {
			m := inMemory(t)
			w.in, w.out = m+"/a", m+"/b"
			must(t, os.Mkdir(w.in, 0o700))
			must(t, os.Mkdir(w.out, 0o700))
		}, Failure, "queue mta", "in memory"},
		{"read-only", func(t *testing.T, w *world) {
			must(t, unix.Mount(w.in, w.in, "", unix.MS_BIND, ""))
			t.Cleanup(func() { must(t, unix.Unmount(w.in, unix.MNT_DETACH)) })
			must(t, unix.Mount("", w.in, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		}, Failure, "queue mta", "cannot be written"},
		{"state in memory", func(t *testing.T, w *world) { w.state = inMemory(t); must(t, os.Chmod(w.state, 0o700)) }, Failure, "state", "in memory"},
		{"state open to others", func(t *testing.T, w *world) { must(t, os.Chmod(w.state, 0o755)) }, Failure, "state", "open to others"},
		{"state is a file", func(t *testing.T, w *world) { must(t, os.Remove(w.state)); write(t, w.state, "x") }, Failure, "state", "not a directory"},
		{"not root", func(_ *testing.T, w *world) { w.host.UID = 1000 }, Warning, "rights", "uid 1000"},
		{"notify missing", func(_ *testing.T, w *world) { w.extra = "notify: {command: [/nonexistent/tell]}\n" }, Failure, "notify", "no such file"},
		{"notify no program", func(t *testing.T, w *world) {
			write(t, w.dir+"/tell", "x")
			w.extra = "notify: {command: [" + w.dir + "/tell]}\n"
		}, Failure, "notify", "not a program"},
		{"notify of others", func(t *testing.T, w *world) {
			write(t, w.dir+"/tell", "x")
			must(t, os.Chmod(w.dir+"/tell", 0o777))
			w.extra = "notify: {command: [" + w.dir + "/tell]}\n"
		}, Failure, "notify", "others may write"},
		{"notify", func(_ *testing.T, w *world) { w.extra = "notify: {command: [/bin/true]}\n" }, OK, "notify", "is told"},
		{"no such user", func(_ *testing.T, w *world) { w.extra = "user: nosuchuser\n" }, Failure, "user", "does not exist"},
		{"sandbox broken", func(_ *testing.T, w *world) {
			w.host.Sandbox = func(context.Context) ([]string, error) { return nil, errors.New("no landlock") }
		}, Failure, "sandbox", "no landlock"},
		{"sandbox leaky", func(_ *testing.T, w *world) {
			w.host.Sandbox = func(context.Context) ([]string, error) { return []string{"connect"}, nil }
		}, Failure, "sandbox", "connect"},
		{"sandbox leaky by choice", func(_ *testing.T, w *world) {
			w.extra = "sandbox: best-effort\n"
			w.host.Sandbox = func(context.Context) ([]string, error) { return []string{"connect"}, nil }
		}, Warning, "sandbox", "connect"},
		{"daemon up", func(_ *testing.T, w *world) { w.host.Daemon = func(context.Context) (int, error) { return 4242, nil } }, OK, "daemon", "4242"},
		{"daemon silent", func(_ *testing.T, w *world) {
			w.host.Daemon = func(context.Context) (int, error) { return 0, errors.New("time-out") }
		}, Warning, "daemon", "time-out"},
		{"runner by title", func(t *testing.T, w *world) {
			write(t, w.dir+"/proc/77/cmdline", "sendmail: Queue runner@00:10:00 for "+w.in)
		}, Failure, "bypass", "process 77"},
		{"run by title", func(t *testing.T, w *world) {
			write(t, w.dir+"/proc/77/cmdline", "sendmail: running queue: "+w.in)
		}, Failure, "bypass", "process 77"},
		{"runner by options", func(t *testing.T, w *world) {
			write(t, w.dir+"/proc/77/cmdline", "/usr/sbin/sendmail-mta\x00-q10m\x00-OQueueDirectory="+w.in+"\x00")
		}, Failure, "bypass", "process 77"},
		{"no proc", func(t *testing.T, w *world) { must(t, os.RemoveAll(w.dir+"/proc")) }, Warning, "bypass", "cannot be listed"},
		{"listener delivers", func(t *testing.T, w *world) {
			write(t, w.dir+"/mail/sendmail.conf", "DAEMON_PARMS=\"\";\n")
		}, Failure, "bypass", "delivers at once"},
		{"ETRN in the set-up", func(t *testing.T, w *world) {
			write(t, w.dir+"/mail/sendmail.conf", "DAEMON_PARMS=\"-ODeliveryMode=queueonly\";\n")
		}, Failure, "bypass", "ETRN"},
		{"ETRN offered", func(t *testing.T, w *world) { w.host.SMTP = listener(t, "250-x\r\n250-ETRN\r\n250 HELP\r\n") }, Failure, "bypass", "offers ETRN"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			runtime.LockOSThread() // the subtest's own goroutine: give it the namespace too
			must(t, unix.Unshare(unix.CLONE_NEWNS))
			w := newWorld(t)
			c.spoil(t, w)
			all := w.run()
			for _, f := range all {
				if f.Topic == c.topic && f.Level == c.level && strings.Contains(f.Text, c.text) {
					if f.Level != OK && f.Do == "" {
						t.Fatalf("%q does not say what to do", f.Text)
					}
					return
				}
			}
			t.Fatalf("not found: %s %s %q in\n%+v", c.level, c.topic, c.text, all)
		})
	}
}

func TestNothingIsHeldAgainstAnInnocentSetup(t *testing.T) {
	w := newWorld(t)
	write(t, w.dir+"/mail/sendmail.conf", "DAEMON_PARMS=\"-ODeliveryMode=queueonly -OPrivacyOptions=noetrn\";\n")
	w.host.SMTP = listener(t, "250-x\r\n250 HELP\r\n")
	for i, line := range []string{
		"sendmail: Queue runner@00:10:00 for " + w.out,
		"sendmail: accepting connections",
		"/usr/sbin/sendmail-mta\x00-bd\x00-ODeliveryMode=queueonly\x00-OQueueDirectory=" + w.in,
		"vi\x00" + w.in + "/notes on a queue runner for " + w.in,
		"sendmail: Queue runner@00:10:00 for " + w.in + "2",
	} {
		must(t, os.MkdirAll(fmt.Sprintf("%s/proc/%d", w.dir, i+100), 0o700))
		write(t, fmt.Sprintf("%s/proc/%d/cmdline", w.dir, i+100), line)
	}
	if all := w.run(); Worst(all) != OK {
		t.Fatalf("%+v", all)
	}
}

func TestLowSpaceIsAFailure(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(w.dir, "c.yaml")
	write(t, path, fmt.Sprintf("queues: [{name: mta, type: sendmail, in: %s, out: %s}]\nstate: %s\nmin_free: 900000GB\n", w.in, w.out, w.state))
	c, err := conf.Load(path)
	must(t, err)
	for _, f := range Run(t.Context(), c, w.host) {
		if f.Level == Failure && strings.Contains(f.Text, "min_free") {
			return
		}
	}
	t.Fatal("not found")
}

// listener answers one SMTP session with the given reply to EHLO.
func listener(t *testing.T, ehlo string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprint(c, "220 mx.example.org ESMTP\r\n")
		r := bufio.NewReader(c)
		if _, err := r.ReadString('\n'); err != nil {
			return
		}
		fmt.Fprint(c, ehlo)
		if _, err := r.ReadString('\n'); err != nil {
			return
		}
	}()
	return l.Addr().String()
}
