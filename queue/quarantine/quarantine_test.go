package quarantine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/durable/fault"
)

const message = "Subject: x\n\nthe body\n"

func spec(id string) queue.ItemSpec {
	return queue.ItemSpec{
		Identity: queue.Identity{ID: queue.ID{Queue: "q", Dir: "/in", Name: id}, T: 1_795_438_128, Ino: 7},
		Envelope: queue.Envelope{Sender: "a@example.com", Recipients: []queue.Recipient{{Address: "b@example.net"}}},
		Control:  []byte("V8\n.\n"), BodyAt: 12, Verdict: []byte(`{"disposition":"quarantine"}`),
	}
}

func newStore(t *testing.T, hook durable.Hook) *Store {
	t.Helper()
	s, err := New(filepath.Join(t.TempDir(), "quarantine"), &durable.FS{Hook: hook})
	if err != nil {
		t.Fatal(err)
	}
	s.Now = func() time.Time { return time.Unix(1_800_000_000, 0) }
	return s
}

func keep(t *testing.T, s *Store, id string) Meta {
	t.Helper()
	name, err := s.Prepare(t.Context(), spec(id), strings.NewReader(message))
	if err == nil {
		err = s.Commit(t.Context(), name)
	}
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Find(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func names(t *testing.T, s *Store) (out []string) {
	t.Helper()
	if err := s.List(t.Context(), func(m Meta, err error) bool { out = append(out, fmt.Sprint(m.Name, err)); return true }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAnItemIsVisibleOnlyOnceCommitted(t *testing.T) {
	s := newStore(t, nil)
	name, err := s.Prepare(t.Context(), spec("A"), strings.NewReader(message))
	if err != nil || len(names(t, s)) != 0 {
		t.Fatalf("%v, %v", err, names(t, s))
	}
	again, err := s.Prepare(t.Context(), spec("A"), strings.NewReader(message)) // a redo replaces it
	if err != nil || again != name {
		t.Fatalf("%q, %v", again, err)
	}
	for range 2 {
		if err := s.Commit(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	m, err := s.Find(t.Context(), "A")
	if err != nil || m.Name != name || !strings.HasPrefix(m.Dir, s.Root+"/20261123/") {
		t.Fatalf("%+v, %v", m, err)
	}
	it, err := s.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	f, err := it.Message()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var text bytes.Buffer
	if _, err := text.ReadFrom(f); err != nil || text.String() != message {
		t.Errorf("%q, %v", text.String(), err)
	}
	got := it.Spec()
	if string(got.Control) != "V8\n.\n" || got.BodyAt != 12 || got.Identity != spec("A").Identity || got.Envelope.Recipients[0].Address != "b@example.net" {
		t.Errorf("%+v", got)
	}
	if st, err := os.Stat(m.Dir + "/message"); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if _, err := s.Open(m); !errors.Is(err, ErrBusy) {
		t.Errorf("opened twice: %v", err)
	}
}

func TestItemsAreListedNewestFirstAlsoWithinADay(t *testing.T) {
	s := newStore(t, nil)
	now := time.Unix(1_800_000_000, 0)
	s.Now = func() time.Time { now = now.Add(time.Minute); return now }
	want := []string{}
	for i := range 8 { // the names are hashes: their order is another one
		want = append([]string{keep(t, s, fmt.Sprint("A", i)).Name + "<nil>"}, want...)
	}
	if got := names(t, s); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestAnItemIsFoundByMessageIDAndWhatIsAmbiguousIsSaid(t *testing.T) {
	s := newStore(t, nil)
	put := func(id, text string) string {
		name, err := s.Prepare(t.Context(), spec(id), strings.NewReader(text))
		if err == nil {
			err = s.Commit(t.Context(), name)
		}
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	a := put("A", "From: x\nMessage-Id:\n\t<one@x>\n\nMessage-ID: <body@x>\n")
	b := put("B", "message-id: <two@x>\n\nx\n")
	for what, want := range map[string]string{"<one@x>": a, "one@x": a, "two@x": b} {
		if m, err := s.Find(t.Context(), what); err != nil || m.Name != want {
			t.Errorf("%s: %+v, %v", what, m, err)
		}
	}
	if _, err := s.Find(t.Context(), "body@x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	c := put("C", "Message-ID: <two@x>\n\nx\n")
	_, err := s.Find(t.Context(), "two@x")
	if err == nil || !strings.HasPrefix(err.Error(), "ambiguous: ") || !strings.Contains(err.Error(), c) || !strings.Contains(err.Error(), b) {
		t.Errorf("%v", err)
	}
}

func TestHostileNamesStayInside(t *testing.T) {
	s := newStore(t, nil)
	for _, evil := range []string{"../../etc/passwd", "a\x00b", "a\nb", strings.Repeat("x", 10_000), "\x1b[31m", ""} {
		sp := spec(evil)
		sp.Identity.ID.Queue, sp.Identity.ID.Dir = evil, evil
		name, err := s.Prepare(t.Context(), sp, strings.NewReader(message))
		if err != nil || !validName.MatchString(name) {
			t.Errorf("%.20q: %q, %v", evil, name, err)
		}
	}
	for _, bad := range []string{"../x", "", "a/b", ".prepared"} {
		if s.Commit(t.Context(), bad) == nil || s.Abort(t.Context(), bad) == nil {
			t.Errorf("%q accepted as a name", bad)
		}
	}
}

// requeuer counts releases, as a queue does: by its journal.
type requeuer struct{ published map[string]int }

func (r *requeuer) Requeue(_ context.Context, it queue.Item) (string, error) {
	id := string(it.Journal())
	if id == "" {
		id = fmt.Sprint("NEW", len(r.published))
		if err := it.SetJournal([]byte(id)); err != nil {
			return "", err
		}
	}
	if r.published[id] == 0 {
		r.published[id]++
	}
	return id, nil
}

func TestReleasedOnceUnlessAgain(t *testing.T) {
	s := newStore(t, nil)
	m := keep(t, s, "A")
	it, err := s.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	r := &requeuer{map[string]int{}}
	for i, c := range []struct {
		again bool
		want  string
		total int
	}{{false, "NEW0", 1}, {false, "NEW0", 1}, {true, "NEW1", 2}} {
		got, err := it.Release(t.Context(), r, "me", c.again)
		if err != nil || got.NewID != c.want || len(r.published) != c.total {
			t.Errorf("%d: %+v, %v, %v", i, got, err, r.published)
		}
	}
	rs, err := m.Releases()
	if err != nil || len(rs) != 2 || rs[0].By != "me" {
		t.Errorf("%+v, %v", rs, err)
	}
}

func TestWhatSomebodyElseMayHaveTakenNeedsAWord(t *testing.T) {
	s := newStore(t, nil)
	name, err := s.Prepare(t.Context(), spec("A"), strings.NewReader(message))
	if err == nil {
		err = s.CommitUncertain(t.Context(), name)
	}
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Find(t.Context(), name)
	if err != nil || !m.Uncertain {
		t.Fatalf("%+v, %v", m, err)
	}
	it, err := s.Open(m)
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	r := &requeuer{map[string]int{}}
	if _, err := it.Release(t.Context(), r, "me", false); !errors.Is(err, ErrNotReleasable) {
		t.Errorf("%v", err)
	}
	if _, err := it.Release(t.Context(), r, "me", true); err != nil {
		t.Error(err)
	}
}

func TestDamagedItemsAreShownAsSuch(t *testing.T) {
	s := newStore(t, nil)
	m := keep(t, s, "A")
	if err := os.WriteFile(m.Dir+"/item.json", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := names(t, s); len(got) != 1 || strings.HasSuffix(got[0], "<nil>") {
		t.Errorf("%q", got)
	}
	if _, err := s.Find(t.Context(), "nothing"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// TestKilledAtEveryOperation: an item is there whole, or not at all; a
// release is written down once; a deletion is finished by the next start.
func TestKilledAtEveryOperation(t *testing.T) {
	scenarios := map[string]func(*Store) error{
		"keep": func(s *Store) error {
			name, err := s.Prepare(t.Context(), spec("A"), strings.NewReader(message))
			if err != nil {
				return err
			}
			return s.Commit(t.Context(), name)
		},
		"release": func(s *Store) error { return onItem(t, s, func(it *Item) error { return release(t, it) }) },
		"delete":  func(s *Store) error { return onItem(t, s, (*Item).Delete) },
	}
	for what, do := range scenarios {
		points := 0
		for at := 0; ; at++ {
			s := newStore(t, nil)
			if what != "keep" {
				keep(t, s, "A")
			}
			hook := &fault.Crash{At: at}
			bent := &Store{Root: s.Root, FS: &durable.FS{Hook: hook}, Now: s.Now}
			err := do(bent)
			if !hook.Dead {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			points++
			prepared, perr := s.Prepared(t.Context())
			if perr != nil {
				t.Fatalf("%s, killed before %q: %v", what, hook.Name, perr)
			}
			listed := names(t, s)
			for _, l := range listed {
				if !strings.HasSuffix(l, "<nil>") {
					t.Errorf("%s, killed before %q: %s", what, hook.Name, l)
				}
			}
			if what == "release" && len(listed) != 1 || what != "release" && len(listed)+len(prepared) > 1 {
				t.Errorf("%s, killed before %q: %d visible, %d prepared", what, hook.Name, len(listed), len(prepared))
			}
			if err := do(s); err != nil && !errors.Is(err, ErrNotFound) {
				t.Errorf("%s, killed before %q, again: %v", what, hook.Name, err)
			}
			if n := len(names(t, s)); n != map[string]int{"keep": 1, "release": 1, "delete": 0}[what] {
				t.Errorf("%s, killed before %q, again: %d items", what, hook.Name, n)
			}
		}
		if points < 3 {
			t.Errorf("%s: only %d points", what, points)
		}
	}
}

func onItem(t *testing.T, s *Store, do func(*Item) error) error {
	m, err := s.Find(t.Context(), "A")
	if err != nil {
		return err
	}
	it, err := s.Open(m)
	if err != nil {
		return err
	}
	defer it.Close()
	return do(it)
}

var published = &requeuer{map[string]int{}}

func release(t *testing.T, it *Item) error {
	_, err := it.Release(t.Context(), published, "me", false)
	return err
}
