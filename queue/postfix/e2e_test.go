//go:build e2e

package postfix

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/queue"
)

// lettered is a message's text.
func lettered(subject, more, body string) string {
	return "From: a@example.com\nTo: b@example.net\nSubject: " + subject + "\nDate: Mon, 05 Jan 2026 10:00:00 +0000\nMessage-ID: <" + subject + "@example.com>\nX-Remove: this\n" + more + "\n" + body
}

// sample is a kind of mail that must come through every route.
type sample struct {
	name, from, params string
	rcpts              []string
	more, body         string
	said               []string // what the next server must have been told
}

func users(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("<user%d@example.net>", i))
	}
	return out
}

const utf8Mime = "MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n"

func samples() []sample {
	bob := []string{"<b@example.net>"}
	const a = "a@example.com"
	return []sample{
		{name: "plain", from: a, rcpts: bob, body: "hello\n"},
		{name: "dots", from: a, rcpts: bob, body: ".\n..\n.x\nhello\n.\n"},
		{name: "emptybody", from: a, rcpts: bob},
		{name: "eightbit", from: a, params: " BODY=8BITMIME", rcpts: bob, more: utf8Mime + "X-Raw: \xc3\x80\xff\x9f\n", body: "gr\xc3\xbc\xc3\x9fe \x80\xff\n", said: []string{" BODY=8BITMIME"}},
		{
			name: "dsn", from: a, params: " RET=HDRS ENVID=QQ+2B314159+3D", body: "hello\n",
			rcpts: []string{"<b@example.net> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Bob+20B@example.net", "<c@example.net> NOTIFY=NEVER", "<d@example.net>", "<e@example.net> NOTIFY=DELAY ORCPT=x400;other+2Bthing"},
			said: []string{
				" RET=HDRS", " ENVID=QQ+2B314159+3D", "<b@example.net> ORCPT=rfc822;Bob+20B@example.net NOTIFY=SUCCESS,FAILURE",
				"<c@example.net> ORCPT=rfc822;c@example.net NOTIFY=NEVER", "<d@example.net> ORCPT=rfc822;d@example.net\n", "<e@example.net> ORCPT=x400;other+2Bthing NOTIFY=DELAY",
			},
		},
		{name: "dsnfull", from: a, params: " RET=FULL", rcpts: bob, body: "hello\n", said: []string{" RET=FULL"}},
		{
			name: "smtputf8", from: "\u0430\u043d\u043d\u0430@example.com", params: " SMTPUTF8 BODY=8BITMIME", rcpts: []string{"<\u0436\u0443\u043a@example.net>", "<b@example.net>"},
			more: utf8Mime + "X-Name: \u0436\u0443\u043a\n", body: "\u0436\u0443\u043a\n", said: []string{" SMTPUTF8", "<\u0430\u043d\u043d\u0430@example.com>", "<\u0436\u0443\u043a@example.net>"},
		},
		{name: "many", from: a, rcpts: users(200), body: "hello\n"},
		{name: "more", from: a, rcpts: users(1500), body: "hello\n"},
		{name: "nullsender", rcpts: bob, body: "hello\n", said: []string{"MAIL FROM:<>"}},
		{
			name: "quoted", from: `"an na"@example.com`, rcpts: []string{`<"a b"@example.net>`, `<"a\"b\\c"@example.net>`, `<"a@b"@example.net>`, `<"a..b"@example.net>`}, body: "hello\n",
			said: []string{`MAIL FROM:<"an na"@example.com>`, `<"a b"@example.net>`, `<"a\"b\\c"@example.net>`, `<"a@b"@example.net>`},
		},
		{name: "longlines", from: a, rcpts: bob, body: strings.Repeat("x", 999) + "\n" + strings.Repeat("y", 2047) + "\n" + strings.Repeat("z", 2048) + "\n" + strings.Repeat("u", 2049) + "\n" + strings.Repeat("v", 9000) + "\n.end\n"},
		{name: "nul", from: a, rcpts: bob, body: "a\x00b\n\x00\n"},
		{name: "large", from: a, rcpts: bob, body: strings.Repeat("0123456789 abcdefghijklmnopqrstuvwxyz\n", 8000)},
	}
}

// way is how a message is handed back, and what becomes of its text. The new
// text is written here by hand, so that nothing of ours judges itself.
type way struct {
	name     string
	release  Release
	modify   Modify
	edit     func() *queue.Edit
	text     func(x sample, subject string) string
	received int // lines on top
}

func same(x sample, subject string) string { return lettered(subject, x.more, x.body) }

func headerEdit() *queue.Edit {
	return &queue.Edit{Header: []queue.HeaderEdit{
		{Op: queue.HeaderAdd, Name: "X-Added", Value: "one\ntwo"},
		{Op: queue.HeaderRemove, Name: "x-remove"},
		{Op: queue.HeaderReplace, Name: "Date", Value: "Tue, 06 Jan 2026 10:00:00 +0000"},
		{Op: queue.HeaderPrepend, Name: "X-Top", Value: "top"},
	}}
}

