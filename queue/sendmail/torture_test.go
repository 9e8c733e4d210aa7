//go:build torture

package sendmail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	"holdfast/queue/outbox"
	"holdfast/queue/quarantine"
)

// world is one small mail system on the disk.
type world struct {
	t                  testing.TB
	dir, in, out, quar string
	want               map[string][]expect // by original id
	token              string
	told               map[string]int // how often somebody was told of a message's quarantine
	lives              int            // of the program so far
	early              []string       // told of a message that was still queued
}

// expect is one group of recipients: where they must end up, with which body.
type expect struct {
	rcpts  []string
	do     queue.Disposition
	body   string
	header string // must be there; "" for an unmodified message
}

// newWorld makes one in memory where that is possible: what is durable is
// the model's business, and a disk would only be slow. The caller removes it.
func newWorld(t testing.TB) *world {
	parent := "/dev/shm"
	if unix.Access(parent, unix.W_OK) != nil {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "holdfast-torture-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, dir: dir, in: dir + "/in", out: dir + "/out", quar: dir + "/quarantine",
		want: map[string][]expect{}, told: map[string]int{}, token: "0123456789abcdef0123456789abcdef",
	}
	for _, d := range []string{w.in, w.out, w.dir + "/work", w.dir + "/shadow"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := quarantine.New(w.quar, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := outbox.New(w.dir+"/outbox", nil); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) remove() {
	if err := os.RemoveAll(w.dir); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) put(id string, rcpts ...string) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "V8\nT1795438128\nK0\nN0\nP30100\nFbs\n$_client [192.0.2.1]\nS<a@example.com>\n")
	for _, r := range rcpts {
		fmt.Fprintf(&b, "rRFC822; %s\nRPFD:<%s>\n", r, r)
	}
	fmt.Fprintf(&b, "H??Subject: %s\n.\n", id)
	for name, text := range map[string][]byte{"df": []byte("body of " + id + "\n"), "qf": b.Bytes()} {
		if err := os.WriteFile(filepath.Join(w.in, name+id), text, 0o640); err != nil {
			w.t.Fatal(err)
		}
	}
}

// life is one life of the program: everything that it opens.
type life struct {
	*Queue
	store *quarantine.Store
	box   *outbox.Box
}

func (w *world) open(hook durable.Hook) life {
	w.lives++
	fsys := &durable.FS{Hook: hook}
	store := &quarantine.Store{Root: w.quar, FS: fsys, Now: fixedNow}
	q, err := New(Config{
		Name: "q", In: []string{w.in}, Out: []string{w.out}, Work: w.dir + "/work", Token: w.token,
		RenderInMemory: 1 << 20, Lock: "flock", Store: store, FS: fsys,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return life{q, store, &outbox.Box{Root: w.dir + "/outbox", FS: fsys}}
}

// path is one way through a commit.
type path struct {
	name string
	plan func(id string) ([]queue.Group, []expect)
	tell bool // somebody is told, through the outbox
	// published: the marker goes out with the original id, where it is found
	// without a journal, so that nothing is left.
	published bool
}

func body(id string) string { return "body of " + id + "\n" }

var edited = queue.HeaderEdit{Op: queue.HeaderAdd, Name: "X-Scanned", Value: "yes"}

var all = []string{"b@example.net", "c@example.net", "d@example.net"}

var paths = append(outcomes, told(outcomes[3]), told(outcomes[5]))

// told is a path on which somebody is told of what was decided: pending in
// the outbox before the decision, ready after it.
func told(p path) path {
	p.name, p.tell = p.name+", told", true
	return p
}

var outcomes = []path{
	{name: "release", plan: func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release}}, []expect{{all, queue.Release, body(id), ""}}
	}},
	{name: "release modified", published: true, plan: func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release, Edit: &queue.Edit{Header: []queue.HeaderEdit{edited}, Body: strings.NewReader("new " + id + "\n")}}},
			[]expect{{all, queue.Release, "new " + id + "\n", "X-Scanned: yes"}}
	}},
	{name: "release with a header", published: true, plan: func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release, Edit: &queue.Edit{Header: []queue.HeaderEdit{edited}}}},
			[]expect{{all, queue.Release, body(id), "X-Scanned: yes"}}
	}},
	{name: "split", published: true, plan: func(id string) ([]queue.Group, []expect) {
		groups := []queue.Group{
			{Recipients: []int{0}, Disposition: queue.Release},
			{Recipients: []int{1}, Disposition: queue.Release, Edit: &queue.Edit{Header: []queue.HeaderEdit{edited}, Body: strings.NewReader("new " + id + "\n")}},
			{Recipients: []int{2}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
		}
		return groups, []expect{
			{all[:1], queue.Release, body(id), ""},
			{all[1:2], queue.Release, "new " + id + "\n", "X-Scanned: yes"},
			{all[2:], queue.Quarantine, body(id), ""},
		}
	}},
	{name: "split, nothing released", plan: func(id string) ([]queue.Group, []expect) {
		groups := []queue.Group{
			{Recipients: []int{0, 1}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
			{Recipients: []int{2}, Disposition: queue.Drop},
		}
		return groups, []expect{{all[:2], queue.Quarantine, body(id), ""}, {all[2:], queue.Drop, "", ""}}
	}},
	{name: "quarantine", plan: func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Quarantine, Item: []byte(`{}`)}}, []expect{{all, queue.Quarantine, body(id), ""}}
	}},
}

