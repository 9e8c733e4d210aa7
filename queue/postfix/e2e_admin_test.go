//go:build e2e

package postfix

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/queue"
	"holdfast/queue/quarantine"
)

// office is what an administrator, a sender and Holdfast do to one Postfix at
// the same time.
type office struct {
	m       *mta
	rand    *rand.Rand // the administrator's
	mu      sync.Mutex
	sent    map[string]string // subject: queue id, "" if the answer was lost
	deleted map[string]bool   // some file of it
	undone  map[string]bool   // all of it: nobody may get it any more
	counts  map[string]int    // what the administrator did
}

const (
	kindPlain  = "plain"
	kindEdited = "edited"
	kindSplit  = "split"
)

var officeRcpts = []string{"b@example.net", "c@example.net", "d@example.net"}

// TestE2EAnAdministratorAtWork: beside Holdfast and a sender, somebody uses
// Postfix's own tools at random. Each recipient gets each message once, or has
// it in quarantine; what was deleted does not come back.
func TestE2EAnAdministratorAtWork(t *testing.T) {
	for i, r := range routes {
		t.Run(r.name, func(t *testing.T) {
			m := newMTA(t, mtaOptions{byHeader: true, main: []string{"enable_long_queue_ids = yes"}})
			m.expect("postsuper.*(hold|deferred)/.*No such file", "postsuper lists a directory, and then somebody else is quicker")
			o := &office{
				m: m, rand: rand.New(rand.NewPCG(7, uint64(i))), sent: map[string]string{}, deleted: map[string]bool{},
				undone: map[string]bool{}, counts: map[string]int{},
			}
			refused := map[string]bool{} // some wait for a second try, so that there is deferred mail
			m.sink.refuse = func(text string) bool {
				s := subjectOf(text)
				first := strings.HasSuffix(s, "0") && !refused[s]
				refused[s] = true
				return first
			}
			c := m.config(ByRename, r.modify)
			c.Report = func(e Event) { t.Logf("reported: %s: %s: %v", e.ID, e.What, e.Err) }
			o.work(open(t, c))
			o.account()
			t.Logf("%d messages, the administrator: %v, %d deleted", len(o.sent), o.counts, len(o.deleted))
		})
	}
}

// work has all three at work until the sender and the administrator are done,
// and finishes what is left.
func (o *office) work(q *Queue) {
	var others sync.WaitGroup
	done := make(chan struct{})
	others.Add(2)
	go func() { defer others.Done(); o.send(90) }()
	go func() { defer others.Done(); o.administrate(40) }()
	go func() { others.Wait(); close(done) }()
	for over := false; !over; {
		select {
		case <-done:
			over = true
		default:
		}
		o.turn(q)
	}
	o.m.until("only what the administrator holds is on hold", func() bool { return o.turn(q) == 0 && o.m.quiet() })
	o.m.run("postsuper", "-H", "ALL")
	o.m.run("postqueue", "-f")
	o.m.settle()
}

// quiet says that nothing is on its way to hold.
func (m *mta) quiet() bool { return len(m.files("maildrop"))+len(m.files("incoming")) == 0 }

// turn takes all that is on hold through Holdfast, as the daemon does, and
// returns for how many messages there was something to do.
func (o *office) turn(q *Queue) (n int) {
	ctx := context.Background()
	var plans []queue.Plan
	_, err := q.List(ctx, func(e queue.Entry) bool {
		c, err := q.Lock(ctx, e)
		if err != nil {
			return true // somebody else's, or gone
		}
		_, err = c.Read(ctx)
		switch {
		case errors.Is(err, queue.ErrForeign):
			c.Close()
		case err != nil:
			n++
			c.Close()
			if errors.Is(err, queue.ErrDamaged) {
				o.m.t.Error(err)
			}
		case c.Decided():
			n++
			q.Resume(ctx, c)
		default:
			plans = append(plans, o.plan(c))
		}
		return true
	})
	if err != nil {
		o.m.t.Error(err)
	}
	time.Sleep(100 * time.Millisecond) // the administrator's best moment
	var ids []string
	for _, out := range q.Commit(ctx, plans) {
		n++
		ids = append(ids, out.NewIDs...)
		if out.Err != nil && !errors.Is(out.Err, queue.ErrGone) {
			o.m.t.Logf("%s: %v", out.ID, out.Err)
		}
		if errors.Is(out.Err, queue.ErrCollision) || errors.Is(out.Err, queue.ErrUnchangeable) || errors.Is(out.Err, queue.ErrDamaged) {
			o.m.t.Error(out.Err)
		}
	}
	_ = q.Kick(ctx, ids) // Postfix may be stopped
	return n
}

func (o *office) plan(c queue.Claim) queue.Plan {
	all := []queue.Group{{Disposition: queue.Release}}
	subject := subjectOf(rendered(o.m.t, c))
	edit := &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderReplace, Name: "X-Changed", Value: "yes"}}}
	switch rcpts := len(c.(*claim).env.Recipients); {
	case strings.HasPrefix(subject, kindEdited):
		all[0].Edit = edit
	case strings.HasPrefix(subject, kindSplit) && rcpts == len(officeRcpts):
		all = []queue.Group{
			{Recipients: []int{0}, Disposition: queue.Release, Edit: edit},
			{Recipients: []int{1}, Disposition: queue.Release},
			{Recipients: []int{2}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
		}
	}
	return queue.Plan{Claim: c, Groups: all}
}

