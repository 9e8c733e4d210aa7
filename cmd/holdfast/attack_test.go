package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/cmd/holdfast/internal/gateway"
	"holdfast/cmd/holdfast/internal/sample"
)

// logLines are the lines of a JSON log, decoded.
func logLines(t *testing.T, text string) (out []map[string]any) {
	t.Helper()
	for line := range strings.Lines(text) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		out = append(out, m)
	}
	return out
}

// settledLines are the log's lines about messages, by queue id.
func settledLines(t *testing.T, text string) map[string]map[string]any {
	t.Helper()
	out := map[string]map[string]any{}
	for _, m := range logLines(t, text) {
		if m["msg"] != "message" {
			continue
		}
		id, _ := m["id"].(string)
		if out[id] != nil {
			t.Errorf("two lines about %s", id)
		}
		out[id] = m
	}
	return out
}

// bait is what an attacker finds who gets out: another message that every
// user may read and change, a directory to write into, and two listeners.
type bait struct {
	dir       string
	tcp, sock net.Listener
	before    string
}

func newBait(t *testing.T) *bait {
	t.Helper()
	b := &bait{dir: t.TempDir()}
	var err error
	if b.tcp, err = net.Listen("tcp", "127.0.0.1:0"); err == nil {
		b.sock, err = net.Listen("unix", b.dir+"/sock")
	}
	if err == nil {
		err = os.WriteFile(b.dir+"/dfOTHER", []byte("another message\n"), 0o666)
	}
	if err == nil {
		err = os.Mkdir(b.dir+"/mnt", 0o777)
	}
	for _, path := range []string{filepath.Dir(b.dir), b.dir, b.dir + "/dfOTHER", b.dir + "/sock"} {
		if err == nil {
			err = os.Chmod(path, 0o777)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.tcp.Close(); b.sock.Close() })
	b.before = b.look(t)
	return b
}

// look describes everything that an attack could have changed.
func (b *bait) look(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(b.dir, e.Name()), &st); err != nil {
			t.Fatal(err)
		}
		names, _ := unix.Llistxattr(filepath.Join(b.dir, e.Name()), nil)
		fmt.Fprintln(&out, e.Name(), st.Ino, st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Mtim, names)
	}
	return out.String()
}

// called says whether somebody connected.
func called(l net.Listener) bool {
	_ = l.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(time.Millisecond))
	c, err := l.Accept()
	if err == nil {
		c.Close()
	}
	return err == nil
}

// TestWorkersAttackFromInside: in a running gateway each message but the
// first few has its worker try something that no parser needs. Each try is
// refused, the worker goes on, and all the mail leaves.
func TestWorkersAttackFromInside(t *testing.T) {
	b := newBait(t)
	_, port, err := net.SplitHostPort(b.tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, mine := b.dir+"/dfOTHER", b.dir+"/dfMINE"
	tries := []string{
		"read-batch", "read-message " + other, "read-parent", "read-memory", "read-passwd",
		"write-queue " + b.dir + "/qfNEW", "link-queue " + other + " " + mine, "remove-queue " + other, "rename-queue " + other + " " + mine,
		"connect-tcp " + port, "connect-unix " + b.dir + "/sock", "exec", "fork", "ptrace", "signal",
		"chmod " + other, "chown " + other, "flock", "lock", "truncate " + other, "setxattr " + other, "mount " + b.dir + "/mnt", "unshare",
	}
	ms := sample.Demo(30, -1, -1)
	for i, try := range tries {
		name, args, _ := strings.Cut(try, " ")
		ms[i].Header += "X-Holdfast-Fault: attack-" + name + "@part " + args + "\n"
	}
	s := newSite(t, ms, "log: {format: json}\nbatch: {messages: 10}\n")
	// Their own queue is as open to them as the bait.
	for _, dir := range []string{s.in, s.out} {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	code, out, errs := s.run(faulty, "run", "--drain")
	if code != 0 {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	s.account(nil, nil)
	lines := settledLines(t, errs)
	for i, try := range tries {
		name, _, _ := strings.Cut(try, " ")
		if _, ok := lines[ms[i].ID]["ms_refused-"+name]; !ok {
			t.Errorf("%s: its worker does not say that it was refused: %v", name, lines[ms[i].ID])
		}
	}
	if i := slices.IndexFunc(logLines(t, errs), func(m map[string]any) bool { return m["msg"] == gateway.EventDeath || m["msg"] == gateway.EventCrash }); i >= 0 {
		t.Errorf("something died of it:\n%.3000s", errs)
	}
	if now := b.look(t); now != b.before {
		t.Errorf("the bait was\n%sand is\n%s", b.before, now)
	}
	if called(b.tcp) || called(b.sock) {
		t.Error("a worker has called")
	}
}
