//go:build torture

package postfix

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/durable/fault"
	"holdfast/queue/quarantine"
)

// world is one small mail system on the disk.
type world struct {
	*spool
	t               testing.TB
	top, quar       string
	ids             map[string]string   // by subject, as they were put on hold
	want            map[string][]expect // by subject
	taken           map[string]string   // "subject recipient": where an administrator has put that copy; "" if nowhere
	path            path
	damage          []string // files that the queue manager would set aside, at the last look
	savedAllTheSame bool     // a Save that fails has happened
	holder          *holder
	late            bool // what was sent to it when we died is accepted after our restart
}

// expect is one group of recipients: where they must end up, with which body.
type expect struct {
	rcpts  []string
	do     queue.Disposition
	body   string
	header string // must be there; "" for an unmodified message
}

// layout is one way for a queue directory to be.
type layout struct {
	name  string
	depth int
	long  bool
}

var layouts = []layout{{"flat, short ids", 0, false}, {"hashed, long ids", 1, true}}

func newWorld(t testing.TB, l layout) *world {
	dir := t.TempDir()
	w := &world{
		t: t, top: dir, quar: dir + "/quarantine", spool: newSpool(t, dir+"/spool", l.depth, l.long),
		ids: map[string]string{}, want: map[string][]expect{}, taken: map[string]string{},
	}
	for _, d := range []string{"/work", "/shadow"} {
		if err := os.Mkdir(dir+d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := quarantine.New(w.quar, nil); err != nil {
		t.Fatal(err)
	}
	return w
}

const batch = 3

func (w *world) fill(p path) {
	w.path = p
	for i := range batch {
		subject := fmt.Sprint("m", i)
		w.ids[subject] = w.put(queueFile(1_795_438_128, "Subject: "+subject+"\n\n"+body(subject), all...))
		_, w.want[subject] = p.plan(subject)
	}
}

func (w *world) open(hook durable.Hook) (*Queue, *quarantine.Store) {
	fsys := &durable.FS{Hook: hook}
	store := &quarantine.Store{Root: w.quar, FS: fsys, Now: fixedNow}
	q, err := New(Config{
		Name: "mta", Dir: w.dir, Token: "0123456789abcdef0123456789abcdef", Hashed: map[string]int{"hold": w.depth, "incoming": w.depth}, Work: w.top + "/work",
		RenderInMemory: 1 << 20, Trigger: []string{}, Modify: w.path.modify, Listener: w.listen(hook), Store: store, FS: fsys,
		Journal: &fileJournal{path: w.top + "/journal", hook: hook, late: w.savedAllTheSame},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return q, store
}

// listen starts the listener that a path needs.
func (w *world) listen(hook durable.Hook) string {
	if w.path.modify != ByReinjection {
		return ""
	}
	w.holder = newHolder(w.t, w.spool, hook)
	w.holder.late = w.late
	if c, ok := hook.(*fault.Crash); ok && c.Next != nil { // what Postfix writes is on the disk when it says so
		w.holder.disk.Hook = c.Next
		if f, ok := c.Next.(forgetful); ok { // the bug is ours, not Postfix's
			w.holder.disk.Hook = f.Power
		}
	}
	return w.holder.address
}

func fixedNow() time.Time { return time.Unix(1_800_000_000, 0) }

// path is one way through a commit.
type path struct {
	name   string
	plan   func(subject string) ([]queue.Group, []expect)
	modify Modify
}

func body(subject string) string { return "body of " + subject + "\n" }

func changedBody(subject string) string { return "new " + subject + "\n" }

var all = []string{"b@example.net", "c@example.net", "d@example.net"}

const scanned = "X-Scanned: yes\n"

func change(subject string, withBody bool) *queue.Edit {
	e := &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "X-Scanned", Value: "yes"}}}
	if withBody {
		e.Body = strings.NewReader(changedBody(subject))
	}
	return e
}

// Ways through a commit. The changes are made on both routes.
var paths = slices.Concat([]path{
	{name: "unmodified", plan: func(s string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release}}, []expect{{all, queue.Release, body(s), ""}}
	}},
	{name: "split, nothing released", plan: func(s string) ([]queue.Group, []expect) {
		return []queue.Group{
			{Recipients: []int{0, 1}, Disposition: queue.Quarantine, Item: []byte(`{}`)}, {Recipients: []int{2}, Disposition: queue.Drop},
		}, []expect{{all[:2], queue.Quarantine, body(s), ""}, {all[2:], queue.Drop, "", ""}}
	}},
	{name: "quarantine", plan: func(s string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Quarantine, Item: []byte(`{}`)}}, []expect{{all, queue.Quarantine, body(s), ""}}
	}},
	{name: "drop", plan: func(string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Drop}}, []expect{{all, queue.Drop, "", ""}}
	}},
}, changes("rewritten", ByRewriting), changes("reinjected", ByReinjection))

