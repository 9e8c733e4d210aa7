package sendmail

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/durable/fault"
	"holdfast/queue/quarantine"
)

// yard is a queue with one message in it.
type yard struct {
	t       *testing.T
	dir     string
	in, out string
	store   *quarantine.Store
}

const oneID = "6ANC000001000790"

func newYard(t *testing.T) *yard {
	t.Helper()
	y := &yard{t: t, dir: t.TempDir()}
	y.in, y.out = y.dir+"/in", y.dir+"/out"
	for _, d := range []string{y.in, y.out, y.dir + "/work", y.dir + "/elsewhere"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if y.store, err = quarantine.New(y.dir+"/quarantine", nil); err != nil {
		t.Fatal(err)
	}
	y.put(y.in, oneID, small, "body\n")
	return y
}

func (y *yard) put(dir, id, control, body string) {
	y.t.Helper()
	for name, text := range map[string]string{"df": body, "qf": control} {
		if err := os.WriteFile(filepath.Join(dir, name+id), []byte(text), 0o640); err != nil {
			y.t.Fatal(err)
		}
	}
}

func (y *yard) queue(hook durable.Hook) *Queue {
	y.t.Helper()
	f := &durable.FS{Hook: hook}
	q, err := New(Config{
		Name: "q", In: []string{y.in}, Out: []string{y.out}, Work: y.dir + "/work", Token: "0123456789abcdef0123456789abcdef",
		RenderInMemory: 1 << 20, Lock: "flock", Store: &quarantine.Store{Root: y.dir + "/quarantine", FS: f, Now: time.Now}, FS: f,
	})
	if err != nil {
		y.t.Fatal(err)
	}
	return q
}

func (y *yard) claim(q *Queue, id string) (queue.Claim, error) {
	c, err := q.Lock(y.t.Context(), queue.Entry{ID: queue.ID{Queue: "q", Dir: y.in, Name: id}})
	if err != nil {
		return nil, err
	}
	if _, err := c.Read(y.t.Context()); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// complete says in which directories a complete copy with this body is.
func (y *yard) complete(id, body string) (where []string) {
	for _, dir := range []string{y.in, y.out, y.dir + "/elsewhere"} {
		control, qerr := os.ReadFile(dir + "/qf" + id)
		data, err := os.ReadFile(dir + "/df" + id)
		if qerr == nil && err == nil && string(data) == body && strings.HasSuffix(string(control), "\n.\n") {
			where = append(where, filepath.Base(dir))
		}
	}
	return where
}

// interventions are what an administrator may do to a message at any instant.
// Each says whether there was still something to do it to.
var interventions = map[string]func(y *yard) bool{
	// mv away, and another message comes under the same id.
	"moved, another one put there": func(y *yard) bool {
		if !y.away() {
			return false
		}
		y.put(y.in, oneID, theirs, "theirs\n")
		return true
	},
	// cp away, rm, cp back: the same message, with new inodes.
	"copied back": func(y *yard) bool {
		control, err := os.ReadFile(y.in + "/qf" + oneID)
		if err != nil {
			return false
		}
		data, err := os.ReadFile(y.in + "/df" + oneID)
		if err != nil {
			return false
		}
		for _, name := range []string{"qf", "df"} {
			if err := os.Remove(y.in + "/" + name + oneID); err != nil {
				y.t.Fatal(err)
			}
		}
		y.put(y.in, oneID, string(control), string(data))
		return true
	},
	"deleted": func(y *yard) bool {
		if os.Remove(y.in+"/qf"+oneID) != nil {
			return false
		}
		if err := os.Remove(y.in + "/df" + oneID); err != nil && !errors.Is(err, fs.ErrNotExist) {
			y.t.Fatal(err)
		}
		return true
	},
	"only the control file deleted": func(y *yard) bool { return os.Remove(y.in+"/qf"+oneID) == nil },
}

var theirs = strings.Replace(small, "Subject: one", "Subject: theirs", 1)

// away moves the message out of the queue.
func (y *yard) away() bool {
	if os.Rename(y.in+"/qf"+oneID, y.dir+"/elsewhere/qf"+oneID) != nil {
		return false // it has left the inbound queue: nothing to move
	}
	if err := os.Rename(y.in+"/df"+oneID, y.dir+"/elsewhere/df"+oneID); err != nil && !errors.Is(err, fs.ErrNotExist) {
		y.t.Fatal(err)
	}
	return true
}

// TestAnAdministratorMeanwhile: at each operation of each path somebody moves
// the message away and puts another in its place, copies it back, or deletes
// it. Each recipient's copy is then in exactly one place that the
// administrator or the commit has put it into, or he has deleted it; what he
// put there is untouched.
func TestAnAdministratorMeanwhile(t *testing.T) {
	plans := map[string]func() []queue.Group{
		"release": func() []queue.Group { return []queue.Group{{Disposition: queue.Release}} },
		"modified": func() []queue.Group {
			return []queue.Group{{Disposition: queue.Release, Edit: &queue.Edit{Body: strings.NewReader("new\n")}}}
		},
		"quarantine": func() []queue.Group { return []queue.Group{{Disposition: queue.Quarantine}} },
		"split": func() []queue.Group {
			return []queue.Group{{Recipients: []int{0}, Disposition: queue.Release}, {Recipients: []int{1, 2}, Disposition: queue.Quarantine}}
		},
	}
	for what, intervene := range interventions {
		for name, groups := range plans {
			points := 0
			for at := range 100 {
				y := newYard(t)
				met := false
				hook := &fault.Intrude{At: at}
				hook.Do = func() { met = intervene(y) }
				q := y.queue(hook)
				c, err := y.claim(q, oneID)
				if err != nil {
					t.Fatal(err)
				}
				out := q.Commit(t.Context(), []queue.Plan{{Claim: c, Groups: groups()}})[0]
				if hook.N <= at {
					break // all operations were met
				}
				if !met {
					continue
				}
				points++
				y.judge(fmt.Sprintf("%s, %s before %q: outcome %v", name, what, hook.Name, out.Err), what, out.Err)
			}
			if points < 3 {
				t.Errorf("%s, %s: only %d points were met", name, what, points)
			}
		}
	}
}

// judge looks where the message of each recipient is after an intervention.
func (y *yard) judge(point, what string, outcome error) {
	y.t.Helper()
	have := y.whereabouts()
	if what == "moved, another one put there" {
		if got := y.complete(oneID, "theirs\n"); len(got) != 1 || got[0] != "in" {
			y.t.Errorf("%s: their message is in %v", point, got)
		}
	}
	for _, r := range []string{"b@example.net", "c@example.net", "d@example.net"} {
		got := have[r]
		switch {
		case len(got) > 1:
			y.t.Errorf("%s: %s is in %v", point, r, got)
		case len(got) == 1, strings.Contains(what, "deleted"):
		default:
			y.t.Errorf("%s: %s is nowhere", point, r)
		}
		// What he deletes or copies back after the decision cannot be told from
		// what was published: deleted is deleted, and his copy is new mail.
		mine := strings.Contains(what, "deleted") && len(got) == 0 || what == "copied back" && len(got) == 1
		if outcome == nil && !mine && (len(got) != 1 || got[0] == "in" || got[0] == "prepared") {
			y.t.Errorf("%s: done, it says, and %s is in %v", point, r, got)
		}
	}
}

// whereabouts says, with eyes of its own, in which places each recipient has
// a copy of the message (not of theirs): in, out, elsewhere, quarantine; and,
// where that is all there is, prepared for the quarantine: the next start
// makes it visible.
func (y *yard) whereabouts() map[string][]string {
	y.t.Helper()
	out := map[string][]string{}
	add := func(where, control string) {
		if strings.Contains(control, "Subject: theirs") {
			return
		}
		for line := range strings.Lines(control) {
			if flags, r, ok := strings.Cut(line, ":<"); ok && flags[0] == 'R' {
				r = strings.TrimSuffix(r, ">\n")
				out[r] = append(out[r], where)
			}
		}
	}
	for _, where := range []string{"in", "out", "elsewhere"} {
		controls, err := filepath.Glob(y.dir + "/" + where + "/qf*")
		if err != nil {
			y.t.Fatal(err)
		}
		for _, path := range controls {
			control, err := os.ReadFile(path)
			if err != nil {
				y.t.Fatal(err)
			}
			_, derr := os.Lstat(filepath.Join(filepath.Dir(path), "df"+filepath.Base(path)[2:]))
			if derr != nil && where == "out" {
				y.t.Errorf("%s is outbound without its data file", filepath.Base(path))
			}
			if derr == nil || where == "elsewhere" { // he may have been too late for the data file
				add(where, string(control))
			}
		}
	}
	for _, pattern := range []string{"2*/*", ".prepared/*"} {
		items, err := filepath.Glob(y.dir + "/quarantine/" + pattern + "/control")
		if err != nil {
			y.t.Fatal(err)
		}
		for _, path := range items {
			control, err := os.ReadFile(path)
			if err != nil {
				y.t.Fatal(err)
			}
			where := "quarantine"
			if pattern[0] == '.' {
				where = "prepared"
			}
			add(where, string(control))
		}
	}
	for r, places := range out {
		if len(places) > 1 {
			out[r] = slices.DeleteFunc(places, func(where string) bool { return where == "prepared" })
		}
	}
	return out
}

func TestCollisionsLeaveBothMessagesAlone(t *testing.T) {
	y := newYard(t)
	y.put(y.out, oneID, small, "another\n")
	q := y.queue(nil)
	c, err := y.claim(q, oneID)
	if err != nil {
		t.Fatal(err)
	}
	out := q.Commit(t.Context(), []queue.Plan{{Claim: c, Groups: []queue.Group{{Disposition: queue.Release}}}})[0]
	if !errors.Is(out.Err, queue.ErrCollision) {
		t.Errorf("%v", out.Err)
	}
	if len(y.complete(oneID, "body\n")) != 1 || len(y.complete(oneID, "another\n")) != 1 {
		t.Error("one of the two was touched")
	}
	// An orphan data file of somebody else: reported, never removed.
	y = newYard(t)
	if err := os.WriteFile(y.out+"/df"+oneID, []byte("whose?"), 0o640); err != nil {
		t.Fatal(err)
	}
	q = y.queue(nil)
	if c, err = y.claim(q, oneID); err != nil {
		t.Fatal(err)
	}
	out = q.Commit(t.Context(), []queue.Plan{{Claim: c, Groups: []queue.Group{{Disposition: queue.Release}}}})[0]
	if whose, err := os.ReadFile(y.out + "/df" + oneID); !errors.Is(out.Err, queue.ErrCollision) || err != nil || string(whose) != "whose?" {
		t.Errorf("%v; %q, %v", out.Err, whose, err)
	}
}

func TestWhatIsNotOursIsSkippedAndCounted(t *testing.T) {
	y := newYard(t)
	files := map[string]string{
		"hfHELD": small, "QfLOST": small, "tfTEMP": "x", "xfSCRIPT": "x", "README": "x", "qf" + strings.Repeat("x", 19): small, "qfEMPTY": "", "dfEMPTY": "x",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(y.in, name), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", y.in+"/qfLINK"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(y.in+"/qfDIR", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(y.in+"/qfFIFO", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(y.in+"/dfORPHAN", []byte("x"), 0o640); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-24 * time.Hour)
	if err := os.Chtimes(y.in+"/dfORPHAN", old, old); err != nil {
		t.Fatal(err)
	}
	q := y.queue(nil)
	var names []string
	res, err := q.List(t.Context(), func(e queue.Entry) bool { names = append(names, e.ID.Name); return true })
	if err != nil || len(names) != 1 || names[0] != oneID {
		t.Fatalf("%v, %v", names, err)
	}
	want := map[string]int{skipHeld: 1, skipLost: 1, skipLong: 1, skipStrange: 3, skipEmpty: 1, skipOrphan: 1}
	for why, n := range want {
		if res.Skipped[why] != n {
			t.Errorf("%s: %d, want %d", why, res.Skipped[why], n)
		}
	}
	named := map[string]queue.Left{}
	for _, f := range res.Left {
		named[f.ID.Name] = f
	}
	for _, name := range []string{"ORPHAN", "LINK", "DIR", "FIFO"} {
		if f := named[name]; f.Why == "" || !strings.HasSuffix(f.File, name) {
			t.Errorf("%s is not named: %+v", name, f)
		}
	}
	for _, f := range res.Left {
		if f.Why == skipHeld && !strings.Contains(f.Do, "-qQ -Q -qI"+f.ID.Name) { // without -Q it would be delivered
			t.Errorf("%+v", f)
		}
	}
	for _, id := range []string{"LINK", "DIR", "FIFO"} {
		if _, err := y.claim(q, id); !errors.Is(err, queue.ErrForeign) {
			t.Errorf("%s: %v", id, err)
		}
	}
	if _, err := y.claim(q, "../elsewhere"); !errors.Is(err, queue.ErrForeign) {
		t.Errorf("a path as an id: %v", err)
	}
}

func TestLocksAreRespectedBothWays(t *testing.T) {
	y := newYard(t)
	f, err := os.Open(y.in + "/qf" + oneID)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil { // as mailq does
		t.Fatal(err)
	}
	q := y.queue(nil)
	if _, err := y.claim(q, oneID); !errors.Is(err, queue.ErrBusy) {
		t.Errorf("%v", err)
	}
	f.Close()
	c, err := y.claim(q, oneID)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("flock", "-n", y.in+"/qf"+oneID, "true").CombinedOutput()
	if err == nil {
		t.Errorf("another process gets our lock: %s", out)
	}
	c.Close()
	if out, err := exec.Command("flock", "-n", y.in+"/qf"+oneID, "true").CombinedOutput(); err != nil {
		t.Errorf("still locked after Close: %v %s", err, out)
	}
	if err := os.Chmod(y.in+"/qf"+oneID, 0o660); err != nil {
		t.Fatal(err)
	}
	if _, err := y.claim(q, oneID); !errors.Is(err, queue.ErrDamaged) {
		t.Errorf("group-writable: %v", err)
	}
}

func TestTwoDaemonsOnOneDirectory(t *testing.T) {
	y := newYard(t)
	a, b := y.queue(nil), y.queue(nil)
	if err := a.HoldDirs(); err != nil {
		t.Fatal(err)
	}
	if err := b.HoldDirs(); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("%v", err)
	}
	a.Close()
	if err := b.HoldDirs(); err != nil {
		t.Error(err)
	}
}

func TestSubDirectoriesSeveralDirectoriesAndABodyElsewhere(t *testing.T) {
	y := newYard(t)
	q1, q2 := y.in+"/q1", y.in+"/q2"
	for _, d := range []string{q1, q1 + "/qf", q1 + "/df", q2, y.dir + "/far", y.dir + "/far/df"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	write(q1+"/qf/qfA1", small)
	write(q1+"/df/dfA1", "one\n")
	write(q2+"/qfA2", strings.Replace(small, "Fbs\n", "d"+y.dir+"/far\nFbs\n", 1))
	write(y.dir+"/far/df/dfA2", "two\n")
	y.in += "/q*"
	q := y.queue(nil)
	var plans []queue.Plan
	_, err := q.List(t.Context(), func(e queue.Entry) bool {
		c, err := q.Lock(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		plans = append(plans, queue.Plan{Claim: c, Groups: []queue.Group{{Disposition: queue.Release}}})
		return true
	})
	if err != nil || len(plans) != 2 {
		t.Fatalf("%d claims, %v", len(plans), err)
	}
	for _, o := range q.Commit(t.Context(), plans) {
		if o.Err != nil {
			t.Error(o.Err)
		}
	}
	for id, body := range map[string]string{"A1": "one\n", "A2": "two\n"} {
		if got := y.complete(id, body); len(got) != 1 || got[0] != "out" {
			t.Errorf("%s is in %v", id, got)
		}
	}
	control, err := os.ReadFile(y.out + "/qfA2")
	if err != nil || strings.Contains(string(control), "\nd/") {
		t.Errorf("the d line is still there: %v", err)
	}
	for _, path := range []string{q1 + "/qf/qfA1", q1 + "/df/dfA1", q2 + "/qfA2", y.dir + "/far/df/dfA2"} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left", path)
		}
	}
}

func TestIDsAreSendmailsAndNeverTwice(t *testing.T) {
	var s idSource
	now := time.Date(2026, 11, 23, 12, 3, 17, 0, time.UTC)
	seen := map[string]bool{}
	for range 8000 {
		id := s.next(now)
		if seen[id] || !validID(id) || !strings.HasPrefix(id, "6ANC3") {
			t.Fatalf("%q, again %v", id, seen[id])
		}
		seen[id] = true
	}
}

// The size that people and batches see is that of the whole message.
func TestAListingCountsControlAndDataFile(t *testing.T) {
	y := newYard(t)
	var want int64
	for _, path := range []string{y.in + "/qf" + oneID, y.in + "/df" + oneID} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		want += st.Size()
	}
	if _, err := y.queue(nil).List(t.Context(), func(e queue.Entry) bool {
		if e.Size != want {
			t.Errorf("%d, want %d", e.Size, want)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
}

// A command of ours ends at once after a kick: by then it must have started.
func TestAKickThatCannotStartIsAnError(t *testing.T) {
	q := newYard(t).queue(nil)
	q.Config.Kick = []string{"/nonexistent/sendmail"}
	for range 2 { // and the next one is tried again
		if err := q.Kick(t.Context(), []string{"A"}); err == nil || !strings.Contains(err.Error(), "/nonexistent/sendmail") {
			t.Fatalf("%v", err)
		}
	}
}

func TestAKickRunsInItsOwnSessionAndItsFailureIsTold(t *testing.T) {
	y := newYard(t)
	q := y.queue(nil)
	told := make(chan Event, 1)
	q.kicks.report = func(e Event) { told <- e }
	q.Config.Kick = []string{"sh", "-c", `echo "$@" "$(ps -o sid= -p $$)" >&2; exit 7`, "sh"}
	if err := q.Kick(t.Context(), []string{"A", "B"}); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-told:
		if !strings.Contains(e.Err.Error(), "-qIA -qIB") || !strings.Contains(e.Err.Error(), "exit status 7") {
			t.Errorf("%v", e.Err)
		}
	case <-time.After(time.Minute):
		t.Fatal("no word")
	}
}
