package check

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
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
	queue   string // further keys of the queue
	extra   string // further lines of the configuration
	host    Host
}

func newWorld(t *testing.T) *world {
	t.Helper()
	// Not t.TempDir below /tmp if that is a tmpfs: the checks look at file systems.
	dir := t.TempDir()
	w := &world{t: t, dir: dir, in: dir + "/in", out: dir + "/out", state: dir + "/state"}
	for _, d := range []string{w.in, w.out, w.state, dir + "/proc/77", dir + "/mail", dir + "/run"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir+"/mail/sendmail.cf", "V10/Debian\n#O DeliveryMode=queueonly\nO QueueDirectory="+w.out+"\nO DeliveryMode=background\nO PrivacyOptions=authwarnings\n")
	w.parms("-ODeliveryMode=queueonly -OQueueDirectory=" + w.in + " -OPrivacyOptions=noetrn")
	w.host = Host{
		Proc: dir + "/proc", MailDir: dir + "/mail", PidFiles: []string{dir + "/run/*.pid"},
		SMTP:    listener(t, "250-x\r\n250 HELP\r\n"),
		Sandbox: func(context.Context) ([]string, error) { return nil, nil },
		Daemon:  func(context.Context) (Daemon, error) { return Daemon{}, nil },
		Kick: func(c conf.Command) []string {
			if c.Auto {
				return []string{"/bin/true"}
			}
			return c.Words
		},
	}
	return w
}

// parms sets the listener's options as Debian does.
func (w *world) parms(text string) {
	w.t.Helper()
	write(w.t, w.dir+"/mail/sendmail.conf", "DAEMON_PARMS=\""+text+"\";\n")
}

// path puts a part of the state elsewhere.
func (w *world) path(key, to string) {
	if key != "ledger" && key != "control" {
		must(w.t, os.Chmod(to, 0o700))
	}
	w.extra = fmt.Sprintf("paths: {%s: %s}\n", key, to)
}

// running makes process 77.
func (w *world) running(cmdline string) {
	w.t.Helper()
	write(w.t, w.dir+"/proc/77/cmdline", cmdline)
}

// readOnly makes a directory that cannot be written.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
}

// fsType makes the file system of one path look like another, or full.
func (w *world) fsType(path string, change func(*unix.Statfs_t)) {
	w.host.Statfs = func(p string, buf *unix.Statfs_t) error {
		err := unix.Statfs(p, buf)
		if p == path {
			change(buf)
		}
		return err
	}
}