func changes(how string, m Modify) []path {
	return []path{
		{name: how + " header", modify: m, plan: func(s string) ([]queue.Group, []expect) {
			return []queue.Group{{Disposition: queue.Release, Edit: change(s, false)}}, []expect{{all, queue.Release, body(s), scanned}}
		}},
		{name: how + " body", modify: m, plan: func(s string) ([]queue.Group, []expect) {
			return []queue.Group{{Disposition: queue.Release, Edit: change(s, true)}}, []expect{{all, queue.Release, changedBody(s), scanned}}
		}},
		{name: how + " split", modify: m, plan: func(s string) ([]queue.Group, []expect) {
			groups := []queue.Group{
				{Recipients: []int{0}, Disposition: queue.Release},
				{Recipients: []int{1}, Disposition: queue.Release, Edit: change(s, true)},
				{Recipients: []int{2}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
			}
			return groups, []expect{
				{all[:1], queue.Release, body(s), ""}, {all[1:2], queue.Release, changedBody(s), scanned}, {all[2:], queue.Quarantine, body(s), ""},
			}
		}},
	}
}

// commit claims and commits everything that is on hold, as the loop does;
// decided messages are resumed. What it returns is what a ledger knows.
func (w *world) commit(q *Queue, p path) (ledger map[string]queue.Stats, failed error) {
	ctx := context.Background()
	ledger = map[string]queue.Stats{}
	var plans []queue.Plan
	var entries []queue.Entry
	if _, err := q.List(ctx, func(e queue.Entry) bool { entries = append(entries, e); return true }); err != nil {
		return ledger, err
	}
	defer func() { // the kernel closes what a dead program held
		for _, p := range plans {
			p.Claim.Close()
		}
	}()
	sort.Slice(entries, func(i, j int) bool { return entries[i].ID.Name < entries[j].ID.Name })
	for _, e := range entries {
		c, err := q.Lock(ctx, e)
		if errors.Is(err, queue.ErrGone) {
			continue
		}
		if err != nil {
			return ledger, err
		}
		ledger[e.ID.Name] = c.Stats()
		env, err := c.Read(ctx)
		if err != nil {
			c.Close()
			if !errors.Is(err, queue.ErrGone) {
				failed = errors.Join(failed, err)
			}
			continue
		}
		if c.Decided() {
			if err := q.Resume(ctx, c).Err; !errors.Is(err, queue.ErrGone) { // somebody else's: settled
				failed = errors.Join(failed, err)
			}
			c.Close()
			continue
		}
		groups, _ := p.plan(w.subject(c))
		if len(env.Recipients) < len(all) { // what the journal has forgotten to be a copy is new mail
			groups = []queue.Group{{Disposition: queue.Release}}
		}
		plans = append(plans, queue.Plan{Claim: c, Groups: groups})
	}
	for _, o := range q.Commit(ctx, plans) {
		failed = errors.Join(failed, o.Err)
	}
	return ledger, failed
}

func (w *world) subject(c queue.Claim) string {
	f, err := c.Render(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1000)
	n, err := f.ReadAt(b, 0)
	if n == 0 {
		w.t.Fatal(err)
	}
	return subjectLine(string(b[:n]))
}

func subjectLine(content string) string {
	_, rest, _ := strings.Cut("\n"+content, "\nSubject: ")
	s, _, _ := strings.Cut(rest, "\n")
	return s
}

// recover does what the loop does at its start and then goes on.
func (w *world) recover(p path, ledger map[string]queue.Stats) error {
	ctx := context.Background()
	q, store := w.open(nil)
	for id, st := range ledger {
		id := queue.ID{Queue: "mta", Dir: w.dir, Name: id}
		c, err := q.Lock(ctx, queue.Entry{ID: id})
		if err == nil {
			c.Close()
		} else if errors.Is(err, queue.ErrGone) {
			err = q.Sweep(ctx, id, st)
		}
		if err != nil {
			return err
		}
	}
	if err := w.items(q, store); err != nil {
		return err
	}
	for range 2 { // what was in another's place is met in the second round
		if _, err := w.commit(q, p); err != nil {
			return err
		}
	}
	q.Close()
	return nil
}

// items settles the quarantine's prepared items, as the loop does.
func (w *world) items(q *Queue, store *quarantine.Store) error {
	ctx := context.Background()
	items, err := store.Prepared(ctx)
	if err != nil {
		return err
	}
	for _, m := range items {
		c, err := q.Lock(ctx, queue.Entry{ID: m.Identity.ID})
		if errors.Is(err, queue.ErrGone) {
			if err := store.CommitUncertain(ctx, m.Name); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		_, err = c.Read(ctx)
		if err == nil && c.Decided() {
			err = q.Resume(ctx, c).Err
		} else if err == nil && c.Identity() != m.Identity {
			err = store.CommitUncertain(ctx, m.Name)
		} else if err == nil {
			err = store.Abort(ctx, m.Name)
		}
		if errors.Is(err, queue.ErrGone) {
			err = nil // what is there now is judged in the next round
		}
		c.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// found is one recipient's copy somewhere.
type found struct{ where, content string }

func (f found) body() string {
	_, b, _ := strings.Cut(f.content, "\n\n")
	return b
}

// Where a copy can be.
const (
	onHold     = "hold"
	out        = "incoming"
	later      = "deferred"
	beside     = "beside" // in hold, under a name that the MTA ignores
	inItem     = "quarantine"
	inPrepared = "prepared"
)

// copies looks at the directories with eyes of its own: which recipient has
// which complete copy where, by "subject recipient".
func (w *world) copies() map[string][]found {
	w.damage = nil
	all := map[string][]found{}
	add := func(where string, s seen, content string) {
		for _, r := range s.recipients() {
			key := subjectLine(content) + " " + r
			all[key] = append(all[key], found{where, content})
		}
	}
	for _, name := range []string{onHold, out, later} {
		for _, path := range w.files(name) {
			b, err := os.ReadFile(path)
			if err != nil {
				w.t.Fatal(err)
			}
			s, err := look(b)
			where := name
			if strings.Contains(filepath.Base(path), ".") && name == onHold {
				where = beside
			} else if err == nil && name == out && filepath.Base(path) != w.ids["m9"] {
				err = w.fit(path) // that one's name was not of its inode when it came
			}
			switch {
			case err == nil:
				add(where, s, s.content)
			case where != beside:
				w.damage = append(w.damage, fmt.Sprintf("%s: %v", path, err))
			}
		}
	}
	for pattern, where := range map[string]string{"/2*/*": inItem, "/.prepared/*": inPrepared} {
		dirs, err := filepath.Glob(w.quar + pattern)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, item := range dirs {
			control, cerr := os.ReadFile(item + "/control")
			message, merr := os.ReadFile(item + "/message")
			if s, err := look(control); cerr == nil && merr == nil && err == nil {
				add(where, s, string(message))
			}
		}
	}
	return all
}

// account counts recipients whose copy is lost, doubled or wrong. A copy that
// an administrator took counts where he has put it.
func (w *world) account() (lost, doubled, wrong []string) {
	have := w.copies()
	for subject, groups := range w.want {
		for _, g := range groups {
			for _, r := range g.rcpts {
				key := subject + " " + r
				got := slices.DeleteFunc(slices.Clone(have[key]), func(f found) bool { return f.where == inPrepared || f.where == beside })
				place, took := w.taken[key]
				if took {
					got = slices.DeleteFunc(got, func(f found) bool { return f.where == inItem && w.uncertain(subject) })
				}
				switch {
				case took && place == "" && len(got) > 0:
					doubled = append(doubled, key+" was deleted and is in "+got[0].where)
				case took && place != "" && (len(got) != 1 || got[0].where != place):
					doubled = append(doubled, fmt.Sprintf("%s was taken to %s and is in %v", key, place, got))
				case took:
				case g.do == queue.Drop && len(got) > 0:
					doubled = append(doubled, key+" was dropped and is in "+got[0].where)
				case g.do == queue.Drop:
				case len(got) == 0:
					lost = append(lost, key)
				case len(got) > 1:
					doubled = append(doubled, fmt.Sprintf("%s in %s and %s", key, got[0].where, got[1].where))
				case got[0].where != map[queue.Disposition]string{queue.Release: out, queue.Quarantine: inItem}[g.do],
					got[0].body() != g.body, !strings.Contains(got[0].content, g.header):
					wrong = append(wrong, fmt.Sprintf("%s in %s: %q", key, got[0].where, got[0].content))
				}
			}
		}
	}
	return lost, doubled, wrong
}

// uncertain says that the item of a message is flagged: it cannot be released
// without a person's saying so.
func (w *world) uncertain(subject string) bool {
	flags, err := filepath.Glob(w.quar + "/2*/*/uncertain")
	if err != nil {
		w.t.Fatal(err)
	}
	return slices.ContainsFunc(flags, func(path string) bool {
		text, err := os.ReadFile(filepath.Dir(path) + "/message")
		return err == nil && subjectLine(string(text)) == subject
	})
}

// never checks what must hold at the instant of a crash: every recipient has
// a complete copy, and nobody's outbound copy is one that policy forbids.
func (w *world) never() (bad []string) {
	have := w.copies()
	for subject, groups := range w.want {
		for _, g := range groups {
			for _, r := range g.rcpts {
				key := subject + " " + r
				_, whole := w.taken[key]
				whole = whole || g.do == queue.Drop
				for _, f := range have[key] {
					whole = whole || f.body() == body(subject) || f.body() == g.body
					if f.where == out && (g.do != queue.Release || f.body() != g.body || !strings.Contains(f.content, g.header)) {
						bad = append(bad, fmt.Sprintf("%s: the copy in incoming %q is not what was decided", key, f.content))
					}
				}
				if !whole {
					bad = append(bad, key+": no complete copy anywhere")
				}
			}
		}
	}
	return slices.Concat(bad, w.damage, w.dirs())
}

// broken says what is not where the plan says, or is left over: a file on
// hold, a row of a plan.
func (w *world) broken() string {
	lost, doubled, wrong := w.account()
	if len(lost)+len(doubled)+len(wrong) > 0 {
		return fmt.Sprintf("lost %q, doubled %q, wrong %q", lost, doubled, wrong)
	}
	if len(w.damage) > 0 {
		return fmt.Sprintf("damaged: %q", w.damage)
	}
	if left := slices.Concat(w.files(onHold), w.files("corrupt"), w.files("active")); len(left) > 0 {
		return fmt.Sprintf("left: %q", left)
	}
	if bad := w.dirs(); len(bad) > 0 {
		return fmt.Sprintf("directories that the queue manager cannot use: %q", bad)
	}
	rows, err := (&fileJournal{path: w.top + "/journal"}).Rows()
	if err != nil {
		w.t.Fatal(err)
	}
	for k := range rows {
		if strings.HasPrefix(k, planKey) {
			return "left in the journal: " + k
		}
	}
	return ""
}

func (w *world) settled(point string) {
	w.t.Helper()
	if what := w.broken(); what != "" {
		w.t.Fatalf("%s: %s", point, what)
	}
}

// inMemory has a test's worlds where fsync costs nothing: of the real disk it
// would prove nothing.
func inMemory(t *testing.T) {
	if _, err := os.Stat("/dev/shm"); err == nil {
		t.Setenv("TMPDIR", "/dev/shm")
	}
}

func rounds() int {
	n, err := strconv.Atoi(os.Getenv("HOLDFAST_ROUNDS"))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// sparse is how many operations a test of many combinations goes on by: all of
// them only when several rounds are asked for.
func sparse() int {
	if rounds() > 1 {
		return 1
	}
	return 3
}

// count says how many operations a commit of this path takes.
func count(t *testing.T, p path, l layout) int {
	w := newWorld(t, l)
	w.fill(p)
	hook := &fault.Crash{At: -1}
	q, _ := w.open(hook)
	if _, err := w.commit(q, p); err != nil {
		t.Fatal(err)
	}
	n := hook.N
	q.Close()
	w.settled(p.name + ", undisturbed")
	return n
}

// killed is a world whose program was stopped before operation at.
func killed(t *testing.T, p path, l layout, at int) (w *world, ledger map[string]queue.Stats, point string) {
	w = newWorld(t, l)
	w.fill(p)
	hook := &fault.Crash{At: at}
	q, _ := w.open(hook)
	ledger, err := w.commit(q, p)
	if !hook.Dead {
		t.Fatalf("%s: operation %d was not reached (%v)", p.name, at, err)
	}
	point = fmt.Sprintf("%s, %s, killed before operation %d, %q", p.name, l.name, at, hook.Name)
	if bad := w.never(); len(bad) > 0 {
		t.Fatalf("%s: %q", point, bad)
	}
	return w, ledger, point
}

func report(t *testing.T, points int, p path, what string) {
	t.Logf("%5d points  %-24s %2d rounds  lost 0  doubled 0  (%s)", points, p.name, rounds(), what)
}

// TestTortureKill stops the program at every operation of every path.
func TestTortureKill(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points := 0
		for _, l := range layouts {
			for at := range count(t, p, l) {
				w, ledger, point := killed(t, p, l, at)
				if err := w.recover(p, ledger); err != nil {
					t.Fatalf("%s: recovery: %v", point, err)
				}
				w.settled(point)
				points++
			}
		}
		report(t, points, p, "killed")
	}
}

// TestTortureKillTwice stops the recovery as well.
func TestTortureKillTwice(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points := 0
		n := count(t, p, layouts[0])
		for at := range n {
			for again := 0; ; again += max(1, 12/rounds()) {
				w, ledger, point := killed(t, p, layouts[0], at)
				hook := &fault.Crash{At: again}
				q, _ := w.open(hook)
				more, _ := w.commit(q, p)
				point += fmt.Sprintf(" and again before %q", hook.Name)
				if bad := w.never(); len(bad) > 0 {
					t.Fatalf("%s: %q", point, bad)
				}
				maps.Copy(ledger, more)
				if err := w.recover(p, ledger); err != nil {
					t.Fatalf("%s: recovery: %v", point, err)
				}
				w.settled(point)
				points++
				if !hook.Dead {
					break
				}
			}
		}
		report(t, points, p, "killed twice")
	}
}

// TestTortureJournalLost: the journal goes with the program. That costs new
// scans; of what was on its way by SMTP it may cost a duplicate, never a message.
func TestTortureJournalLost(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points, duplicates := 0, 0
		for _, l := range layouts {
			for at := range count(t, p, l) {
				w, _, point := killed(t, p, l, at)
				if err := os.Remove(w.top + "/journal"); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				for range 2 {
					if err := w.recover(p, nil); err != nil {
						t.Fatalf("%s: recovery: %v", point, err)
					}
				}
				lost, doubled, wrong := w.account()
				if len(lost)+len(wrong) > 0 || len(doubled) > 0 && p.modify != ByReinjection {
					t.Fatalf("%s: lost %q, doubled %q, wrong %q", point, lost, doubled, wrong)
				}
				points++
				duplicates += len(doubled)
			}
		}
		report(t, points, p, fmt.Sprintf("killed, journal lost; %d recipients got a duplicate", duplicates))
	}
}

// TestTortureLateCopy: what was on its way to the listener when we died is
// accepted after our restart, when its original has long been settled.
func TestTortureLateCopy(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		if p.modify != ByReinjection {
			continue
		}
		points := 0
		for _, l := range layouts {
			for at := range count(t, p, l) {
				w := newWorld(t, l)
				w.fill(p)
				w.late = true
				hook := &fault.Crash{At: at}
				q, _ := w.open(hook)
				listener := w.holder
				ledger, _ := w.commit(q, p)
				point := fmt.Sprintf("%s, %s, killed before %q", p.name, l.name, hook.Name)
				for range 2 {
					if err := w.recover(p, ledger); err != nil {
						t.Fatalf("%s: recovery: %v", point, err)
					}
					points += len(listener.pending)
					listener.finish()
				}
				w.settled(point)
			}
		}
		if points == 0 {
			t.Errorf("%s: no copy was late", p.name)
		}
		report(t, points, p, "a copy that comes late")
	}
}

// TestTortureError lets every operation fail once: mail is complete
// afterwards, and the next try settles it, in the same life or the next. Of a
// Save that failed, both ends are tried: it happened, or not.
func TestTortureError(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points := 0
		for _, l := range layouts {
			for at := range count(t, p, l) {
				for _, cause := range []error{unix.ENOSPC, unix.EIO} {
					for _, restart := range []bool{false, true} {
						w := newWorld(t, l)
						w.savedAllTheSame = errors.Is(cause, unix.EIO)
						w.fill(p)
						hook := &fault.Fail{At: at, Err: cause}
						q, _ := w.open(hook)
						ledger, _ := w.commit(q, p)
						point := fmt.Sprintf("%s, %s, %v at %q, restart %v", p.name, l.name, cause, hook.Name, restart)
						if bad := w.never(); len(bad) > 0 {
							t.Fatalf("%s: %q", point, bad)
						}
						for range 2 {
							if restart {
								break
							}
							more, err := w.commit(q, p)
							if err != nil {
								t.Fatalf("%s: next try: %v", point, err)
							}
							maps.Copy(ledger, more)
						}
						if err := w.recover(p, ledger); err != nil {
							t.Fatalf("%s: recovery: %v", point, err)
						}
						w.settled(point)
						points++
					}
				}
			}
		}
		report(t, points, p, "ENOSPC and EIO")
	}
}

