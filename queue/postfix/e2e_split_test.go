//go:build e2e

package postfix

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"holdfast/queue"
)

// route is a way of changing mail.
type route struct {
	name     string
	modify   Modify
	received int // lines on top
}

var routes = []route{{"rewriting", ByRewriting, 1}, {"reinjection", ByReinjection, 2}}

// demand checks a group's delivery: one, to these, with this text.
func (m *mta) demand(subject string, d []delivery, rcpts []string, text string, received int) {
	m.t.Helper()
	if len(d) != 1 {
		m.t.Errorf("%s: delivered %d times, want once to %q: %+v", subject, len(d), rcpts, d)
		return
	}
	got, n := withoutReceived(d[0].message)
	slices.Sort(d[0].rcpts)
	if got != text || n != received || !slices.Equal(d[0].rcpts, rcpts) {
		m.t.Errorf("%s: delivered to %q with %d Received lines\n%q\nwant %q, %d\n%q", subject, d[0].rcpts, n, got, rcpts, received, text)
	}
}

// to are the deliveries to a recipient.
func to(all []delivery, address string) []delivery {
	return slices.DeleteFunc(slices.Clone(all), func(d delivery) bool { return !strings.Contains(strings.Join(d.rcpts, "\n"), "<"+address+">") })
}

// requeue releases the item of a queue id, twice: the second time does nothing.
func (m *mta) requeue(q *Queue, id string) {
	m.t.Helper()
	meta, err := m.store().Find(m.t.Context(), id)
	if err != nil {
		m.t.Fatal(err)
	}
	for range 2 {
		it, err := m.store().Open(meta)
		if err != nil {
			m.t.Fatal(err)
		}
		r, err := it.Release(m.t.Context(), q, "tester", false)
		if err != nil {
			m.t.Error(err)
		}
		it.Close()
		if err := q.Kick(m.t.Context(), []string{r.NewID}); err != nil {
			m.t.Error(err)
		}
		m.settle()
	}
}

var three = []string{"<b@example.net> NOTIFY=FAILURE ORCPT=rfc822;bb@example.net", "<c@example.net>", "<d@example.net> NOTIFY=SUCCESS ORCPT=rfc822;dd@example.net"}

// How the next server is told of them.
var threeSaid = []string{
	"RCPT TO:<b@example.net> ORCPT=rfc822;bb@example.net NOTIFY=FAILURE", "RCPT TO:<c@example.net> ORCPT=rfc822;c@example.net",
	"RCPT TO:<d@example.net> ORCPT=rfc822;dd@example.net NOTIFY=SUCCESS",
}

// TestE2ESplit: one recipient gets the message changed, one as it is, one's is
// in quarantine until it is released.
func TestE2ESplit(t *testing.T) {
	for _, long := range []string{"no", "yes"} {
		m := newMTA(t, mtaOptions{main: []string{"enable_long_queue_ids = " + long}, byHeader: true})
		for _, r := range routes {
			t.Run(r.name+", long ids "+long, func(t *testing.T) {
				m.t = t
				x := sample{more: utf8Mime, body: "gr\u00fc\u00dfe\n.\n"}
				id := m.send(mail{"a@example.com", " BODY=8BITMIME RET=HDRS ENVID=e1", three, same(x, r.name)})
				q := open(t, m.config(ByRename, r.modify))
				m.commit(q, queue.Plan{Claim: claims(t, q)[r.name], Groups: []queue.Group{
					{Recipients: []int{0}, Disposition: queue.Release, Edit: headerEdit()},
					{Recipients: []int{1}, Disposition: queue.Release},
					{Recipients: []int{2}, Disposition: queue.Quarantine, Item: []byte(`{}`)},
				}})
				m.settle()
				got := m.sink.about(r.name)
				m.demand("changed", to(got, "b@example.net"), threeSaid[:1], headerText(x, r.name), r.received)
				m.demand("as it is", to(got, "c@example.net"), threeSaid[1:2], same(x, r.name), r.received)
				if len(got) != 2 {
					t.Errorf("delivered %d times before the release: %+v", len(got), got)
				}
				m.requeue(q, id)
				got = m.sink.about(r.name)
				m.demand("released", to(got, "d@example.net"), threeSaid[2:], same(x, r.name), 1)
				if left := m.queues(); len(got) != 3 || len(left) > 0 {
					t.Errorf("delivered %d times, left %v", len(got), left)
				}
				for _, d := range got {
					if d.mail != "MAIL FROM:<a@example.com> BODY=8BITMIME ENVID=e1 RET=HDRS" {
						t.Errorf("said %q", d.mail)
					}
				}
			})
		}
		m.t = t
	}
}

