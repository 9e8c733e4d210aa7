// Package queuetest is the contract of queue.Queue: one suite that every
// implementation passes, told only how to put a message in and how to look
// at what came out.
package queuetest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"
	"strings"
	"testing"

	"holdfast/queue"
)

// Message is what is put into a queue, and what is found at its far end.
type Message struct {
	Subject    string
	Recipients []string
	Header     string // the whole header block as it will be sent, LF
	Body       string
}

// Site is one queue with its two sides, made for one test.
type Site interface {
	Queue() queue.Queue
	// Put queues a message as the MTA would; it returns the queue id.
	Put(t *testing.T, m Message) string
	// Out lists what the MTA would deliver.
	Out(t *testing.T) []Message
	// Kept lists what the quarantine shows.
	Kept(t *testing.T) []Message
	// Inbound is how many files the inbound side holds.
	Inbound(t *testing.T) int
	// Item opens the only item of the quarantine.
	Item(t *testing.T) queue.Item
}

// An OwnedSite is one whose MTA may run as any user, so that files we write
// must belong to whom the original belonged to.
type OwnedSite interface {
	Site
	// Own gives the files of a queued message an owner, a group and a mode.
	Own(t *testing.T, id string, uid, gid int, mode os.FileMode)
	// Owners describes the files on the outbound side, one each, as
	// "uid:gid mode".
	Owners(t *testing.T) []string
}

func letter(subject string, rcpts ...string) Message {
	if len(rcpts) == 0 {
		rcpts = []string{"b@example.net"}
	}
	return Message{
		Subject: subject, Recipients: rcpts, Body: "body of " + subject + "\n",
		Header: "Received: from client.example.com\n\tby mx.example.org\nFrom: a@example.com\nSubject: " + subject + "\nX-Old: 1\n",
	}
}

// Run runs the suite; make builds a site of its own for each part.
func Run(t *testing.T, site func(t *testing.T) Site) {
	for name, part := range map[string]func(*testing.T, Site){
		"list, lock, read, render": look, "release": releaseUnmodified, "modified": releaseModified,
		"split": split, "quarantine and release": quarantine, "drop": drop, "a batch of all": batch,
		"plans that are wrong": wrongPlans, "gone and busy": goneAndBusy,
	} {
		t.Run(name, func(t *testing.T) { part(t, site(t)) })
	}
	if _, ok := site(t).(OwnedSite); ok {
		t.Run("owner and mode", func(t *testing.T) { owners(t, func() OwnedSite { return site(t).(OwnedSite) }) })
	}
}

// owners: whatever way a message leaves, its files keep owner, group and mode.
func owners(t *testing.T, site func() OwnedSite) {
	edit := &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "X-New", Value: "v"}}}
	body := func() *queue.Edit { return &queue.Edit{Body: strings.NewReader("new\n")} }
	for _, c := range []struct {
		way    string
		files  int
		groups []queue.Group
	}{
		{"released", 2, []queue.Group{{Disposition: queue.Release}}},
		{"with a header", 2, []queue.Group{{Disposition: queue.Release, Edit: edit}}},
		{"with a new body", 2, []queue.Group{{Disposition: queue.Release, Edit: body()}}},
		{"split", 4, []queue.Group{
			{Recipients: []int{0}, Disposition: queue.Release}, {Recipients: []int{1}, Disposition: queue.Release, Edit: body()},
		}},
	} {
		s := site()
		id := s.Put(t, letter("o", "b@example.net", "c@example.net"))
		s.Own(t, id, 12345, 23456, 0o640)
		commit(t, s, one(claim(t, s)["o"], c.groups...))
		got := s.Owners(t)
		if len(got) != c.files {
			t.Errorf("%s: %d files, want %d", c.way, len(got), c.files)
		}
		for _, o := range got {
			if o != "12345:23456 0640" {
				t.Errorf("%s: a file is of %s", c.way, o)
			}
		}
	}
}