// TestTorturePower takes the power away before every operation, with every
// or many choices of what had reached the disk.
func TestTorturePower(t *testing.T) {
	inMemory(t)
	honest := func(p *fault.Power) durable.Hook { return p }
	for _, p := range paths {
		n, states := count(t, p, layouts[0]), 0
		for at := range n + 1 {
			k, bad := powerPoint(t, p, at, honest)
			if bad != "" {
				t.Fatal(bad)
			}
			states += k
		}
		report(t, states, p, "power loss")
	}
}

// forgetful is a planted bug: a program that never calls fsync.
type forgetful struct{ *fault.Power }

// After hides every fsync.
func (f forgetful) After(op durable.Op, err error) {
	if op.Kind != durable.Fsync && op.Kind != durable.FsyncDir {
		f.Power.After(op, err)
	}
}

// TestTortureCatchesAPlantedBug: a harness that finds nothing proves nothing.
func TestTortureCatchesAPlantedBug(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		if p.name != "quarantine" && p.name != "rewritten body" && p.name != "reinjected body" { // the others are of the same steps
			continue
		}
		caught := false
		for at := count(t, p, layouts[0]); at >= 0 && !caught; at-- {
			_, bad := powerPoint(t, p, at, func(p *fault.Power) durable.Hook { return forgetful{p} })
			caught = bad != ""
		}
		if !caught {
			t.Errorf("%s without fsync passes", p.name)
		}
	}
}