// TestE2EQuarantine: nothing of it is delivered before its release, and then
// all is, once. What is dropped never is.
func TestE2EQuarantine(t *testing.T) {
	m := newMTA(t, mtaOptions{})
	id := m.send(mail{"a@example.com", "", three, lettered("kept", "", "b\x00dy\n.\n")})
	m.send(mail{"a@example.com", "", three, lettered("dropped", "", "body\n")})
	q := open(t, m.config(ByRename, ByReinjection))
	all := claims(t, q)
	m.commit(
		q, queue.Plan{Claim: all["kept"], Groups: []queue.Group{{Disposition: queue.Quarantine, Item: []byte(`{}`)}}},
		queue.Plan{Claim: all["dropped"], Groups: []queue.Group{{Disposition: queue.Drop}}},
	)
	m.settle()
	if left := m.queues(); len(m.sink.got) > 0 || len(left) > 0 {
		t.Errorf("delivered: %+v, left %v", m.sink.got, left)
	}
	m.requeue(q, id)
	m.demand("kept", m.sink.about("kept"), threeSaid, lettered("kept", "", "b\x00dy\n.\n"), 1)
	if len(m.sink.got) != 1 {
		t.Errorf("delivered %d times", len(m.sink.got))
	}
}

// access has Postfix treat mail by its sender.
var access = "smtpd_sender_restrictions = check_sender_access inline:{" +
	"{redirect@example.com = REDIRECT elsewhere@example.net}, {filter@example.com = FILTER smtp:[127.0.0.1]:%}}"

// TestE2ERedirectAndFilter: mail with a redirection or a content filter keeps it
// when it is released as it is and when its file is rewritten. By re-injection it
// cannot be changed, stays on hold, and nobody gets anything.
func TestE2ERedirectAndFilter(t *testing.T) {
	filter := newSink(t)
	_, port, _ := strings.Cut(filter.address, ":")
	m := newMTA(t, mtaOptions{main: []string{strings.ReplaceAll(access, "%", port)}})
	check := func(d []delivery, name, rcpt string, text func(sample, string) string) {
		t.Helper()
		m.demand(name, d, []string{rcpt}, text(sample{body: "body\n"}, name), 1)
	}
	for _, r := range []struct {
		modify Modify
		edit   bool
	}{{ByRewriting, false}, {ByRewriting, true}, {ByReinjection, true}} {
		for _, kind := range []string{"redirect", "filter"} {
			m.send(mail{kind + "@example.com", "", []string{"<b@example.net>"}, lettered(kind, "", "body\n")})
		}
		q := open(t, m.config(ByRename, r.modify))
		text := same
		plan := func(edit bool) (plans []queue.Plan) {
			for _, c := range claims(t, q) {
				g := queue.Group{Disposition: queue.Release}
				if text = same; edit {
					g.Edit, text = headerEdit(), headerText
				}
				plans = append(plans, queue.Plan{Claim: c, Groups: []queue.Group{g}})
			}
			return plans
		}
		if r.modify == ByReinjection {
			for _, o := range q.Commit(t.Context(), plan(true)) {
				if !errors.Is(o.Err, queue.ErrUnchangeable) {
					t.Errorf("%s: %v, want that it cannot be changed", o.ID, o.Err)
				}
			}
			m.settle()
			if n := len(m.held()); n != 2 || len(m.sink.got)+len(filter.got) > 0 {
				t.Errorf("%d on hold of 2, %d delivered", n, len(m.sink.got)+len(filter.got))
			}
			r.edit = false
		}
		m.commit(q, plan(r.edit)...)
		m.settle()
		check(m.sink.about("redirect"), "redirect", "RCPT TO:<elsewhere@example.net> ORCPT=rfc822;b@example.net", text)
		check(filter.about("filter"), "filter", "RCPT TO:<b@example.net> ORCPT=rfc822;b@example.net", text)
		if len(m.sink.got) != 1 || len(filter.got) != 1 {
			t.Errorf("delivered to %d and %d", len(m.sink.got), len(filter.got))
		}
		m.sink.forget()
		filter.forget()
	}
}