// commit claims and commits everything that is in the inbound queue, as the
// loop does; decided messages are resumed.
func (w *world) commit(l life, p path) (stats map[string]queue.Stats, failed error) {
	ctx := context.Background()
	stats = map[string]queue.Stats{}
	var plans []queue.Plan
	var entries []queue.Entry
	if _, err := l.List(ctx, func(e queue.Entry) bool { entries = append(entries, e); return true }); err != nil {
		return stats, err
	}
	defer func() { // the kernel closes what a dead program held
		for _, p := range plans {
			p.Claim.Close()
		}
	}()
	sort.Slice(entries, func(i, j int) bool { return entries[i].ID.Name < entries[j].ID.Name })
	for _, e := range entries {
		c, err := l.Lock(ctx, e)
		if err != nil {
			return stats, err
		}
		if _, err := c.Read(ctx); err != nil {
			c.Close()
			return stats, err
		}
		if c.Decided() { // the journal knows it from the life that decided
			failed = errors.Join(failed, w.settle(l, p, c.Identity(), l.Resume(ctx, c)))
			continue
		}
		stats[e.ID.Name] = c.Stats()
		groups, _ := p.plan(e.ID.Name)
		plans = append(plans, queue.Plan{Claim: c, Groups: groups})
	}
	if p.tell {
		var effects []outbox.Effect
		for _, pl := range plans {
			effects = append(effects, outbox.Effect{Kind: "notify", Identity: pl.Claim.Identity(), Outcome: "quarantine", When: fixedNow(), Data: []byte("{}")})
		}
		if err := l.box.Pend(ctx, effects); err != nil {
			return stats, errors.Join(failed, err)
		}
	}
	for i, o := range l.Commit(ctx, plans) {
		failed = errors.Join(failed, w.settle(l, p, plans[i].Claim.Identity(), o))
	}
	if p.tell {
		_, err := l.box.Deliver(ctx, w.tell, func(error) {})
		failed = errors.Join(failed, err)
	}
	return stats, failed
}

// settle lets go of a message's effect, or takes it back if the message is
// still to be judged (gateway/effects.go).
func (w *world) settle(l life, p path, id queue.Identity, o queue.Outcome) error {
	ctx := context.Background()
	switch {
	case !p.tell:
		return o.Err
	case o.Err == nil:
		return l.box.Ready(ctx, id)
	}
	c, err := l.Lock(ctx, queue.Entry{ID: id.ID})
	if err != nil {
		return o.Err
	}
	defer c.Close()
	if _, err := c.Read(ctx); err != nil || c.Decided() {
		return o.Err
	}
	return errors.Join(o.Err, l.box.Cancel(ctx, id))
}

// tell is who is told. He looks whether it is true.
func (w *world) tell(_ context.Context, e outbox.Effect) error {
	id := e.Identity.ID.Name
	if _, err := os.Lstat(w.in + "/qf" + id); err == nil {
		w.early = append(w.early, id+" is still queued, and somebody was told")
	}
	w.told[id]++
	return nil
}