func powerPoint(t *testing.T, p path, at int, hooked func(*fault.Power) durable.Hook) (states int, bad string) {
	for round := range rounds() {
		for k := 0; ; k++ {
			w := newWorld(t, layouts[0])
			w.fill(p)
			power, err := fault.NewPower(w.top+"/shadow", w.dir, w.quar)
			if err != nil {
				t.Fatal(err)
			}
			hook := &fault.Crash{At: at, Next: hooked(power)}
			q, _ := w.open(hook)
			ledger, _ := w.commit(q, p)
			choices := fault.Choices(power.Pending(), int64(at*1000+round))
			if k >= 2*len(choices) {
				break
			}
			survive, content := choices[k/2], fault.Content(1+k%2)
			if err := power.Lose(survive, content); err != nil {
				t.Fatal(err)
			}
			point := fmt.Sprintf("%s, power lost before %q, survivors %v", p.name, hook.Name, survive)
			if bad := w.never(); len(bad) > 0 {
				return states, fmt.Sprintf("%s: %q", point, bad)
			}
			if err := w.recover(p, ledger); err != nil {
				return states, fmt.Sprintf("%s: recovery: %v", point, err)
			}
			if what := w.broken(); what != "" {
				return states, point + ": " + what
			}
			states++
		}
	}
	return states, ""
}