// claim claims every message, by subject.
func claim(t *testing.T, s Site) map[string]queue.Claim {
	t.Helper()
	out := map[string]queue.Claim{}
	_, err := s.Queue().List(t.Context(), func(e queue.Entry) bool {
		c, err := s.Queue().Lock(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		text := rendered(t, c)
		_, rest, _ := strings.Cut(text, "Subject: ")
		subject, _, _ := strings.Cut(rest, "\n")
		out[subject] = c
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func rendered(t *testing.T, c queue.Claim) string {
	t.Helper()
	f, err := c.Render(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("what a worker gets can be written to")
	}
	return string(text)
}

// commit carries out one plan per message and fails on any error.
func commit(t *testing.T, s Site, plans ...queue.Plan) []queue.Outcome {
	t.Helper()
	outs := s.Queue().Commit(t.Context(), plans)
	for _, o := range outs {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
	}
	return outs
}

func want(t *testing.T, what string, got []Message, expect ...Message) {
	t.Helper()
	line := func(ms []Message) string {
		var out []string
		for _, m := range ms {
			r := slices.Clone(m.Recipients)
			sort.Strings(r)
			out = append(out, fmt.Sprintf("%s to %v: %q %q", m.Subject, r, m.Header, m.Body))
		}
		sort.Strings(out)
		return strings.Join(out, "\n")
	}
	if g, w := line(got), line(expect); g != w {
		t.Errorf("%s:\n%s\nwant\n%s", what, g, w)
	}
}

func empty(t *testing.T, s Site) {
	t.Helper()
	if n := s.Inbound(t); n != 0 {
		t.Errorf("%d files are left on the inbound side", n)
	}
}

func one(c queue.Claim, groups ...queue.Group) queue.Plan {
	return queue.Plan{Claim: c, Groups: groups}
}

func look(t *testing.T, s Site) {
	m := letter("look", "b@example.net", "c@example.net")
	id := s.Put(t, m)
	c := claim(t, s)["look"]
	if c == nil || c.Entry().ID.Name != id || c.Decided() || c.Identity().Ino == 0 || c.Stats().Control.Ino == 0 {
		t.Fatalf("%+v", c)
	}
	env, err := c.Read(t.Context()) // reading again is allowed
	if err != nil || len(env.Recipients) != 2 || env.Recipients[1].Address != "c@example.net" {
		t.Errorf("%+v, %v", env, err)
	}
	if got := rendered(t, c); got != m.Header+"\n"+m.Body {
		t.Errorf("%q", got)
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(claim(t, s)) != 1 {
		t.Error("a closed claim cannot be claimed again")
	}
}

func releaseUnmodified(t *testing.T, s Site) {
	a, b := letter("a"), letter("b", "x@example.net", "y@example.net")
	s.Put(t, a)
	s.Put(t, b)
	cs := claim(t, s)
	commit(t, s, one(cs["a"], queue.Group{Disposition: queue.Release}), one(cs["b"], queue.Group{Disposition: queue.Release}))
	want(t, "out", s.Out(t), a, b)
	empty(t, s)
}

func releaseModified(t *testing.T, s Site) {
	m := letter("m")
	s.Put(t, m)
	commit(t, s, one(claim(t, s)["m"], queue.Group{Disposition: queue.Release, Edit: &queue.Edit{
		Header: []queue.HeaderEdit{{Op: queue.HeaderRemove, Name: "X-Old"}, {Op: queue.HeaderAdd, Name: "X-New", Value: "v\nX-Evil: 1"}},
		Body:   strings.NewReader("another\n"),
	}}))
	m.Header = strings.Replace(m.Header, "X-Old: 1\n", "X-New: v\n\tX-Evil: 1\n", 1)
	m.Body = "another\n"
	want(t, "out", s.Out(t), m)
	empty(t, s)
}

func split(t *testing.T, s Site) {
	m := letter("s", "b@example.net", "c@example.net", "d@example.net", "e@example.net")
	s.Put(t, m)
	outs := commit(t, s, one(
		claim(t, s)["s"],
		queue.Group{Recipients: []int{1}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
		queue.Group{Recipients: []int{0}, Disposition: queue.Release},
		queue.Group{Recipients: []int{3}, Disposition: queue.Drop},
		queue.Group{Recipients: []int{2}, Disposition: queue.Release, Edit: &queue.Edit{Body: strings.NewReader("new\n")}},
	))
	if ids := outs[0].NewIDs; len(ids) != 4 || ids[1] == ids[3] || ids[0] == "" {
		t.Errorf("new ids %q", ids)
	}
	first, second, kept := m, m, m
	first.Recipients, second.Recipients, kept.Recipients = m.Recipients[:1], m.Recipients[2:3], m.Recipients[1:2]
	second.Body = "new\n"
	want(t, "out", s.Out(t), first, second)
	want(t, "kept", s.Kept(t), kept)
	empty(t, s)
}

func quarantine(t *testing.T, s Site) {
	m := letter("q", "b@example.net", "c@example.net")
	s.Put(t, m)
	commit(t, s, one(claim(t, s)["q"], queue.Group{Disposition: queue.Quarantine, Item: []byte(`{}`)}))
	want(t, "kept", s.Kept(t), m)
	want(t, "out", s.Out(t))
	empty(t, s)
	it := s.Item(t)
	for range 2 { // repeating publishes nothing twice
		if _, err := s.Queue().Requeue(t.Context(), it); err != nil {
			t.Fatal(err)
		}
	}
	want(t, "out after the release", s.Out(t), m)
	empty(t, s)
}

func drop(t *testing.T, s Site) {
	s.Put(t, letter("d"))
	commit(t, s, one(claim(t, s)["d"], queue.Group{Disposition: queue.Drop}))
	want(t, "out", s.Out(t))
	want(t, "kept", s.Kept(t))
	empty(t, s)
}

func batch(t *testing.T, s Site) {
	var out, kept []Message
	for i := range 20 {
		m := letter(fmt.Sprint("m", i))
		s.Put(t, m)
		if i%3 == 0 {
			kept = append(kept, m)
		} else {
			out = append(out, m)
		}
	}
	var plans []queue.Plan
	for subject, c := range claim(t, s) {
		g := queue.Group{Disposition: queue.Release}
		if slices.ContainsFunc(kept, func(m Message) bool { return m.Subject == subject }) {
			g = queue.Group{Disposition: queue.Quarantine, Item: []byte(`{}`)}
		}
		plans = append(plans, one(c, g))
	}
	commit(t, s, plans...)
	want(t, "out", s.Out(t), out...)
	want(t, "kept", s.Kept(t), kept...)
	empty(t, s)
}

func wrongPlans(t *testing.T, s Site) {
	m := letter("w", "b@example.net", "c@example.net")
	s.Put(t, m)
	for _, groups := range [][]queue.Group{
		nil,
		{{Recipients: []int{0}, Disposition: queue.Release}},
		{{Recipients: []int{0, 1, 1}, Disposition: queue.Release}},
		{{Recipients: []int{0, 2}, Disposition: queue.Release}},
		{{Disposition: queue.Release, Edit: &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "bad name"}}}}},
	} {
		c := claim(t, s)["w"]
		if out := s.Queue().Commit(t.Context(), []queue.Plan{one(c, groups...)})[0]; out.Err == nil {
			t.Errorf("accepted: %+v", groups)
		}
	}
	commit(t, s, one(claim(t, s)["w"], queue.Group{Disposition: queue.Release})) // it was left whole and unlocked
	want(t, "out", s.Out(t), m)
}

func goneAndBusy(t *testing.T, s Site) {
	s.Put(t, letter("g"))
	c := claim(t, s)["g"]
	if _, err := s.Queue().Lock(t.Context(), c.Entry()); !errors.Is(err, queue.ErrBusy) {
		t.Errorf("claimed twice: %v", err)
	}
	commit(t, s, one(c, queue.Group{Disposition: queue.Release}))
	if _, err := s.Queue().Lock(t.Context(), c.Entry()); !errors.Is(err, queue.ErrGone) {
		t.Errorf("after its release: %v", err)
	}
}
