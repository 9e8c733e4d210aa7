package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/sample"
	"holdfast/poison/ledger"
)

// TestEachKindOfRecovery: a run dies with a batch in hand; who it says it was
// decides what the next one does with the messages.
func TestEachKindOfRecovery(t *testing.T) {
	self, err := ledger.Self() // this test: it lives
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(o *ledger.Owner)) ledger.Owner {
		o := self
		o.PID, o.Start = 1<<22+1, 1 // above any pid
		f(&o)
		return o
	}
	foreign := change(func(o *ledger.Owner) { o.Machine = "another" })
	now := time.Now()
	for name, c := range map[string]struct {
		owner ledger.Owner
		began time.Time
		left  string // why all are left, "" if all leave
	}{
		"owner alive":                 {self, now, "in work by process"},
		"owner dead here":             {change(func(*ledger.Owner) {}), now, ""},
		"number in use again":         {change(func(o *ledger.Owner) { o.PID = self.PID }), now, ""},
		"other boot":                  {change(func(o *ledger.Owner) { o.Boot = "another" }), now, ""},
		"other machine young":         {foreign, now.Add(-time.Minute), "in work by another machine"},
		"other machine old":           {foreign, now.Add(-11 * time.Minute), ""},
		"other machine of the future": {foreign, now.Add(24 * time.Hour), ""},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, sample.Demo(8, -1, -1), "workers: 1\n")
			cmd := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=memfd_create", "-e", "inject=memfd_create:signal=KILL:when=1",
				normal, superviseName, "--drain", "-c", s.config)
			if text, err := cmd.CombinedOutput(); err == nil {
				t.Fatalf("it was not killed\n%s", text)
			}
			if n := s.rewriteOwners(c.owner, c.began); n != 8 {
				t.Fatalf("%d rows in the ledger after the death", n)
			}
			code, out, errs := s.run(normal, "run", "--drain")
			if c.left == "" {
				if code != 0 {
					t.Errorf("exit %d\n%s%s", code, out, errs)
				}
				s.account(nil, nil)
				return
			}
			all := map[int]bool{}
			for i := range s.messages {
				all[i] = true
			}
			s.account(nil, all)
			if code != exitPartly || strings.Count(out+errs, c.left) < len(s.messages) {
				t.Errorf("exit %d\n%s%s", code, out, errs)
			}
			if n := s.rewriteOwners(change(func(*ledger.Owner) {}), now); n != 8 {
				t.Errorf("%d rows are left of theirs", n)
			}
			if code, out, errs := s.run(normal, "run", "--drain"); code != 0 {
				t.Errorf("once the owner is dead: exit %d\n%s%s", code, out, errs)
			}
			s.account(nil, nil)
		})
	}
}

// rewriteOwners has the rows in work say that they are another's.
func (s *site) rewriteOwners(o ledger.Owner, began time.Time) (rows int) {
	s.t.Helper()
	db, err := bbolt.Open(s.dir+"/state/ledger.db", 0o600, &bbolt.Options{Timeout: time.Minute})
	if err != nil {
		s.t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("inflight"))
		all := map[string][]byte{}
		if err := b.ForEach(func(k, v []byte) error {
			var r ledger.Row
			if err := json.Unmarshal(v, &r); err != nil {
				return err
			}
			r.Owner, r.Began = o, began
			text, err := json.Marshal(r)
			all[string(k)] = text
			return err
		}); err != nil {
			return err
		}
		rows = len(all)
		for k, v := range all {
			if err := b.Put([]byte(k), v); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return rows
}

// TestAHalfWrittenMessageIsNotTakenForDeadly: each look at it fails, and lives
// end and are reloaded meanwhile, but Holdfast never dies. Once its writer has
// finished it, it leaves.
func TestAHalfWrittenMessageIsNotTakenForDeadly(t *testing.T) {
	m := sample.Demo(1, -1, -1)[0]
	s := newSite(t, nil, "log: {level: error}\npoll: 1s\n")
	whole := m.Control()
	if err := m.Write(s.in); err != nil {
		t.Fatal(err)
	}
	qf := s.in + "/qf" + m.ID
	if err := os.WriteFile(qf, whole[:len(whole)-2], 0o640); err != nil {
		t.Fatal(err)
	}
	drain := func(want int, says string) {
		t.Helper()
		if code, out, errs := s.run(normal, "run", "--drain"); code != want || !strings.Contains(out, says) {
			t.Errorf("exit %d\n%s%s", code, out, errs)
		}
	}
	for range 3 {
		drain(exitPartly, "not complete yet")
	}
	cmd := s.daemon(normal)
	client := control.Dial(s.dir + "/state/control.sock")
	for range 2 {
		st, err := client.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		s.until("the configuration is read again", func() bool {
			now, err := client.Status(t.Context())
			return err == nil && now.Loaded.After(st.Loaded) && len(now.Waiting) == 1
		})
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(qf, whole, 0o640); err != nil {
		t.Fatal(err)
	}
	drain(0, "release 1")
	s.messages = append(s.messages, m)
	s.account(nil, nil)
}

// TestTheTokenOutlivesTheLedger, and the ledger's copy the file: by it we know
// our own marks in the queue again.
func TestTheTokenOutlivesTheLedger(t *testing.T) {
	s := newSite(t, nil, "log: {level: error}\n")
	path := s.dir + "/state/token"
	var first string
	for _, gone := range []string{"", "ledger.db", "token", "ledger.db"} {
		if gone != "" {
			if err := os.Remove(s.dir + "/state/" + gone); err != nil {
				t.Fatal(err)
			}
		}
		if code, out, errs := s.run(normal, "run", "--drain"); code != 0 {
			t.Fatalf("without %s: exit %d\n%s%s", gone, code, out, errs)
		}
		text, err := os.ReadFile(path)
		st, serr := os.Stat(path)
		if err != nil || serr != nil || st.Mode().Perm() != 0o600 || len(text) != 33 {
			t.Fatalf("without %s: %q, %v, %v", gone, text, err, serr)
		}
		if first == "" {
			first = string(text)
		}
		if string(text) != first {
			t.Errorf("without %s the token %q became %q", gone, first, text)
		}
	}
	// A damaged one is put back from the ledger; without that it is an error
	// that says what to do, not a new token.
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := s.run(normal, "run", "--drain"); code != 0 {
		t.Errorf("exit %d, %s", code, errs)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != first {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.dir + "/state/ledger.db"); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := s.run(normal, "run", "--drain"); code != exitFailed || !strings.Contains(errs, "token is damaged: put it back") {
		t.Errorf("exit %d, %s", code, errs)
	}
}