func (w *world) run() []Finding {
	w.t.Helper()
	path := filepath.Join(w.dir, "holdfast.yaml")
	text := fmt.Sprintf("queues: [{name: mta, type: sendmail, in: %s, out: %s%s}]\nstate: %s\nmin_free: 1MB\n%s", w.in, w.out, w.queue, w.state, w.extra)
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
	for _, want := range []string{"queue mta", "kick", "state", "rights", "user", "sandbox", "daemon", "bypass"} {
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
		{"read-only", func(t *testing.T, w *world) { readOnly(t, w.in) }, Failure, "queue mta", "cannot be written"},
		{"queue cannot be looked at", func(t *testing.T, w *world) {
			must(t, os.Remove(w.in))
			must(t, os.Symlink(w.in, w.in))
		}, Failure, "queue mta", "symbolic links"},
		{"no unnamed files", func(t *testing.T, w *world) {
			must(t, unix.Mount("/proc", w.in, "", unix.MS_BIND, ""))
			t.Cleanup(func() { must(t, unix.Unmount(w.in, unix.MNT_DETACH)) })
		}, Failure, "queue mta", "no unnamed files"},
		{"queue on NFS", func(_ *testing.T, w *world) {
			w.fsType(w.in, func(st *unix.Statfs_t) { st.Type = unix.NFS_SUPER_MAGIC })
		}, Failure, "queue mta", "on NFS"},
		{"queue on something else", func(_ *testing.T, w *world) {
			w.fsType(w.out, func(st *unix.Statfs_t) { st.Type = 0x1234 })
		}, Warning, "queue mta", "not one that Holdfast is tested on"},
		{"queue on an unknown disk", func(_ *testing.T, w *world) {
			w.host.Statfs = func(string, *unix.Statfs_t) error { return unix.EIO }
		}, Failure, "queue mta", "input/output error"},
		{"queue full", func(_ *testing.T, w *world) {
			w.fsType(w.out, func(st *unix.Statfs_t) { st.Bavail = 0 })
		}, Failure, "queue mta", "min_free"},
		{"state full", func(_ *testing.T, w *world) {
			w.fsType(w.state, func(st *unix.Statfs_t) { st.Bavail = 0 })
		}, Failure, "state", "no mail would be taken"},
		{"state cannot be made", func(t *testing.T, w *world) {
			must(t, os.Mkdir(w.dir+"/ro", 0o700))
			readOnly(t, w.dir+"/ro")
			w.state = w.dir + "/ro/state"
		}, Failure, "state", "cannot be made"},
		{"state cannot be written", func(t *testing.T, w *world) { readOnly(t, w.state) }, Failure, "state", "cannot be written"},
		{"state cannot be looked at", func(t *testing.T, w *world) {
			must(t, os.Remove(w.state))
			must(t, os.Symlink(w.state, w.state))
		}, Failure, "state", "symbolic links"},
		{"work in memory", func(t *testing.T, w *world) { w.path("work", inMemory(t)) }, Warning, "paths.work", "in memory"},
		{"ledger in memory", func(t *testing.T, w *world) { w.path("ledger", inMemory(t)+"/ledger.db") }, Failure, "paths.ledger", "in memory"},
		{"outbox in memory", func(t *testing.T, w *world) { w.path("outbox", inMemory(t)) }, Failure, "paths.outbox", "in memory"},
		{"quarantine in memory", func(t *testing.T, w *world) { w.path("quarantine", inMemory(t)) }, Failure, "paths.quarantine", "in memory"},
		{"history in memory", func(t *testing.T, w *world) { w.path("history", inMemory(t)) }, Failure, "paths.history", "in memory"},
		{"evidence in memory", func(t *testing.T, w *world) { w.path("evidence", inMemory(t)) }, Failure, "paths.evidence", "in memory"},
		{"control in memory is well", func(t *testing.T, w *world) { w.path("control", inMemory(t)+"/h.sock") }, OK, "paths.control", "with room"},
		{"control cannot be made", func(t *testing.T, w *world) {
			must(t, os.Mkdir(w.dir+"/ro", 0o700))
			readOnly(t, w.dir+"/ro")
			w.path("control", w.dir+"/ro/h.sock")
		}, Failure, "paths.control", "cannot be written"},
		{"quarantine below the state open to others", func(t *testing.T, w *world) {
			must(t, os.Mkdir(w.state+"/quarantine", 0o755))
		}, Failure, "paths.quarantine", "open to others"},
		{"quarantine full", func(t *testing.T, w *world) {
			must(t, os.Mkdir(w.dir+"/q", 0o700))
			w.path("quarantine", w.dir+"/q")
			w.fsType(w.dir+"/q", func(st *unix.Statfs_t) { st.Bavail = 0 })
		}, Failure, "paths.quarantine", "no mail would be taken"},
		{"a damaged ledger", func(t *testing.T, w *world) { write(t, w.state+"/ledger.db.damaged-20261125T010203.000", "x") }, Warning, "ledger", "damaged-2026"},
		{"paused", func(_ *testing.T, w *world) { w.host.Paused = "paused by joe" }, Warning, "pause", "no mail is taken: paused by joe"},
		{"monitor", func(_ *testing.T, w *world) { w.extra = "monitor: yes\n" }, Warning, "monitor", "released unmodified"},
		{"unscanned", func(_ *testing.T, w *world) {
			w.extra = "policy: {deliver_unscanned: yes, unscannable: release}\n"
		}, Warning, "policy", "nothing has looked at"},
		{"kick", func(_ *testing.T, w *world) { w.queue = ", kick: [/bin/true, -x]" }, OK, "kick", "delivered by /bin/true -x"},
		{"kick none", func(_ *testing.T, w *world) { w.queue = ", kick: none" }, OK, "kick", "kick: none"},
		{"kick missing", func(_ *testing.T, w *world) { w.queue = ", kick: [/nonexistent/sendmail]" }, Failure, "kick", "/nonexistent/sendmail"},
		{"kick finds none", func(_ *testing.T, w *world) { w.host.Kick = func(conf.Command) []string { return nil } }, Warning, "kick", "auto finds no sendmail"},
		{"user is root by another name", func(_ *testing.T, w *world) {
			w.host.Lookup = func(string) (*user.User, error) { return &user.User{Uid: "0"}, nil }
			w.extra = "user: toor\n"
		}, Failure, "user", "as root"},
		{"user by number", func(_ *testing.T, w *world) { w.extra = "user: \"65534\"\n" }, OK, "user", "uid 65534"},
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
		{"daemon up", func(_ *testing.T, w *world) {
			w.host.Daemon = func(context.Context) (Daemon, error) { return Daemon{PID: 4242}, nil }
		}, OK, "daemon", "4242"},
		{"daemon blocked", func(_ *testing.T, w *world) {
			w.host.Daemon = func(context.Context) (Daemon, error) { return Daemon{PID: 1, Blocked: "the disk is full"}, nil }
		}, Warning, "daemon", "takes no mail: the disk is full"},
		{"reload refused", func(_ *testing.T, w *world) {
			w.host.Daemon = func(context.Context) (Daemon, error) { return Daemon{PID: 1, ReloadRefused: "c.yaml:3: no"}, nil }
		}, Warning, "daemon", "refused: c.yaml:3: no"},
		{"daemon silent", func(_ *testing.T, w *world) {
			w.host.Daemon = func(context.Context) (Daemon, error) { return Daemon{}, errors.New("time-out") }
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
		{"runner by options of another kind", func(_ *testing.T, w *world) {
			w.running("/usr/sbin/sendmail-mta\x00-q10m\x00-oQ" + w.dir + "/i*\x00")
		}, Failure, "bypass", "process 77"},
		{"runner of the configuration's directory", func(t *testing.T, w *world) {
			write(t, w.dir+"/mail/sendmail.cf", "OQ"+w.in+"\n")
			w.running("/usr/sbin/sendmail-mta\x00-q10m\x00")
		}, Failure, "bypass", "process 77"},
		{"runner with a configuration of its own", func(t *testing.T, w *world) {
			write(t, w.dir+"/other.cf", "O QueueDirectory="+w.in+"\n")
			w.running("/usr/sbin/sendmail-mta\x00-q10m\x00-C" + w.dir + "/other.cf\x00")
		}, Failure, "bypass", "process 77"},
		{"listener and runner in one", func(t *testing.T, w *world) {
			w.running("sendmail: accepting connections")
			write(t, w.dir+"/run/x.pid", "77\n/usr/sbin/sendmail -bd -q1h -OQueueDirectory="+w.in+" -odq -OPrivacyOptions=noetrn\n")
		}, Failure, "bypass", "process 77 (sendmail: accepting connections) runs an inbound queue"},
		{"pid file of the configuration", func(t *testing.T, w *world) {
			write(t, w.dir+"/mail/sendmail.cf", "O PidFile="+w.dir+"/elsewhere\nO QueueDirectory="+w.in+"\n")
			w.running("sendmail: MTA: accepting connections")
			write(t, w.dir+"/elsewhere", "77\n/usr/sbin/sendmail -bd -q1h\n")
		}, Failure, "bypass", "process 77"},
		{"listener without a pid file", func(_ *testing.T, w *world) {
			w.running("sendmail: MTA: accepting connections")
		}, Warning, "bypass", "not verifiable: process 77"},
		{"runner whose directory is not known", func(t *testing.T, w *world) {
			must(t, os.Remove(w.dir+"/mail/sendmail.cf"))
			w.running("/usr/sbin/sendmail-mta\x00-q10m\x00")
		}, Warning, "bypass", "not verifiable: process 77"},
		{"listener running that delivers", func(t *testing.T, w *world) {
			w.running("sendmail: accepting connections")
			write(t, w.dir+"/run/x.pid", "77\n/usr/sbin/sendmail -bd -OQueueDirectory="+w.in+" -OPrivacyOptions=noetrn\n")
		}, Failure, "bypass", "process 77: the listener delivers at once"},
		{"listener past Holdfast", func(_ *testing.T, w *world) { w.parms("") }, Failure, "bypass", "past Holdfast"},
		{"listener delivers", func(_ *testing.T, w *world) { w.parms("-OQueueDirectory=" + w.in) }, Failure, "bypass", "delivers at once"},
		{"ETRN beside", func(_ *testing.T, w *world) { w.parms("-OQueueDirectory=" + w.in) }, Failure, "bypass", "may send ETRN"},
		{"ETRN in the set-up", func(_ *testing.T, w *world) {
			w.parms("-ODeliveryMode=queueonly -OQueueDirectory=" + w.in)
		}, Failure, "bypass", "may send ETRN"},
		{"in and out swapped", func(_ *testing.T, w *world) {
			w.parms("-ODeliveryMode=queueonly -OPrivacyOptions=noetrn -OQueueDirectory=" + w.out)
		}, Failure, "bypass", "look swapped"},
		{"listener not seen", func(t *testing.T, w *world) { must(t, os.Remove(w.dir+"/mail/sendmail.conf")) }, Warning, "bypass", "was not examined: neither"},
		{"no sendmail.cf", func(t *testing.T, w *world) { must(t, os.Remove(w.dir+"/mail/sendmail.cf")) }, Warning, "bypass", "was not examined: open"},
		{"nobody named for ETRN", func(_ *testing.T, w *world) { w.host.SMTP = "" }, Warning, "bypass", "ETRN was not checked"},
		{"nobody to ask for ETRN", func(_ *testing.T, w *world) { w.host.SMTP = "127.0.0.1:1" }, Warning, "bypass", "ETRN was not checked"},
		{"no SMTP", func(t *testing.T, w *world) { w.host.SMTP = listener(t, "500 what?\r\n") }, Warning, "bypass", "ETRN was not checked"},
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
	write(t, w.dir+"/run/x.pid", "101\n/usr/sbin/sendmail -bd -odq -OQueueDirectory="+w.in+" -OPrivacyOptions=noetrn\n")
	for i, line := range []string{
		"sendmail: Queue runner@00:10:00 for " + w.out,
		"sendmail: accepting connections",
		"/usr/sbin/sendmail-mta\x00-bd\x00-ODeliveryMode=queueonly\x00-OPrivacyOptions=noetrn\x00-OQueueDirectory=" + w.in,
		"/usr/sbin/sendmail-mta\x00-q10m\x00-OQueueDirectory=" + w.in + "2\x00",
		"/usr/sbin/sendmail\x00-Ac\x00-q20m\x00",
		"/usr/sbin/sendmail\x00-t\x00",
		"sendmail: server [192.0.2.1] cmd read",
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
			return // nobody asked
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