// An action is what somebody else does to the message m1.
type action struct {
	name string
	do   func(w *world)
}

// held finds m1's file on hold by the name that mailq shows.
func (w *world) held() (string, bool) {
	for _, path := range w.files(onHold) {
		b, err := os.ReadFile(path)
		if err != nil || strings.ContainsAny(filepath.Base(path), ".#") {
			continue
		}
		if s, err := look(b); err == nil && subjectLine(s.content) == "m1" && !s.isCopy() {
			return path, true
		}
	}
	return "", false
}

// take notes whose copies are in a file that goes away.
func (w *world) take(path, place string) {
	b, err := os.ReadFile(path)
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := look(b)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range s.recipients() {
		w.taken["m1 "+r] = place
	}
}

var actions = []action{
	{"postsuper -d", func(w *world) {
		if path, ok := w.held(); ok {
			w.take(path, "")
			if err := os.Remove(path); err != nil {
				w.t.Fatal(err)
			}
		}
	}},
	{"postsuper -H", func(w *world) {
		if path, ok := w.held(); ok {
			w.take(path, later)
			if err := os.Rename(path, filepath.Join(w.dir, later, filepath.Base(path))); err != nil {
				w.t.Fatal(err)
			}
		}
	}},
	{"another file in its place", func(w *world) {
		path, ok := w.held()
		if !ok || w.want["m9"] != nil {
			return
		}
		w.take(path, later)
		if err := os.Rename(path, filepath.Join(w.dir, later, filepath.Base(path))); err != nil {
			w.t.Fatal(err)
		}
		theirs := w.put(queueFile(1_795_438_999, "Subject: m9\n\n"+body("m9"), all...))
		if err := os.Rename(w.place(onHold, w.n, theirs), path); err != nil {
			w.t.Fatal(err)
		}
		w.ids["m9"] = filepath.Base(path)
		_, w.want["m9"] = w.path.plan("m9")
	}},
	{"postfix start", func(w *world) { // postsuper -s: a file's name is made to match its inode; short ids only
		for _, path := range w.files(onHold) {
			name := filepath.Base(path)
			ino := inodeOf(w.t, path)
			if w.long || strings.Contains(name, ".") || strings.HasSuffix(name, fmt.Sprintf("%X", ino)) {
				continue
			}
			if err := os.Rename(path, filepath.Join(filepath.Dir(path), name[:5]+fmt.Sprintf("%X", ino))); err != nil {
				w.t.Fatal(err)
			}
		}
	}},
}

