//go:build torture

package postfix

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/queue/durable"
)

// holder is Postfix's listener for changed mail, as far as it matters: what it
// accepts is complete on hold before it says so. That is one operation, which
// the fault harness can prevent; late makes it happen after the client is dead.
type holder struct {
	t       testing.TB
	spool   *spool
	hook    durable.Hook // may be nil
	address string
	disk    durable.FS
	late    bool
	pending []func() // what a dead client had sent
}

const acceptOp durable.Kind = "accept"

func newHolder(t testing.TB, s *spool, hook durable.Hook) *holder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	h := &holder{t: t, spool: s, hook: hook, address: l.Addr().String()}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			h.serve(c) // one after the other: the client waits for each answer
		}
	}()
	return h
}

func (h *holder) serve(c net.Conn) {
	defer c.Close()
	say := func(text string) bool {
		_, err := fmt.Fprintf(c, "%s\r\n", text)
		return err == nil
	}
	if !say("220 holder") {
		return
	}
	var helo string
	var rcpts []string
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSpace(line)
		word, rest, _ := strings.Cut(line, " ")
		answer := "250 2.0.0 ok"
		switch word {
		case "EHLO":
			helo, rcpts = rest, nil
			answer = "250-holder\r\n250-XFORWARD NAME ADDR\r\n250-DSN\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES"
		case "RCPT":
			_, address, _ := strings.Cut(rest, "<")
			address, _, _ = strings.Cut(address, ">")
			rcpts = append(rcpts, address)
		case "DATA":
			if !say("354 go on") {
				return
			}
			id, ok := h.take(in, helo, rcpts)
			if !ok {
				return // the line is cut: nobody knows what became of it
			}
			answer = "250 2.0.0 Ok: queued as " + id
		case "QUIT":
			say("221 bye")
			return
		}
		if !say(answer) {
			return
		}
	}
}

func (h *holder) take(in *bufio.Reader, helo string, rcpts []string) (id string, ok bool) {
	var text strings.Builder
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return "", false
		}
		if line == ".\r\n" {
			break
		}
		text.WriteString(strings.ReplaceAll(strings.TrimPrefix(line, "."), "\r\n", "\n"))
	}
	b := withHelo(queueFile(1_795_438_500, "Received: by holder\n"+text.String(), rcpts...), helo)
	if h.hook != nil {
		op := durable.Op{Kind: acceptOp, Path: strings.Join(rcpts, ",")}
		if err := h.hook.Before(op); err != nil {
			if h.late {
				h.pending = append(h.pending, func() { h.put(b) })
			}
			return "", false
		}
	}
	return h.put(b), true
}

// put makes a file on hold, durably.
func (h *holder) put(b []byte) string {
	s := h.spool
	s.n++
	dir := filepath.Dir(s.place("hold", s.n, "x"))
	for d := filepath.Join(s.dir, "hold"); d != dir; {
		rest, _ := filepath.Rel(d, dir)
		d = filepath.Join(d, strings.Split(rest, "/")[0])
		s.mkdir(d)
	}
	temp := filepath.Join(dir, "made.there")
	f, err := h.disk.Create(temp, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if err = f.Own(mailUser, mailUser, 0o700); err == nil {
		_, err = f.Write(b)
	}
	id := s.name(s.n, inodeOf(h.t, temp))
	for _, step := range []func() error{f.Fsync, func() error { return h.disk.Rename(temp, filepath.Join(dir, id)) }, func() error { return h.disk.FsyncDir(dir) }} {
		if err == nil {
			err = step()
		}
	}
	if err != nil {
		h.t.Error(err)
	}
	return id
}

// isCopy says that a file was handed back by us.
func (s *seen) isCopy() bool {
	return slices.ContainsFunc(s.env, func(r rec) bool { return r.kind == 'A' && nonceOf(strings.TrimPrefix(r.data, "helo_name=")) != "" })
}

// finish does what was late.
func (h *holder) finish() {
	for _, f := range h.pending {
		f()
	}
	h.pending = nil
}

// withHelo adds the EHLO name to a queue file, as smtpd does.
func withHelo(b []byte, helo string) []byte {
	s, err := look(b)
	if err != nil {
		panic(err)
	}
	var env, text, out bytes.Buffer
	putRec(&env, 'A', "helo_name="+helo)
	for _, r := range s.env {
		putRec(&env, r.kind, r.data)
	}
	putRec(&env, 'M', "")
	for line := range strings.Lines(s.content) {
		putRec(&text, 'N', strings.TrimSuffix(line, "\n"))
	}
	putRec(&out, 'C', fmt.Sprintf("%15d %15d %15d %15d %15d %15d", text.Len(), 97+env.Len(), s.size[2], 9, text.Len(), 0))
	out.Write(env.Bytes())
	out.Write(text.Bytes())
	putRec(&out, 'X', "")
	putRec(&out, 'E', "")
	return out.Bytes()
}