func (s *sink) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = nil
}

// TestE2EMilterEdited: a milter edits queue files in place, and leaves pointers
// and stale pieces in them. What is delivered is what the milter wanted.
func TestE2EMilterEdited(t *testing.T) {
	m := newMTA(t, mtaOptions{main: []string{"smtpd_milters = inet:" + newMilter(t), "milter_default_action = tempfail"}})
	// As the milter makes them: see edit.
	text := func(name string) string {
		s := strings.Replace(lettered(name, "", newBody), "Date: Mon, 05 Jan 2026 10:00:00 +0000", "Date: a new and much longer value of this field, "+strings.Repeat("x", 60), 1)
		return strings.Replace(s, "X-Remove: this\n", "X-Milter: added\n", 1)
	}
	for _, w := range ways() {
		m.send(mail{"a@example.com", "", []string{"<b@example.net>", "<gone@example.net>", "<c@example.net>"}, lettered(w.name, "", "old\n")})
		pointers := m.run("postcat", append([]string{"-ov"}, m.spool+"/hold/"+m.held()[0])...)
		if strings.Count(pointers, "pointer_record") < 4 {
			t.Fatalf("the milter has left no pointers\n%s", pointers)
		}
		q := open(t, m.config(w.release, w.modify))
		g := queue.Group{Disposition: queue.Release}
		want := text(w.name)
		if w.edit != nil {
			g.Edit = &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "X-Added", Value: "one"}}}
			want = strings.Replace(want, "\n\n", "\nX-Added: one\n\n", 1)
		}
		m.commit(q, queue.Plan{Claim: claims(t, q)[w.name], Groups: []queue.Group{g}})
		m.settle()
		m.demand(w.name, m.sink.about(w.name), []string{
			"RCPT TO:<added@example.net> ORCPT=rfc822;added@example.net", "RCPT TO:<b@example.net> ORCPT=rfc822;b@example.net",
			"RCPT TO:<c@example.net> ORCPT=rfc822;c@example.net",
		}, want, w.received)
		if d := m.sink.about(w.name); len(d) == 1 && d[0].mail != "MAIL FROM:<other@example.com>" {
			t.Errorf("%s: said %q", w.name, d[0].mail)
		}
	}
}

// newMilter serves the milter protocol (libmilter's mfdef.h) as far as Postfix
// needs it: it sees only the end of each message.
func newMilter(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go milter(c)
		}
	}()
	return l.Addr().String()
}

func milter(c net.Conn) {
	defer c.Close()
	for {
		var head [5]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[:4]))-1); err != nil {
			return
		}
		var err error
		switch head[4] {
		case 'O': // version 6, all actions, and none of the commands before the end
			options := []byte{0, 0, 0, 6, 0, 0, 1, 0xff, 0, 0, 3, 0x7f}
			err = packet(c, 'O', string(options))
		case 'E':
			err = edit(c)
		case 'D', 'A', 'Q', 'K':
		default:
			err = packet(c, 'c', "")
		}
		if err != nil || head[4] == 'Q' {
			return
		}
	}
}

func packet(c net.Conn, kind byte, data string) error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(data)+1))
	_, err := c.Write(append(append(b, kind), data...))
	return err
}

// edit is what the milter does to each message.
func edit(c net.Conn) error {
	one := "\x00\x00\x00\x01"
	return errors.Join(
		packet(c, 'm', one+"Date\x00a new and much longer value of this field, "+strings.Repeat("x", 60)+"\x00"),
		packet(c, 'm', one+"X-Remove\x00\x00"),
		packet(c, 'h', "X-Milter\x00added\x00"),
		packet(c, 'b', wireBody(newBody)),
		packet(c, '-', "<gone@example.net>\x00"),
		packet(c, '+', "<added@example.net>\x00"),
		packet(c, 'e', "<other@example.com>\x00"),
		packet(c, 'c', ""),
	)
}

func wireBody(text string) string { return strings.ReplaceAll(text, "\n", "\r\n") }