// TestTortureAdministrator: at each operation somebody uses Postfix's own
// tools, while we live on.
func TestTortureAdministrator(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points := 0
		for _, l := range layouts {
			for at := range count(t, p, l) {
				for _, a := range actions {
					w := newWorld(t, l)
					w.fill(p)
					hook := &fault.Intrude{At: at, Do: func() { a.do(w) }}
					q, _ := w.open(hook)
					ledger, err := w.commit(q, p)
					point := fmt.Sprintf("%s, %s, %s before %q (%v)", p.name, l.name, a.name, hook.Name, err)
					for range 2 { // we live on
						if _, err := w.commit(q, p); err != nil {
							t.Fatalf("%s: next try: %v", point, err)
						}
					}
					q.Close()
					if err := w.recover(p, ledger); err != nil {
						t.Fatalf("%s: restart: %v", point, err)
					}
					w.settled(point)
					points++
				}
			}
		}
		report(t, points, p, "an administrator meanwhile")
	}
}

// TestTortureAdministratorAfterKill: between a crash and the recovery.
func TestTortureAdministratorAfterKill(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points := 0
		for _, l := range layouts {
			for at := range count(t, p, l) {
				for _, a := range actions {
					w, ledger, point := killed(t, p, l, at)
					a.do(w)
					point += ", then " + a.name
					if err := w.recover(p, ledger); err != nil {
						t.Fatalf("%s: recovery: %v", point, err)
					}
					w.settled(point)
					points++
				}
			}
		}
		report(t, points, p, "an administrator after a kill")
	}
}