// send sends n messages. One whose answer was lost may have been accepted.
func (o *office) send(n int) {
	for i := range n {
		subject := fmt.Sprintf("%s-%d", []string{kindPlain, kindEdited, kindSplit}[i%3], i)
		x := mail{from: "a@example.com", text: lettered(subject, "", "body of "+subject+"\n")}
		for _, r := range officeRcpts {
			x.rcpts = append(x.rcpts, "<"+r+">")
		}
		o.mu.Lock()
		o.sent[subject] = ""
		o.mu.Unlock()
		id, err := deliver(o.m.smtp, "client.example.com", x)
		o.mu.Lock()
		if err == nil {
			o.sent[subject] = id
		}
		o.mu.Unlock()
	}
}

// administrate does n things, one after the other.
func (o *office) administrate(n int) {
	for i := range n {
		what := []string{"-h", "-H", "-d", "-r", "-s", "-h", "-H", "-d", "-r"}[o.rand.IntN(9)]
		switch {
		case i%20 == 10:
			what = "stop"
			o.m.stop()
			for range 100 { // a start beside a master that is still ending does nothing
				o.m.run("postfix", "start")
				if o.m.command("postfix", "status").Run() == nil && speaks(o.m.listener) && speaks(o.m.smtp) {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
		case what == "-s":
			o.m.run("postsuper", "-s")
		default:
			o.one(what)
		}
		o.mu.Lock()
		o.counts[what]++
		o.mu.Unlock()
	}
}

func speaks(address string) bool {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// one does something to one message. Only deferred mail is put on hold: of what
// is being delivered at that moment Postfix itself makes two. Of copies on their
// way back an administrator knows nothing.
func (o *office) one(what string) {
	from := "hold"
	if what == "-h" {
		from = "deferred"
	}
	ids := o.m.files(from)
	for i := 0; i < 50 && len(ids) == 0; i++ { // nothing to do now
		time.Sleep(20 * time.Millisecond)
		ids = o.m.files(from)
	}
	if len(ids) == 0 {
		return
	}
	id := ids[o.rand.IntN(len(ids))]
	raw, ok := o.peek(from, id)
	if !ok || bytes.Contains(raw, []byte("helo_name="+heloPrefix)) {
		return
	}
	out := o.m.run("postsuper", what, id, from)
	if what == "-d" && strings.Contains(out, id+": removed") {
		o.noteDeleted(id, raw)
	}
}

// peek reads a file in a queue.
func (o *office) peek(queueName, id string) (raw []byte, ok bool) {
	if strings.Contains(id, ".") {
		return nil, false
	}
	for _, pattern := range []string{"/" + id, "/?/" + id} {
		found, err := filepath.Glob(filepath.Join(o.m.spool, queueName) + pattern)
		if err != nil || len(found) != 1 {
			continue
		}
		raw, err = os.ReadFile(found[0])
		return raw, err == nil
	}
	return nil, false
}

var subjectIn = regexp.MustCompile(`Subject: ((?:plain|edited|split)-\d+)`)

func (o *office) noteDeleted(id string, raw []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	subject := string(subjectIn.FindSubmatch(raw)[1])
	o.deleted[subject] = true
	// The file that the client's message became, and not one of ours.
	if o.sent[subject] == id && !bytes.Contains(raw, []byte(markAttr)) {
		o.undone[subject] = true
	}
}

// account: each recipient has each message once.
func (o *office) account() {
	t := o.m.t
	t.Helper()
	have := map[string]int{}
	for _, d := range o.m.sink.got {
		subject := subjectOf(d.message)
		if !strings.HasSuffix(d.message, "\n\nbody of "+subject+"\n") {
			t.Errorf("%s: delivered %q", subject, d.message)
		}
		for _, r := range d.rcpts {
			_, address, _ := strings.Cut(r, "<")
			address, _, _ = strings.Cut(address, ">")
			have[subject+" "+address]++
		}
	}
	err := o.m.store().List(context.Background(), func(meta quarantine.Meta, err error) bool {
		text, rerr := os.ReadFile(meta.Dir + "/message")
		if err != nil || rerr != nil {
			t.Error(err, rerr)
		}
		for _, r := range meta.Envelope.Recipients {
			have[subjectOf(string(text))+" "+r.Address]++
		}
		return true
	})
	if err != nil {
		t.Error(err)
	}
	for subject, id := range o.sent {
		for _, r := range officeRcpts {
			n := have[subject+" "+r]
			switch {
			case n > 1:
				t.Errorf("%s (%s) is doubled for %s: %d", subject, id, r, n)
			case n == 0 && id != "" && !o.deleted[subject]:
				t.Errorf("%s (%s) is lost for %s", subject, id, r)
			case n > 0 && o.undone[subject]:
				t.Errorf("%s (%s) was deleted, and %s has it", subject, id, r)
			}
		}
	}
}
