package postfix

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/queue"
	"holdfast/queue/quarantine"
	"holdfast/queue/queuetest"
)

// site runs the suite over a queue directory made by hand.
type site struct {
	*spool
	q     *Queue
	store *quarantine.Store
}

func TestConformance(t *testing.T) {
	for _, depth := range []int{0, 2} {
		for _, long := range []bool{false, true} {
			t.Run(fmt.Sprintf("depth %d, long ids %v", depth, long), func(t *testing.T) {
				queuetest.Run(t, func(t *testing.T) queuetest.Site { return newSite(t, depth, long) })
			})
		}
	}
}

func newSite(t *testing.T, depth int, long bool) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{spool: newSpool(t, dir+"/spool", depth, long)}
	if err := os.Mkdir(dir+"/work", 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.store, err = quarantine.New(dir+"/quarantine", nil); err != nil {
		t.Fatal(err)
	}
	s.q, err = New(Config{
		Name: "mta", Dir: s.dir, Hashed: map[string]int{"hold": depth, "incoming": depth, "deferred": 1, "defer": 1},
		Work: dir + "/work", RenderInMemory: 1 << 20, Trigger: []string{}, Modify: ByRewriting,
		Store: s.store, Journal: &fileJournal{path: dir + "/journal"},
		Report: func(e Event) { t.Errorf("reported: %+v", e) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.q.Close()
		s.tidy(t, dir+"/journal")
	})
	return s
}

// tidy: nothing is left of a test but its messages.
func (s *site) tidy(t *testing.T, journal string) {
	for _, name := range []string{"active", "deferred", "defer", "corrupt", "maildrop"} {
		for _, path := range s.files(name) {
			t.Errorf("stray file %s", path)
		}
	}
	for _, bad := range s.spool.dirs() {
		t.Error(bad)
	}
	rows, err := (&fileJournal{path: journal}).Rows()
	if err != nil {
		t.Fatal(err)
	}
	for k := range rows {
		if strings.HasPrefix(k, planKey) {
			t.Errorf("the journal still has the row %q", k)
		}
	}
}

// Queue is the queue.
func (s *site) Queue() queue.Queue { return s.q }

// Put puts a message on hold.
func (s *site) Put(t *testing.T, m queuetest.Message) string {
	t.Helper()
	return s.put(queueFile(1_795_438_128, m.Header+"\n"+m.Body, m.Recipients...))
}

func messageOf(t *testing.T, s seen) queuetest.Message {
	t.Helper()
	m := queuetest.Message{Recipients: s.recipients()}
	m.Header, m.Body, _ = strings.Cut(s.content, "\n\n")
	m.Header += "\n"
	_, rest, _ := strings.Cut(m.Header, "\nSubject: ")
	m.Subject, _, _ = strings.Cut(rest, "\n")
	belong(t, s)
	return m
}

// belong checks that each recipient has its own parameters before it, and
// nothing else is there.
func belong(t *testing.T, s seen) {
	t.Helper()
	var want []rec
	for _, r := range s.recipients() {
		want = append(want, rec{'A', "notify_flags=4"}, rec{'A', "dsn_orig_rcpt=rfc822;" + r}, rec{'O', r}, rec{'R', r})
	}
	from := slices.IndexFunc(s.env, func(r rec) bool { return strings.HasPrefix(r.data, "log_client_address=") })
	if got := s.env[from+1:]; !slices.Equal(got, want) {
		t.Errorf("recipients' records %q, want %q", got, want)
	}
}

// Out looks at incoming as the queue manager does.
func (s *site) Out(t *testing.T) (out []queuetest.Message) {
	t.Helper()
	for _, path := range s.files("incoming") {
		if err := s.fit(path); err != nil {
			t.Error(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := look(b)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		s.inPlace(t, path)
		out = append(out, messageOf(t, got))
	}
	return out
}

// inPlace: the sub-directories of a hashed queue are those of the id's time.
func (s *site) inPlace(t *testing.T, path string) {
	t.Helper()
	for n := range s.n + 1 {
		id := filepath.Base(path)
		if strings.HasPrefix(id, strings.TrimSuffix(s.name(n, 0), "0")) && s.place("incoming", n, id) == path {
			return
		}
	}
	t.Errorf("%s is not where the MTA looks for it", path)
}

// Kept looks at the quarantine's files.
func (s *site) Kept(t *testing.T) (out []queuetest.Message) {
	t.Helper()
	err := s.store.List(context.Background(), func(m quarantine.Meta, err error) bool {
		control, cerr := os.ReadFile(m.Dir + "/control")
		text, terr := os.ReadFile(m.Dir + "/message")
		if err != nil || cerr != nil || terr != nil {
			t.Fatal(err, cerr, terr)
		}
		got, err := look(control)
		if err != nil || got.content != "" {
			t.Errorf("control data of %s: %q, %v", m.Name, got.content, err)
		}
		got.content = string(text)
		msg := messageOf(t, got)
		if string(text[m.BodyAt:]) != msg.Body {
			t.Errorf("the body of %s is said to be at %d", m.Name, m.BodyAt)
		}
		out = append(out, msg)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Inbound counts files on hold, of whatever name.
func (s *site) Inbound(t *testing.T) int {
	t.Helper()
	return len(s.files("hold"))
}

// Item opens the quarantine's only item.
func (s *site) Item(t *testing.T) queue.Item {
	t.Helper()
	var meta quarantine.Meta
	if err := s.store.List(t.Context(), func(m quarantine.Meta, _ error) bool { meta = m; return true }); err != nil {
		t.Fatal(err)
	}
	it, err := s.store.Open(meta)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { it.Close() })
	return it
}