// TestTortureAdministratorThenKill: soon after somebody's doing we die.
func TestTortureAdministratorThenKill(t *testing.T) {
	inMemory(t)
	for _, p := range paths {
		points, l := 0, layouts[0]
		for at := 0; at < count(t, p, l); at += sparse() {
			for _, a := range actions {
				for soon := range 4 {
					w := newWorld(t, l)
					w.fill(p)
					intrude := &fault.Intrude{At: at, Do: func() { a.do(w) }}
					hook := &fault.Crash{At: at + soon, Next: intrude}
					q, _ := w.open(hook)
					ledger, _ := w.commit(q, p)
					if w.want["m9"] != nil && strings.Contains(intrude.Name, " incoming/") {
						continue // between our last look and the rename, and death at once: no tool does that
					}
					point := fmt.Sprintf("%s, %s before %q, killed before %q", p.name, a.name, intrude.Name, hook.Name)
					if bad := w.never(); len(bad) > 0 {
						t.Fatalf("%s: %q", point, bad)
					}
					if err := w.recover(p, ledger); err != nil {
						t.Fatalf("%s: recovery: %v", point, err)
					}
					w.settled(point)
					points++
				}
			}
		}
		report(t, points, p, "an administrator, then a kill")
	}
}

// quarantined is a world with one message in quarantine.
func quarantined(t *testing.T, l layout) *world {
	w := newWorld(t, l)
	p := paths[slices.IndexFunc(paths, func(p path) bool { return p.name == "quarantine" })]
	w.ids["m1"] = w.put(queueFile(1_795_438_128, "Subject: m1\n\n"+body("m1"), all...))
	_, w.want["m1"] = p.plan("m1")
	q, _ := w.open(nil)
	if _, err := w.commit(q, p); err != nil {
		t.Fatal(err)
	}
	q.Close()
	return w
}

