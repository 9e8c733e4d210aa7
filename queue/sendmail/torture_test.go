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
	"holdfast/queue/quarantine"
)

// world is one small mail system on the disk.
type world struct {
	t                  testing.TB
	dir, in, out, quar string
	want               map[string][]expect // by original id
	token              string
}

// expect is one group of recipients: where they must end up, with which body.
type expect struct {
	rcpts  []string
	do     queue.Disposition
	body   string
	header string // must be there; "" for an unmodified message
}

func newWorld(t testing.TB) *world {
	dir := t.TempDir()
	w := &world{t: t, dir: dir, in: dir + "/in", out: dir + "/out", quar: dir + "/quarantine", want: map[string][]expect{}, token: "0123456789abcdef0123456789abcdef"}
	for _, d := range []string{w.in, w.out, w.dir + "/work", w.dir + "/shadow"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := quarantine.New(w.quar, nil); err != nil {
		t.Fatal(err)
	}
	return w
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

func (w *world) open(hook durable.Hook) (*Queue, *quarantine.Store) {
	fsys := &durable.FS{Hook: hook}
	store := &quarantine.Store{Root: w.quar, FS: fsys, Now: fixedNow}
	q, err := New(Config{
		Name: "q", In: []string{w.in}, Out: []string{w.out}, Work: w.dir + "/work", Token: w.token,
		RenderInMemory: 1 << 20, Lock: "flock", Store: store, FS: fsys,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return q, store
}

// path is one way through a commit.
type path struct {
	name string
	plan func(id string) ([]queue.Group, []expect)
}

func body(id string) string { return "body of " + id + "\n" }

var edited = queue.HeaderEdit{Op: queue.HeaderAdd, Name: "X-Scanned", Value: "yes"}

var all = []string{"b@example.net", "c@example.net", "d@example.net"}

var paths = []path{
	{"release", func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release}}, []expect{{all, queue.Release, body(id), ""}}
	}},
	{"release modified", func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release, Edit: &queue.Edit{Header: []queue.HeaderEdit{edited}, Body: strings.NewReader("new " + id + "\n")}}},
			[]expect{{all, queue.Release, "new " + id + "\n", "X-Scanned: yes"}}
	}},
	{"release with a header", func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Release, Edit: &queue.Edit{Header: []queue.HeaderEdit{edited}}}},
			[]expect{{all, queue.Release, body(id), "X-Scanned: yes"}}
	}},
	{"split", func(id string) ([]queue.Group, []expect) {
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
	{"split, nothing released", func(id string) ([]queue.Group, []expect) {
		groups := []queue.Group{
			{Recipients: []int{0, 1}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
			{Recipients: []int{2}, Disposition: queue.Drop},
		}
		return groups, []expect{{all[:2], queue.Quarantine, body(id), ""}, {all[2:], queue.Drop, "", ""}}
	}},
	{"quarantine", func(id string) ([]queue.Group, []expect) {
		return []queue.Group{{Disposition: queue.Quarantine, Item: []byte(`{}`)}}, []expect{{all, queue.Quarantine, body(id), ""}}
	}},
}

// commit claims and commits everything that is in the inbound queue, as the
// loop does; decided messages are resumed.
func (w *world) commit(q *Queue, p path) (stats map[string]queue.Stats, failed error) {
	ctx := context.Background()
	stats = map[string]queue.Stats{}
	var plans []queue.Plan
	var entries []queue.Entry
	if _, err := q.List(ctx, func(e queue.Entry) bool { entries = append(entries, e); return true }); err != nil {
		return stats, err
	}
	defer func() { // the kernel closes what a dead program held
		for _, p := range plans {
			p.Claim.Close()
		}
	}()
	sort.Slice(entries, func(i, j int) bool { return entries[i].ID.Name < entries[j].ID.Name })
	for _, e := range entries {
		c, err := q.Lock(ctx, e)
		if err != nil {
			return stats, err
		}
		if _, err := c.Read(ctx); err != nil {
			c.Close()
			if errors.Is(err, queue.ErrForeign) { // left as it is; the others are not
				failed = errors.Join(failed, err)
				continue
			}
			return stats, err
		}
		stats[e.ID.Name] = c.Stats()
		if c.Decided() {
			failed = errors.Join(failed, q.Resume(ctx, c).Err)
			continue
		}
		groups, _ := p.plan(e.ID.Name)
		plans = append(plans, queue.Plan{Claim: c, Groups: groups})
	}
	for _, o := range q.Commit(ctx, plans) {
		failed = errors.Join(failed, o.Err)
	}
	return stats, failed
}

// recover does what the loop does at its start and then goes on.
func (w *world) recover(p path, journal map[string]queue.Stats) error {
	ctx := context.Background()
	q, store := w.open(nil)
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
		if _, err := c.Read(ctx); err != nil {
			return err
		}
		if c.Decided() {
			if out := q.Resume(ctx, c); out.Err != nil {
				return out.Err
			}
			continue
		}
		c.Close()
		if err := store.Abort(ctx, m.Name); err != nil {
			return err
		}
	}
	for id, st := range journal {
		if err := q.Sweep(ctx, queue.ID{Queue: "q", Dir: w.in, Name: id}, st); err != nil {
			return err
		}
	}
	if _, err := w.commit(q, p); err != nil {
		return err
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

const batch = 3

func (w *world) fill(p path) {
	for i := range batch {
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

// count says how many operations a commit of this path takes.
func count(t *testing.T, p path) int {
	w := newWorld(t)
	w.fill(p)
	hook := &fault.Crash{At: -1}
	q, _ := w.open(hook)
	if _, err := w.commit(q, p); err != nil {
		t.Fatal(err)
	}
	check(t, w, p.name, "clean run")
	return hook.N
}

func check(t *testing.T, w *world, name, point string) {
	t.Helper()
	lost, doubled, wrong := w.account()
	if len(lost)+len(doubled)+len(wrong) > 0 {
		t.Fatalf("%s, %s: lost %q, doubled %q, wrong %q", name, point, lost, doubled, wrong)
	}
	left, err := os.ReadDir(w.in)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("%s, %s: left in the inbound directory: %s", name, point, e.Name())
	}
}

// TestTortureKill stops the program at every operation of every path.
func TestTortureKill(t *testing.T) {
	for _, p := range paths {
		n := count(t, p)
		for at := range n {
			w := newWorld(t)
			w.fill(p)
			hook := &fault.Crash{At: at}
			q, _ := w.open(hook)
			stats, err := w.commit(q, p)
			if !hook.Dead {
				t.Fatalf("%s: operation %d of %d was not reached (%v)", p.name, at, n, err)
			}
			if bad := w.never(); len(bad) > 0 {
				t.Fatalf("%s, killed before %q: %q", p.name, hook.Name, bad)
			}
			if err := w.recover(p, stats); err != nil {
				t.Fatalf("%s, killed before %q: recovery: %v", p.name, hook.Name, err)
			}
			check(t, w, p.name, "killed before "+hook.Name)
		}
		t.Logf("%3d points  %-24s 1 round  lost 0  doubled 0", n, p.name)
	}
}

// TestTortureKillLedgerGone: as TestTortureKill, and the ledger is gone as
// well, so that no journal says what was decided. All that may be left is what
// nothing names any more: files that the MTA ignores.
func TestTortureKillLedgerGone(t *testing.T) {
	for _, p := range paths {
		n, left := count(t, p), 0
		for at := range n {
			w := newWorld(t)
			w.fill(p)
			hook := &fault.Crash{At: at}
			q, _ := w.open(hook)
			if _, err := w.commit(q, p); !hook.Dead {
				t.Fatalf("%s: operation %d of %d was not reached (%v)", p.name, at, n, err)
			}
			if err := w.recover(p, nil); err != nil {
				t.Fatalf("%s, killed before %q: recovery: %v", p.name, hook.Name, err)
			}
			lost, doubled, wrong := w.account()
			if len(lost)+len(doubled)+len(wrong) > 0 {
				t.Fatalf("%s, killed before %q: lost %q, doubled %q, wrong %q", p.name, hook.Name, lost, doubled, wrong)
			}
			names, err := os.ReadDir(w.in)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range names {
				left++
				if !strings.HasPrefix(e.Name(), "df") && !strings.HasPrefix(e.Name(), "h") {
					t.Errorf("%s, killed before %q: left in the inbound directory: %s", p.name, hook.Name, e.Name())
				}
			}
			w.again(t, p, "killed before "+hook.Name)
		}
		t.Logf("%3d points  %-24s 1 round  lost 0  doubled 0  (ledger gone, %d files left)", n, p.name, left)
	}
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
	w.fill(p)
	q, _ := w.open(nil)
	if _, err := w.commit(q, p); err != nil {
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
		n, foreign := count(t, p), 0
		for at := range n {
			w := newWorld(t)
			w.fill(p)
			hook := &fault.Crash{At: at}
			q, _ := w.open(hook)
			if _, err := w.commit(q, p); !hook.Dead {
				t.Fatalf("%s: operation %d of %d was not reached (%v)", p.name, at, n, err)
			}
			point := fmt.Sprintf("%s, killed before %q", p.name, hook.Name)
			ours := w.token
			w.token = strings.Repeat("f", 32)
			other, _ := w.open(nil)
			other.ids.base = time.Now().Unix() + 3600 // another life makes other ids
			if _, err := w.commit(other, p); errors.Is(err, queue.ErrForeign) {
				foreign++
			} else if err != nil {
				t.Fatalf("%s: with another token: %v", point, err)
			}
			if bad := w.never(); len(bad) > 0 {
				t.Fatalf("%s: with another token: %q", point, bad)
			}
			w.token = ours
			if err := w.recover(p, nil); err != nil {
				t.Fatalf("%s: with the token back: %v", point, err)
			}
			if lost, doubled, wrong := w.account(); len(lost)+len(doubled)+len(wrong) > 0 {
				t.Fatalf("%s: lost %q, doubled %q, wrong %q", point, lost, doubled, wrong)
			}
		}
		t.Logf("%3d points  %-24s 1 round  lost 0  doubled 0  (token gone: left alone at %d points)", n, p.name, foreign)
	}
}

// TestTortureKillTwice stops the recovery as well.
func TestTortureKillTwice(t *testing.T) {
	for _, p := range paths {
		n, second := count(t, p), 0
		for at := range n {
			for again := 0; ; again += max(1, 40/rounds()) {
				w := newWorld(t)
				w.fill(p)
				q, _ := w.open(&fault.Crash{At: at})
				stats, _ := w.commit(q, p)
				hook := &fault.Crash{At: again}
				q2, _ := w.open(hook)
				more, _ := w.commit(q2, p)
				if bad := w.never(); len(bad) > 0 {
					t.Fatalf("%s, killed at %d and before %q: %q", p.name, at, hook.Name, bad)
				}
				for id, st := range more {
					stats[id] = st
				}
				if err := w.recover(p, stats); err != nil {
					t.Fatalf("%s, killed at %d and before %q: recovery: %v", p.name, at, hook.Name, err)
				}
				lost, doubled, wrong := w.account()
				if len(lost)+len(doubled)+len(wrong) > 0 {
					t.Fatalf("%s, killed at %d and before %q: lost %q, doubled %q, wrong %q", p.name, at, hook.Name, lost, doubled, wrong)
				}
				second++
				if !hook.Dead {
					break
				}
			}
		}
		t.Logf("%4d points  %-24s 1 round  lost 0  doubled 0  (killed twice)", second, p.name)
	}
}

// TestTortureError lets every operation fail once: mail is complete
// afterwards, and the next try settles it.
func TestTortureError(t *testing.T) {
	for _, p := range paths {
		n := count(t, p)
		for at := range n {
			for _, cause := range []error{unix.ENOSPC, unix.EIO} {
				w := newWorld(t)
				w.fill(p)
				hook := &fault.Fail{At: at, Err: cause}
				q, _ := w.open(hook)
				stats, _ := w.commit(q, p)
				if bad := w.never(); len(bad) > 0 {
					t.Fatalf("%s, %v at %q: %q", p.name, cause, hook.Name, bad)
				}
				if err := w.recover(p, stats); err != nil {
					t.Fatalf("%s, %v at %q: next try: %v", p.name, cause, hook.Name, err)
				}
				lost, doubled, wrong := w.account()
				if len(lost)+len(doubled)+len(wrong) > 0 {
					t.Fatalf("%s, %v at %q: lost %q, doubled %q, wrong %q", p.name, cause, hook.Name, lost, doubled, wrong)
				}
			}
		}
		t.Logf("%4d points  %-24s 1 round  lost 0  doubled 0  (errors)", 2*n, p.name)
	}
}

// TestTorturePower takes the power away before every operation, with every
// or many choices of what had reached the disk.
func TestTorturePower(t *testing.T) {
	for _, p := range paths {
		n, states := count(t, p), 0
		for at := range n + 1 {
			states += powerPoint(t, p, at)
		}
		t.Logf("%5d states  %-24s %d rounds  lost 0  doubled 0  (power loss)", states, p.name, rounds())
	}
}

func powerPoint(t *testing.T, p path, at int) (states int) {
	pending := -1
	for round := range rounds() {
		for k := 0; ; k++ {
			w := newWorld(t)
			w.fill(p)
			power, err := fault.NewPower(w.dir+"/shadow", w.in, w.out, w.quar)
			if err != nil {
				t.Fatal(err)
			}
			hook := &fault.Crash{At: at, Next: power}
			q, _ := w.open(hook)
			stats, _ := w.commit(q, p)
			pending = power.Pending()
			choices := fault.Choices(pending, int64(at*1000+round))
			if k >= 2*len(choices) {
				break
			}
			survive, content := choices[k/2], fault.Content(1+k%2)
			if err := power.Lose(survive, content); err != nil {
				t.Fatal(err)
			}
			point := fmt.Sprintf("%s, power lost before %q, survivors %v", p.name, hook.Name, survive)
			if bad := w.never(); len(bad) > 0 {
				t.Fatalf("%s: %q", point, bad)
			}
			if err := w.recover(p, stats); err != nil {
				t.Fatalf("%s: recovery: %v", point, err)
			}
			lost, doubled, wrong := w.account()
			if len(lost)+len(doubled)+len(wrong) > 0 {
				t.Fatalf("%s: lost %q, doubled %q, wrong %q", point, lost, doubled, wrong)
			}
			states++
		}
	}
	return states
}

// quarantined is a world with one message in quarantine.
func quarantined(t *testing.T) *world {
	w := newWorld(t)
	p := paths[len(paths)-1]
	id := "6ANC000000000790"
	w.put(id, all...)
	_, w.want[id] = p.plan(id)
	q, _ := w.open(nil)
	if _, err := w.commit(q, p); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) release(hook durable.Hook) error {
	q, store := w.open(hook)
	m, err := store.Find(context.Background(), "6ANC000000000790")
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

// outCopies is how many complete copies each recipient has on the outbound
// side; a control file without its body is none, and an error.
func (w *world) outCopies(t *testing.T, point string) int {
	t.Helper()
	n := 0
	for key, fs := range w.copies() {
		k := 0
		for _, f := range fs {
			if f.where != "out" {
				continue
			}
			if k++; f.body != body("6ANC000000000790") {
				t.Fatalf("%s: %s has the body %q outbound", point, key, f.body)
			}
		}
		n = max(n, k)
	}
	return n
}

// TestTortureQuarantineRelease: stopped at every operation, and without
// power, an item is released once by the next try.
func TestTortureQuarantineRelease(t *testing.T) {
	for _, power := range []bool{false, true} {
		points := 0
		for at := 0; ; at++ {
			dead := false
			for choose := 0; ; choose++ {
				w := quarantined(t)
				var p *fault.Power
				hook := &fault.Crash{At: at}
				if power {
					var err error
					if p, err = fault.NewPower(w.dir+"/shadow", w.in, w.out, w.quar); err != nil {
						t.Fatal(err)
					}
					hook.Next = p
				}
				err := w.release(hook)
				if dead = hook.Dead; !dead && err != nil {
					t.Fatal(err)
				}
				if power {
					choices := fault.Choices(p.Pending(), int64(at))
					if choose >= 2*len(choices) {
						break
					}
					if err := p.Lose(choices[choose/2], fault.Content(1+choose%2)); err != nil {
						t.Fatal(err)
					}
				}
				points++
				point := fmt.Sprintf("stopped before %q, power %v", hook.Name, power)
				if n := w.outCopies(t, point); n > 1 {
					t.Fatalf("%s: %d copies", point, n)
				}
				if err := w.release(nil); err != nil {
					t.Fatalf("%s: the next try: %v", point, err)
				}
				if n := w.outCopies(t, point); n != 1 {
					t.Fatalf("%s: %d copies after the next try", point, n)
				}
				if !power {
					break
				}
			}
			if !dead {
				break
			}
		}
		t.Logf("%3d points  %-24s 1 round  lost 0  doubled 0  (power %v)", points, "quarantine release", power)
	}
}