// headerText is a message after headerEdit. Prepended fields are above Received.
func headerText(x sample, subject string) string {
	text := strings.Replace(same(x, subject), "X-Remove: this\n", "", 1)
	text = strings.Replace(text, "Mon, 05 Jan", "Tue, 06 Jan", 1)
	return "X-Top: top\n" + strings.Replace(text, "\n\n", "\nX-Added: one\n\ttwo\n\n", 1)
}

const newBody = "new body\n.\n..end\n"

func bodyEdit() *queue.Edit { return &queue.Edit{Body: strings.NewReader(newBody)} }

func bodyText(x sample, subject string) string { return lettered(subject, x.more, newBody) }

func ways() []way {
	return []way{
		{"rename", ByRename, ByReinjection, nil, same, 1},
		{"postsuper", ByPostsuper, ByReinjection, nil, same, 1},
		{"header-by-rewriting", ByRename, ByRewriting, headerEdit, headerText, 1},
		{"header-by-reinjection", ByRename, ByReinjection, headerEdit, headerText, 2},
		{"body-by-rewriting", ByRename, ByRewriting, bodyEdit, bodyText, 1},
		{"body-by-reinjection", ByRename, ByReinjection, bodyEdit, bodyText, 2},
		{"body-by-reinjection-and-postsuper", ByPostsuper, ByReinjection, bodyEdit, bodyText, 2},
	}
}

// withoutReceived takes the Received fields out that stand at the top, behind
// what was put above them, and counts them.
func withoutReceived(text string) (rest string, n int) {
	var b strings.Builder
	trace := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "From: "):
			_, rest, _ := strings.Cut("\n"+text, "\nFrom: ")
			return b.String() + "From: " + rest, n
		case strings.HasPrefix(line, "Received: "):
			trace = true
			n++
		case trace && line[0] == '\t':
		default:
			trace = false
			b.WriteString(line)
		}
	}
	return text, n
}

// said is what the next server was told about a message, over all transactions.
func said(got []delivery) (mails, rcpts []string) {
	for _, d := range got {
		mails = append(mails, d.mail)
		rcpts = append(rcpts, d.rcpts...)
	}
	slices.Sort(mails)
	slices.Sort(rcpts)
	return slices.Compact(mails), rcpts
}

// TestE2ERoutes: every kind of mail on every route, as received by the real
// Postfix and as the next server sees it: exactly once for each recipient, byte
// for byte or changed as planned, with the same parameters as without Holdfast.
func TestE2ERoutes(t *testing.T) {
	for _, long := range []string{"no", "yes"} {
		t.Run("long ids "+long, func(t *testing.T) {
			m := newMTA(t, mtaOptions{main: []string{"enable_long_queue_ids = " + long}})
			m.sendAll("without")
			m.run("postsuper", "-H", "ALL")
			m.run("postqueue", "-f")
			m.settle()
			for _, w := range ways() {
				m.sendAll(w.name)
				q := open(t, m.config(w.release, w.modify))
				var plans []queue.Plan
				for _, c := range claims(t, q) {
					g := queue.Group{Disposition: queue.Release}
					if w.edit != nil {
						g.Edit = w.edit()
					}
					plans = append(plans, queue.Plan{Claim: c, Groups: []queue.Group{g}})
				}
				m.commit(q, plans...)
				m.settle()
				for _, x := range samples() {
					m.checkSample(x, w)
				}
				if left := m.queues(); len(left) > 0 {
					t.Errorf("%s: left %v", w.name, left)
				}
			}
		})
	}
}

func (m *mta) sendAll(suffix string) {
	m.t.Helper()
	for _, x := range samples() {
		m.send(mail{x.from, x.params, x.rcpts, same(x, x.name+"-"+suffix)})
	}
	if n := len(m.held()); n != len(samples()) {
		m.t.Fatalf("%d messages on hold of %d", n, len(samples()))
	}
}

func (m *mta) checkSample(x sample, w way) {
	m.t.Helper()
	subject := x.name + "-" + w.name
	got := m.sink.about(subject)
	for _, d := range got {
		text, n := withoutReceived(d.message)
		if want := w.text(x, subject); text != want || n != w.received {
			m.t.Errorf("%s: %d Received lines, want %d; delivered\n%.2000q\nwant\n%.2000q", subject, n, w.received, text, want)
		}
	}
	mails, rcpts := said(got)
	wantMails, wantRcpts := said(m.sink.about(x.name + "-without"))
	if !slices.Equal(mails, wantMails) || !slices.Equal(rcpts, wantRcpts) || len(rcpts) != len(x.rcpts) {
		m.t.Errorf("%s: %d recipients of %d; said\n%.1500q\n%.1500q\nwithout Holdfast\n%.1500q\n%.1500q", subject, len(rcpts), len(x.rcpts), mails, rcpts, wantMails, wantRcpts)
	}
	all := strings.Join(append(mails, rcpts...), "\n")
	for _, s := range x.said {
		if !strings.Contains(all, s) {
			m.t.Errorf("%s: %q is not in\n%s", subject, s, all)
		}
	}
}
