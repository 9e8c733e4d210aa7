package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/cmd/holdfast/internal/sample"
)

// TestAnAdministratorMeanwhile: while the daemon works, somebody with sendmail's
// own lock takes messages away, deletes some, puts others back by mv, and
// copies others back by cp, which gives them new inodes. What he took comes
// back only by him, nothing is lost, nothing is doubled.
func TestAnAdministratorMeanwhile(t *testing.T) {
	s := newSite(t, sample.Demo(900, -1, -1), "log: {level: error}\nbatch: {messages: 7}\nworkers: 1\n")
	away := filepath.Join(s.dir, "away")
	if err := os.Mkdir(away, 0o700); err != nil {
		t.Fatal(err)
	}
	s.daemon(normal)
	const (
		deleted = "deleted"
		taken   = "taken away"
		moved   = "moved back"
		copied  = "copied back"
	)
	fate := map[string]string{}
	for i, m := range s.messages {
		if i%5 != 0 {
			continue
		}
		want := []string{deleted, taken, moved, copied}[i/5%4]
		if !s.take(m.ID, away, want == deleted) {
			continue
		}
		fate[m.ID] = want
		for _, kind := range []string{"df", "qf"} { // data file first, as sendmail does
			from, to := filepath.Join(away, kind+m.ID), filepath.Join(s.in, kind+m.ID)
			var err error
			switch want {
			case moved:
				err = os.Rename(from, to)
			case copied:
				err = exec.Command("cp", "-p", from, to).Run()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	count := map[string]int{}
	for _, f := range fate {
		count[f]++
	}
	if len(count) < 4 {
		t.Fatalf("the administrator was too slow: %v", count)
	}
	s.until("the inbound queue is empty", func() bool {
		left, err := filepath.Glob(s.in + "/*")
		return err == nil && len(left) == 0
	})
	if n := len(s.items()); n > 0 {
		t.Errorf("%d items are in quarantine", n)
	}
	for _, m := range s.messages {
		control, err := os.ReadFile(filepath.Join(s.out, "qf"+m.ID))
		body, berr := os.ReadFile(filepath.Join(s.out, "df"+m.ID))
		out := err == nil && berr == nil && bytes.Equal(control, m.Control()) && bytes.Equal(body, m.Body)
		kept, kerr := os.ReadFile(filepath.Join(away, "df"+m.ID))
		switch f := fate[m.ID]; {
		case f == deleted && !errors.Is(err, fs.ErrNotExist):
			t.Errorf("%s was deleted and is out", m.ID)
		case f == taken && (out || kerr != nil || !bytes.Equal(kept, m.Body)):
			t.Errorf("%s was taken away: out %v, %v", m.ID, out, kerr)
		case f != deleted && f != taken && !out:
			t.Errorf("%s (%s) is lost: %v %v", m.ID, f, err, berr)
		}
	}
	t.Logf("%v of %d", count, len(s.messages))
}

// take moves a message away, or deletes it, under sendmail's lock; false if
// somebody else has it.
func (s *site) take(id, away string, remove bool) bool {
	s.t.Helper()
	path := filepath.Join(s.in, "qf"+id)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false
	}
	var a, b syscall.Stat_t
	if syscall.Stat(path, &a) != nil || syscall.Fstat(int(f.Fd()), &b) != nil || a.Ino != b.Ino {
		return false
	}
	for _, kind := range []string{"qf", "df"} {
		from := filepath.Join(s.in, kind+id)
		if remove {
			err = os.Remove(from)
		} else {
			err = os.Rename(from, filepath.Join(away, kind+id))
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return true
}

// TestABacklogDoesNotHoldUpTodaysMail: beside 50,000 old messages in four
// directories new ones leave while the daemon works, one after the other, and no
// directory starves.
func TestABacklogDoesNotHoldUpTodaysMail(t *testing.T) {
	const backlog, dirs = 50_000, 4
	s := newSite(t, nil, "log: {level: error}\n")
	var names [dirs]string
	for d := range names {
		names[d] = fmt.Sprintf("%s/q%d", s.in, d)
		if err := os.Mkdir(names[d], 0o700); err != nil {
			t.Fatal(err)
		}
		s.fillBacklog(names[d], d*backlog/dirs, backlog/dirs)
	}
	s.in += "/q*"
	s.write("log: {level: error}\n")
	s.daemon(normal)
	s.until("the daemon works on the backlog", func() bool {
		left, err := filepath.Glob(s.out + "/qf*")
		return err == nil && len(left) > 0
	})
	for i := range 5 {
		m := sample.Message{ID: sample.ID(backlog + i), T: 1_795_538_128, From: "a@example.com", To: []string{"b@example.net"}, Header: "Subject: new\n", Body: []byte("new\n")}
		if err := m.Write(names[i%dirs]); err != nil {
			t.Fatal(err)
		}
		s.until("a new message leaves", func() bool {
			_, err := os.Lstat(filepath.Join(s.out, "qf"+m.ID))
			return err == nil
		})
	}
	total := 0
	for _, dir := range names {
		left, err := filepath.Glob(dir + "/qf*")
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == backlog/dirs {
			t.Errorf("nothing of %s has left: it starves", dir)
		}
		total += len(left)
	}
	if total < backlog/2 {
		t.Errorf("only %d messages of the backlog were left when the new ones had gone", total)
	}
}

// fillBacklog writes old messages, which share one body as split ones do.
func (s *site) fillBacklog(dir string, first, n int) {
	s.t.Helper()
	old := []unix.Timespec{{Sec: 1_700_000_000}, {Sec: 1_700_000_000}}
	body := filepath.Join(s.dir, "body"+filepath.Base(dir))
	if err := os.WriteFile(body, []byte("old\n"), 0o640); err != nil {
		s.t.Fatal(err)
	}
	for i := first; i < first+n; i++ {
		m := sample.Message{ID: sample.ID(i), T: 1_795_438_128, From: "a@example.com", To: []string{"b@example.net"}, Header: "Subject: old\n"}
		qf := filepath.Join(dir, "qf"+m.ID)
		err := os.Link(body, filepath.Join(dir, "df"+m.ID))
		if err == nil {
			err = os.WriteFile(qf, m.Control(), 0o640)
		}
		if err == nil {
			err = unix.UtimesNanoAt(unix.AT_FDCWD, qf, old, 0)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
}
