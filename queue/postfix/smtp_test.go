package postfix

import (
	"bufio"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"holdfast/queue"
)

func TestAddressesAsSMTPWantsThem(t *testing.T) {
	for address, want := range map[string]string{
		"":                      "",
		"b@example.net":         "b@example.net",
		"o'brien+x@example.net": "o'brien+x@example.net",
		"a b@example.net":       `"a b"@example.net`,
		`a"b\c@example.net`:     `"a\"b\\c"@example.net`,
		"a@b@example.net":       `"a@b"@example.net`,
		".a@example.net":        `".a"@example.net`,
		"a..b@example.net":      `"a..b"@example.net`,
		"postmaster":            "postmaster",
		"жук@example.net":       "жук@example.net",
		"a>b@example.net":       `"a>b"@example.net`,
		"@example.net":          "@example.net",
	} {
		if got := mailbox(address); got != want {
			t.Errorf("%q: %q, want %q", address, got, want)
		}
	}
}

func TestXtext(t *testing.T) {
	for s, want := range map[string]string{"QQ+314159=": "QQ+2B314159+3D", "a b\x7f": "a+20b+7F", "plain": "plain", "ж": "ж"} {
		if got := xtext(s); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

// listener answers each command by its first word, and records what it got.
func listener(t *testing.T, answers map[string]string) (address string, got func() []string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	lines := make(chan []string, 1)
	go func() {
		var all []string
		defer func() { lines <- all }()
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if _, err := c.Write([]byte("220 hello\r\n")); err != nil {
			return
		}
		in, data := bufio.NewScanner(c), false
		for in.Scan() {
			line := in.Text()
			all = append(all, line)
			word, _, _ := strings.Cut(line, " ")
			switch {
			case data && line == ".":
				data, word = false, "."
			case data:
				continue
			}
			answer, ok := answers[word]
			if !ok {
				answer = map[string]string{
					"EHLO": "250-mx\r\n250-XFORWARD NAME ADDR\r\n250-DSN\r\n250-8BITMIME\r\n250-ENHANCEDSTATUSCODES\r\n250 SMTPUTF8",
					"DATA": "354 go on", ".": "250 2.0.0 Ok: queued as 0C77D9EA073",
				}[word]
				if answer == "" {
					answer = "250 ok"
				}
			}
			data = strings.HasPrefix(answer, "354")
			if _, err := c.Write([]byte(answer + "\r\n")); err != nil {
				return
			}
		}
	}()
	return l.Addr().String(), func() []string { return <-lines }
}

func someLetter() letter {
	return letter{
		helo: "hf-x", forward: map[string]string{"NAME": "", "ADDR": "192.0.2.1", "PORT": "1"},
		env:   queue.Envelope{Sender: "a@example.com", Ret: "HDRS", EnvID: "x y", SMTPUTF8: true},
		rcpts: []queue.Recipient{{Address: "b@example.net", Notify: "NEVER", ORcpt: "rfc822;b+c@example.net"}, {Address: "d@example.net"}},
		eight: true, text: strings.NewReader("Subject: x\n\n.dot\nlast"),
	}
}

func TestALetterIsSentWithItsWholeEnvelope(t *testing.T) {
	address, got := listener(t, nil)
	s, err := dial(t.Context(), address, time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.send(someLetter())
	if err != nil || id != "0C77D9EA073" {
		t.Errorf("%q, %v", id, err)
	}
	s.close()
	want := []string{
		"EHLO hf-x", "XFORWARD NAME=[UNAVAILABLE] ADDR=192.0.2.1",
		"MAIL FROM:<a@example.com> BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=x+20y",
		"RCPT TO:<b@example.net> NOTIFY=NEVER ORCPT=rfc822;b+2Bc@example.net", "RCPT TO:<d@example.net>",
		"DATA", "Subject: x", "", "..dot", "last", ".",
	}
	if g := got(); strings.Join(g, "\n") != strings.Join(want, "\n") {
		t.Errorf("%q", g)
	}
}

// A refusal of anything ends the transaction before the data; only one that
// is the message's own fault is final.
func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		word, answer string
		final        bool
	}{
		"a recipient, for now":        {"RCPT", "450 4.2.0 try later", false},
		"a recipient, for good":       {"RCPT", "550 5.1.1 no such user", true},
		"us, by a listener set wrong": {"RCPT", "554 5.7.1 Relay access denied", false},
		"the sender":                  {"MAIL", "501 5.1.7 bad sender", true},
		"the size":                    {".", "552 5.3.4 too big", true},
		"no extensions":               {"EHLO", "250 mx", false},
		"no queue id":                 {".", "250 ok", false},
	} {
		address, got := listener(t, map[string]string{c.word: c.answer})
		s, err := dial(t.Context(), address, time.Now().Add(time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.send(someLetter())
		if err == nil || errors.Is(err, queue.ErrUnchangeable) != c.final {
			t.Errorf("%s: %v", name, err)
		}
		s.close()
		for _, line := range got() {
			if line == "DATA" && c.word != "." {
				t.Errorf("%s: the message was sent all the same", name)
			}
		}
	}
}

func TestNoLineBreakReachesTheListener(t *testing.T) {
	address, got := listener(t, nil)
	s, err := dial(t.Context(), address, time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	l := someLetter()
	l.rcpts[0].Address = "b@example.net>\r\nRCPT TO:<evil@example.org"
	if _, err := s.send(l); !errors.Is(err, queue.ErrUnchangeable) {
		t.Errorf("%v", err)
	}
	s.close()
	for _, line := range got() {
		if strings.Contains(line, "evil") {
			t.Errorf("%q", line)
		}
	}
}