func (w *world) release(hook durable.Hook) error {
	q, store := w.open(hook)
	m, err := store.Find(context.Background(), w.ids["m1"])
	if err != nil {
		return err
	}
	it, err := store.Open(m)
	if err != nil {
		return err
	}
	defer it.Close()
	_, err = it.Release(context.Background(), q, "tester", false)
	return err
}

// outCopies is how many complete copies each recipient has in incoming.
func (w *world) outCopies(point string) int {
	w.t.Helper()
	n := 0
	for key, fs := range w.copies() {
		if len(w.damage) > 0 {
			w.t.Fatalf("%s: damaged: %q", point, w.damage)
		}
		k := 0
		for _, f := range fs {
			if f.where != out {
				continue
			}
			if k++; f.body() != body("m1") {
				w.t.Fatalf("%s: %s has the body %q in incoming", point, key, f.body())
			}
		}
		n = max(n, k)
	}
	return n
}

// TestTortureQuarantineRelease: stopped, failed and without power at every
// operation, an item is released once by the next try.
func TestTortureQuarantineRelease(t *testing.T) {
	for _, kind := range []string{"killed", "EIO", "power loss"} {
		for _, l := range layouts {
			points := 0
			for at := 0; ; at++ {
				n, done := releasePoint(t, kind, l, at)
				points += n
				if done {
					break
				}
			}
			report(t, points, path{name: "quarantine release"}, kind+", "+l.name)
		}
	}
}

func releasePoint(t *testing.T, kind string, l layout, at int) (points int, done bool) {
	for choose := 0; ; choose++ {
		w := quarantined(t, l)
		crash, fail := &fault.Crash{At: at}, &fault.Fail{At: at, Err: unix.EIO}
		var hook durable.Hook = crash
		var power *fault.Power
		switch kind {
		case "power loss":
			var err error
			if power, err = fault.NewPower(w.top+"/shadow", w.dir, w.quar); err != nil {
				t.Fatal(err)
			}
			crash.Next = power
		case "EIO":
			hook = fail
		}
		err := w.release(hook)
		reached := crash.Dead || fail.Name != ""
		if !reached && err != nil {
			t.Fatal(err)
		}
		if power != nil {
			choices := fault.Choices(power.Pending(), int64(at))
			if choose >= 2*len(choices) {
				return points, !reached
			}
			if err := power.Lose(choices[choose/2], fault.Content(1+choose%2)); err != nil {
				t.Fatal(err)
			}
		}
		points++
		point := fmt.Sprintf("release, %s, %s before %q", l.name, kind, crash.Name+fail.Name)
		if n := w.outCopies(point); n > 1 {
			t.Fatalf("%s: %d copies", point, n)
		}
		if err := w.release(nil); err != nil {
			t.Fatalf("%s: the next try: %v", point, err)
		}
		if n := w.outCopies(point); n != 1 {
			t.Fatalf("%s: %d copies after the next try", point, n)
		}
		for _, path := range w.files(onHold) {
			t.Fatalf("%s: left: %s", point, path)
		}
		if bad := w.dirs(); len(bad) > 0 {
			t.Fatalf("%s: directories that the queue manager cannot use: %q", point, bad)
		}
		if power == nil {
			return points, !reached
		}
	}
}