// recover does what the gateway does at its start (recover.go, in its order)
// and then goes on. It can be stopped as well.
func (w *world) recover(p path, journal map[string]queue.Stats, hook durable.Hook) (map[string]queue.Stats, error) {
	ctx := context.Background()
	l := w.open(hook)
	for id, st := range journal {
		if err := l.Sweep(ctx, queue.ID{Queue: "q", Dir: w.in, Name: id}, st); err != nil {
			return nil, err
		}
	}
	if err := w.recoverItems(l); err != nil {
		return nil, err
	}
	if err := w.recoverEffects(l); err != nil {
		return nil, err
	}
	if _, err := l.Tidy(ctx); err != nil {
		return nil, err
	}
	return w.commit(l, p)
}

func (w *world) recoverItems(l life) error {
	ctx := context.Background()
	items, err := l.store.Prepared(ctx)
	if err != nil {
		return err
	}
	for _, m := range items {
		c, err := l.Lock(ctx, queue.Entry{ID: m.Identity.ID})
		if errors.Is(err, queue.ErrGone) {
			if err := l.store.CommitUncertain(ctx, m.Name); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		err = w.recoverItem(l, c, m.Name)
		c.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *world) recoverItem(l life, c queue.Claim, name string) error {
	ctx := context.Background()
	if _, err := c.Read(ctx); err != nil {
		return err
	}
	if c.Decided() {
		return l.Resume(ctx, c).Err
	}
	return l.store.Abort(ctx, name)
}

func (w *world) recoverEffects(l life) error {
	ctx := context.Background()
	pending, err := l.box.Pending(ctx, func(error) {}) // a power loss may have torn one that nothing depends on yet
	if err != nil {
		return err
	}
	for _, e := range pending {
		c, err := l.Lock(ctx, queue.Entry{ID: e.Identity.ID})
		if errors.Is(err, queue.ErrGone) {
			err = l.box.Ready(ctx, e.Identity)
		} else if err == nil {
			_, err = c.Read(ctx)
			if err == nil && !c.Decided() {
				err = l.box.Cancel(ctx, e.Identity)
			}
			c.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// found is one recipient's copy somewhere.
type found struct{ where, body, header string }

// copies looks at the directories with eyes of its own: which recipient has
// which complete copy where. marked control files count where they are.
func (w *world) copies() map[string][]found {
	out := map[string][]found{}
	for _, dir := range []string{w.in, w.out} {
		names, err := filepath.Glob(dir + "/qf*")
		if err != nil {
			w.t.Fatal(err)
		}
		for _, qf := range names {
			control, err := os.ReadFile(qf)
			if err != nil || !strings.HasSuffix(string(control), "\n.\n") {
				continue
			}
			data, err := os.ReadFile(dir + "/df" + filepath.Base(qf)[2:])
			if err != nil {
				data = []byte("(missing)")
			}
			w.collect(out, filepath.Base(dir), string(control), string(data))
		}
	}
	beside, err := filepath.Glob(w.in + "/hc*")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, hc := range beside {
		control, err := os.ReadFile(hc)
		if err != nil || !strings.HasSuffix(string(control), "\n.\n") {
			continue
		}
		name := filepath.Base(hc)[2:]
		id, _, _ := strings.Cut(name, ".")
		data, err := os.ReadFile(w.in + "/hb" + name)
		if err != nil {
			data, err = os.ReadFile(w.in + "/df" + id)
		}
		if err == nil {
			w.collect(out, "beside", string(control), string(data))
		}
	}
	for _, pattern := range []string{"/2*/*", "/.prepared/*"} {
		names, err := filepath.Glob(w.quar + pattern)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, item := range names {
			control, err := os.ReadFile(item + "/control")
			if err != nil {
				continue
			}
			message, err := os.ReadFile(item + "/message")
			if err != nil {
				continue
			}
			_, text, _ := strings.Cut(string(message), "\n\n")
			where := "quarantine"
			if strings.HasPrefix(pattern, "/.") {
				where = "prepared"
			}
			w.collect(out, where, string(control), text)
		}
	}
	return out
}

func (w *world) collect(out map[string][]found, where, control, data string) {
	subject := ""
	for line := range strings.Lines(control) {
		if s, ok := strings.CutPrefix(line, "H??Subject: "); ok {
			subject = strings.TrimSpace(s)
		}
	}
	for line := range strings.Lines(control) {
		if r, ok := strings.CutPrefix(line, "RPFD:<"); ok {
			key := subject + " " + strings.TrimSuffix(strings.TrimSpace(r), ">")
			out[key] = append(out[key], found{where, data, control})
		}
	}
}

// account counts recipients whose copy is lost, doubled or wrong.
func (w *world) account() (lost, doubled, wrong []string) {
	have := w.copies()
	for id, groups := range w.want {
		for _, g := range groups {
			for _, r := range g.rcpts {
				key := id + " " + r
				got := slices.DeleteFunc(slices.Clone(have[key]), func(f found) bool { return f.where == "prepared" || f.where == "beside" })
				if g.do == queue.Drop {
					if len(got) > 0 {
						doubled = append(doubled, key+" was dropped and is in "+got[0].where)
					}
					continue
				}
				switch {
				case len(got) == 0:
					lost = append(lost, key)
				case len(got) > 1:
					doubled = append(doubled, fmt.Sprintf("%s in %s and %s", key, got[0].where, got[1].where))
				case got[0].where != map[queue.Disposition]string{queue.Release: "out", queue.Quarantine: "quarantine"}[g.do],
					got[0].body != g.body, !strings.Contains(got[0].header, g.header):
					wrong = append(wrong, fmt.Sprintf("%s in %s: %q", key, got[0].where, got[0].body))
				}
			}
		}
	}
	return lost, doubled, wrong
}

// never checks what must hold at the instant of a crash: every recipient has
// a complete copy, and nobody's outbound copy is one that policy forbids.
func (w *world) never() (bad []string) {
	have := w.copies()
	for id, groups := range w.want {
		for _, g := range groups {
			for _, r := range g.rcpts {
				whole := g.do == queue.Drop
				for _, f := range have[id+" "+r] {
					ok := f.body == body(id) || f.body == g.body
					whole = whole || ok
					if f.where == "out" && (g.do != queue.Release || f.body != g.body || !strings.Contains(f.header, g.header)) {
						bad = append(bad, fmt.Sprintf("%s %s: outbound copy %q is not what was decided", id, r, f.body))
					}
				}
				if !whole {
					bad = append(bad, id+" "+r+": no complete copy anywhere")
				}
			}
		}
	}
	return bad
}

func fixedNow() time.Time { return time.Unix(1_800_000_000, 0) }

// fill queues messages; a later round has more of them than an earlier one.
func (w *world) fill(p path, round int) {
	for i := range 3 + round%3 {
		id := fmt.Sprintf("6ANC00000%d000790", i)
		w.put(id, all...)
		_, w.want[id] = p.plan(id)
	}
}

func rounds() int {
	n, err := strconv.Atoi(os.Getenv("HOLDFAST_ROUNDS"))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// The columns of the table that TestTortureTable prints.
const (
	killed      = "killed"
	killedTwice = "killed twice"
	failing     = "I/O errors"
	powerless   = "power lost"
	ledgerless  = "ledger gone"
	tokenless   = "token gone"
)

// score is one path's row in the table.
type score struct {
	points                 map[string]int
	rounds                 int
	lost, doubled, changed int
}

var (
	scores = map[string]*score{}
	ranked []string // paths in the order in which they were met
)

func scoreOf(path string) *score {
	s := scores[path]
	if s == nil {
		s = &score{points: map[string]int{}}
		scores[path], ranked = s, append(ranked, path)
	}
	return s
}

// book enters one point of a path into the table, and what the oracle found.
func book(t *testing.T, path, column, point string, round int, f findings) {
	t.Helper()
	s := scoreOf(path)
	s.points[column]++
	s.rounds = max(s.rounds, round+1)
	s.lost += len(f.lost)
	s.doubled += len(f.doubled)
	s.changed += len(f.wrong)
	if !f.clean() {
		t.Errorf("%s, %s: %s", path, point, f)
		if s.lost+s.doubled+s.changed > 10 {
			t.FailNow()
		}
	}
}

// findings are what the oracle has against a world.
type findings struct {
	lost, doubled, wrong []string
}

func (f findings) clean() bool { return len(f.lost)+len(f.doubled)+len(f.wrong) == 0 }

func (f findings) String() string {
	return fmt.Sprintf("lost %q, doubled %q, wrong %q", f.lost, f.doubled, f.wrong)
}

// settled is what must hold once everything is done: each message in its
// place, once; each quarantine told of, once per life at most; nothing left.
func (w *world) settled(p path) (f findings) {
	f.lost, f.doubled, f.wrong = w.account()
	f.wrong = append(f.wrong, w.early...)
	for id := range w.want {
		n := w.told[id]
		if p.tell && n == 0 {
			f.lost = append(f.lost, "the notice of "+id)
		}
		if n > w.lives || !p.tell && n > 0 {
			f.doubled = append(f.doubled, fmt.Sprintf("%d notices of %s", n, id))
		}
	}
	for _, dir := range []string{w.in, w.dir + "/outbox/pending", w.dir + "/outbox/ready"} {
		left, err := os.ReadDir(dir)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, e := range left {
			f.wrong = append(f.wrong, "left: "+filepath.Base(dir)+"/"+e.Name())
		}
	}
	return f
}

// count says how many operations a commit of this path takes.
func count(t *testing.T, p path, round int) int {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, round)
	hook := &fault.Crash{At: -1}
	if _, err := w.commit(w.open(hook), p); err != nil {
		t.Fatal(err)
	}
	if f := w.settled(p); !f.clean() {
		t.Fatalf("%s, undisturbed: %s", p.name, f)
	}
	return hook.N
}

// kill stops a commit before operation at, and lets the next life go on.
func kill(t *testing.T, p path, at, round int) (name string, f findings) {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, round)
	hook := &fault.Crash{At: at}
	stats, err := w.commit(w.open(hook), p)
	if !hook.Dead {
		t.Fatalf("%s: operation %d was not reached (%v)", p.name, at, err)
	}
	if f.wrong = w.never(); len(f.wrong) > 0 {
		return hook.Name, f
	}
	if _, err := w.recover(p, stats, nil); err != nil {
		f.wrong = append(f.wrong, "recovery: "+err.Error())
		return hook.Name, f
	}
	return hook.Name, w.settled(p)
}

// TestTortureKill stops the program at every operation of every path.
func TestTortureKill(t *testing.T) {
	for _, p := range paths {
		for round := range rounds() {
			for at := range count(t, p, round) {
				name, f := kill(t, p, at, round)
				book(t, p.name, killed, "killed before "+name, round, f)
			}
		}
	}
}

// TestTortureKillLedgerGone: as TestTortureKill, and the ledger is gone as
// well, so that no journal says what was decided. All that may be left is what
// nothing names any more: files that the MTA ignores.
func TestTortureKillLedgerGone(t *testing.T) {
	for _, p := range paths {
		for at := range count(t, p, 0) {
			ledgerGone(t, p, at)
		}
	}
}

func ledgerGone(t *testing.T, p path, at int) {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, 0)
	hook := &fault.Crash{At: at}
	if _, err := w.commit(w.open(hook), p); !hook.Dead {
		t.Fatalf("%s: operation %d was not reached (%v)", p.name, at, err)
	}
	point := "killed before " + hook.Name + ", ledger gone"
	if _, err := w.recover(p, nil, nil); err != nil {
		t.Fatalf("%s, %s: recovery: %v", p.name, point, err)
	}
	var f findings
	f.lost, f.doubled, f.wrong = w.account()
	names, err := os.ReadDir(w.in)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range names {
		if !strings.HasPrefix(e.Name(), "df") && !strings.HasPrefix(e.Name(), "h") || p.published {
			f.wrong = append(f.wrong, "left: "+e.Name())
		}
	}
	book(t, p.name, ledgerless, point, 0, f)
	w.again(t, p, point)
}

// again has messages with the same ids come once more, as after a restore from
// a backup: what is left of the first ones must not be in their way.
func (w *world) again(t *testing.T, p path, point string) {
	t.Helper()
	for _, dir := range []string{w.out, w.quar} { // the first ones have been dealt with
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := quarantine.New(w.quar, nil); err != nil {
		t.Fatal(err)
	}
	w.fill(p, 0)
	if _, err := w.commit(w.open(nil), p); err != nil {
		t.Fatalf("%s, %s: the same ids again: %v", p.name, point, err)
	}
	if lost, doubled, wrong := w.account(); len(lost)+len(doubled)+len(wrong) > 0 {
		t.Fatalf("%s, %s: the same ids again: lost %q, doubled %q, wrong %q", p.name, point, lost, doubled, wrong)
	}
}

// TestTortureKillTokenGone: even the token is another one. What was decided is
// left as it is, and said so; everything else leaves. With the right token the
// rest is finished.
func TestTortureKillTokenGone(t *testing.T) {
	for _, p := range paths {
		for at := range count(t, p, 0) {
			tokenGone(t, p, at)
		}
	}
}

func tokenGone(t *testing.T, p path, at int) {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, 0)
	hook := &fault.Crash{At: at}
	if _, err := w.commit(w.open(hook), p); !hook.Dead {
		t.Fatalf("%s: operation %d was not reached (%v)", p.name, at, err)
	}
	point := "killed before " + hook.Name + ", token gone"
	ours := w.token
	w.token = strings.Repeat("f", 32)
	other := w.open(nil)
	other.ids.base = time.Now().Unix() + 3600 // another life makes other ids
	if _, err := w.commit(other, p); err != nil && !errors.Is(err, queue.ErrForeign) {
		t.Fatalf("%s, %s: %v", p.name, point, err)
	}
	f := findings{wrong: w.never()}
	w.token = ours
	if _, err := w.recover(p, nil, nil); err != nil {
		t.Fatalf("%s, %s: with the token back: %v", p.name, point, err)
	}
	lost, doubled, wrong := w.account()
	f.lost, f.doubled, f.wrong = lost, doubled, append(f.wrong, wrong...)
	book(t, p.name, tokenless, point, 0, f)
}

// TestTortureKillTwice stops the recovery as well, at every operation of it;
// in one round, at every seventh.
func TestTortureKillTwice(t *testing.T) {
	step := max(1, 16/rounds())
	for _, p := range paths {
		for round := range rounds() {
			for at := range count(t, p, round) {
				for again := (at + round) % step; twice(t, p, at, again, round); again += step {
				}
			}
		}
	}
}

// twice reports whether the recovery was long enough to be stopped there.
func twice(t *testing.T, p path, at, again, round int) bool {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, round)
	stats, _ := w.commit(w.open(&fault.Crash{At: at}), p)
	hook := &fault.Crash{At: again}
	more, _ := w.recover(p, stats, hook)
	if !hook.Dead {
		return false
	}
	point := fmt.Sprintf("killed at %d, and its recovery before %s", at, hook.Name)
	if f := (findings{wrong: w.never()}); !f.clean() {
		book(t, p.name, killedTwice, point, round, f)
		return true
	}
	for id, st := range more {
		stats[id] = st
	}
	if _, err := w.recover(p, stats, nil); err != nil {
		t.Fatalf("%s, %s: the second recovery: %v", p.name, point, err)
	}
	book(t, p.name, killedTwice, point, round, w.settled(p))
	return true
}

// TestTortureError lets every operation fail once: mail is complete
// afterwards, and the next try settles it.
func TestTortureError(t *testing.T) {
	for _, p := range paths {
		for round := range rounds() {
			for at := range count(t, p, round) {
				for _, cause := range []error{unix.ENOSPC, unix.EIO} {
					failOnce(t, p, at, round, cause)
				}
			}
		}
	}
}

func failOnce(t *testing.T, p path, at, round int, cause error) {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, round)
	hook := &fault.Fail{At: at, Err: cause}
	stats, _ := w.commit(w.open(hook), p)
	point := fmt.Sprintf("%v at %s", cause, hook.Name)
	if f := (findings{wrong: w.never()}); !f.clean() {
		book(t, p.name, failing, point, round, f)
		return
	}
	if _, err := w.recover(p, stats, nil); err != nil {
		t.Fatalf("%s, %s: the next try: %v", p.name, point, err)
	}
	book(t, p.name, failing, point, round, w.settled(p))
}

// TestTorturePower takes the power away before every operation, with every
// or many choices of what had reached the disk.
func TestTorturePower(t *testing.T) {
	for _, p := range paths {
		for round := range rounds() {
			for at := range count(t, p, round) + 1 {
				for k := 0; ; k++ {
					point, f, more := powerPoint(t, p, at, k, round)
					if !more {
						break
					}
					book(t, p.name, powerless, point, round, f)
				}
			}
		}
	}
}

// powerPoint is the k-th state that a power loss before operation at can
// leave; more is false if there are not as many.
func powerPoint(t *testing.T, p path, at, k, round int) (point string, f findings, more bool) {
	t.Helper()
	w := newWorld(t)
	defer w.remove()
	w.fill(p, round)
	power, err := fault.NewPower(w.dir+"/shadow", w.in, w.out, w.quar, w.dir+"/outbox")
	if err != nil {
		t.Fatal(err)
	}
	hook := &fault.Crash{At: at, Next: power}
	stats, _ := w.commit(w.open(hook), p)
	choices := fault.Choices(power.Pending(), int64(at*1000+round))
	if k >= 2*len(choices) {
		return "", f, false
	}
	if err := power.Lose(choices[k/2], fault.Content(1+k%2)); err != nil {
		t.Fatal(err)
	}
	point = fmt.Sprintf("power lost before %s, survivors %v", hook.Name, choices[k/2])
	if f.wrong = w.never(); len(f.wrong) > 0 {
		return point, f, true
	}
	if _, err := w.recover(p, stats, nil); err != nil {
		f.wrong = append(f.wrong, "recovery: "+err.Error())
		return point, f, true
	}
	return point, w.settled(p), true
}

// TestTorturePlantedBug: the harness itself is broken unless it reports a
// commit that does things in the wrong order.
func TestTorturePlantedBug(t *testing.T) {
	defer func() { planted = "" }()
	for _, c := range []struct {
		bug  string
		path path
	}{
		{swapDecide, outcomes[0]}, {swapDecide, outcomes[5]}, {swapPublish, outcomes[1]}, {swapPublish, outcomes[3]},
	} {
		planted = ""
		n := count(t, c.path, 0)
		for _, bug := range []string{"", c.bug} {
			planted = bug
			byKill, byPower := "", ""
			for at := 0; at < n && byKill == ""; at++ {
				if name, f := kill(t, c.path, at, 0); !f.clean() {
					byKill = fmt.Sprintf("killed before %s: %s", name, f)
				}
			}
			for at := 0; at < n && byPower == ""; at++ {
				for k := 0; byPower == ""; k++ {
					point, f, more := powerPoint(t, c.path, at, k, 0)
					if !more {
						break
					}
					if !f.clean() {
						byPower = fmt.Sprintf("%s: %s", point, f)
					}
				}
			}
			if (byKill != "") != (bug != "") || (byPower != "") != (bug != "") {
				t.Errorf("%s, planted %q: by kills %q, by power loss %q", c.path.name, bug, byKill, byPower)
			}
			if bug != "" {
				t.Logf("planted in %q, %s: caught, %.150s", c.path.name, bug, byKill)
			}
		}
	}
}

// quarantined is a world with one message in quarantine.
func quarantined(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	p := outcomes[len(outcomes)-1]
	id := "6ANC000000000790"
	w.put(id, all...)
	_, w.want[id] = p.plan(id)
	if _, err := w.commit(w.open(nil), p); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) release(hook durable.Hook) error {
	l := w.open(hook)
	m, err := l.store.Find(context.Background(), "6ANC000000000790")
	if err != nil {
		return err
	}
	it, err := l.store.Open(m)
	if err != nil {
		return err
	}
	defer it.Close()
	_, err = it.Release(context.Background(), l, "tester", false)
	return err
}

// outbound is what is wrong with the copies on the outbound side: each
// recipient must have one, or at most one while the release is not done.
func (w *world) outbound(done bool) (f findings) {
	have := w.copies()
	for _, r := range all {
		key, n := "6ANC000000000790 "+r, 0
		for _, c := range have[key] {
			if c.where != "out" {
				continue
			}
			if n++; c.body != body("6ANC000000000790") {
				f.wrong = append(f.wrong, fmt.Sprintf("%s has the body %q outbound", key, c.body))
			}
		}
		switch {
		case n > 1:
			f.doubled = append(f.doubled, key)
		case n == 0 && done:
			f.lost = append(f.lost, key)
		}
	}
	return f
}

// TestTortureQuarantineRelease: stopped at every operation, killed at every
// one of the repetition too, with an I/O error at every one, and without
// power, an item is released once by the next try.
func TestTortureQuarantineRelease(t *testing.T) {
	for round := range rounds() {
		releases(t, killed, round, func(at, k int) (releaseFault, bool) {
			return releaseFault{first: &fault.Crash{At: at}}, k == 0
		})
		releases(t, killedTwice, round, func(at, k int) (releaseFault, bool) {
			return releaseFault{first: &fault.Crash{At: at}, second: &fault.Crash{At: k}}, true
		})
		releases(t, failing, round, func(at, k int) (releaseFault, bool) {
			causes := []error{unix.ENOSPC, unix.EIO}
			if k >= len(causes) {
				return releaseFault{}, false
			}
			return releaseFault{first: &fault.Fail{At: at, Err: causes[k]}}, true
		})
		releases(t, powerless, round, func(at, k int) (releaseFault, bool) {
			return releaseFault{first: &fault.Crash{At: at}, power: true, choice: k}, true
		})
	}
}

// releaseFault is what happens to one release.
type releaseFault struct {
	first, second durable.Hook
	power         bool
	choice        int
}

// met says that the fault came before the end.
func met(h durable.Hook) (name string, ok bool) {
	switch h := h.(type) {
	case *fault.Crash:
		return h.Name, h.Dead
	case *fault.Fail:
		return h.Name, h.Name != ""
	}
	return "", false
}

// releases runs a release with each fault that next names, until no
// operation is left for it.
func releases(t *testing.T, column string, round int, next func(at, k int) (releaseFault, bool)) {
	t.Helper()
	for at := 0; ; at++ {
		reached := false
		for k := 0; ; k++ {
			rf, ok := next(at, k)
			if !ok {
				break
			}
			first, more := releaseOnce(t, column, round, rf)
			reached = reached || first
			if !more {
				break
			}
		}
		if !reached {
			return
		}
	}
}

func releaseOnce(t *testing.T, column string, round int, rf releaseFault) (reached, more bool) {
	t.Helper()
	w := quarantined(t)
	defer w.remove()
	var p *fault.Power
	if crash, ok := rf.first.(*fault.Crash); ok && rf.power {
		var err error
		if p, err = fault.NewPower(w.dir+"/shadow", w.in, w.out, w.quar); err != nil {
			t.Fatal(err)
		}
		crash.Next = p
	}
	err := w.release(rf.first)
	name, reached := met(rf.first)
	if !reached && err != nil {
		t.Fatal(err)
	}
	if p != nil {
		choices := fault.Choices(p.Pending(), int64(round))
		if rf.choice >= 2*len(choices) {
			return reached, false
		}
		if err := p.Lose(choices[rf.choice/2], fault.Content(1+rf.choice%2)); err != nil {
			t.Fatal(err)
		}
	}
	point := column + " before " + name
	if f := w.outbound(false); !f.clean() {
		book(t, "quarantine release", column, point, round, f)
		return reached, true
	}
	if rf.second != nil {
		_ = w.release(rf.second) // killed, too
		again, ok := met(rf.second)
		if !ok {
			return reached, false
		}
		point += ", and again before " + again
	}
	if err := w.release(nil); err != nil {
		t.Fatalf("%s: the next try: %v", point, err)
	}
	book(t, "quarantine release", column, point, round, w.outbound(true))
	return reached, true
}

// TestTortureTable prints what the tests above have tried. It is the last
// one of this file.
func TestTortureTable(t *testing.T) {
	columns := []string{killed, killedTwice, failing, powerless}
	t.Logf("%-28s %8s %13s %11s %11s %12s %11s %7s %6s %8s %8s", "points by path", killed, killedTwice, failing, powerless, ledgerless, tokenless, "rounds", "lost", "doubled", "changed")
	if len(ranked) == 0 {
		t.Fatal("nothing was tried: run it with the tests above, -run Torture")
	}
	var total score
	for _, path := range ranked {
		s := scores[path]
		t.Logf("%-28s %8d %13d %11d %11d %12d %11d %7d %6d %8d %8d", path, s.points[killed], s.points[killedTwice], s.points[failing], s.points[powerless], s.points[ledgerless], s.points[tokenless], s.rounds, s.lost, s.doubled, s.changed)
		total.lost += s.lost
		total.doubled += s.doubled
		total.changed += s.changed
		for _, c := range columns {
			if s.points[c] == 0 {
				t.Errorf("%s: no point of the kind %q was tried", path, c)
			}
		}
	}
	if total.lost+total.doubled+total.changed > 0 || len(ranked) != len(paths)+1 {
		t.Errorf("%d paths; lost %d, doubled %d, changed %d", len(ranked), total.lost, total.doubled, total.changed)
	}
}
