package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/scan"
	"holdfast/scan/wire"
)

// liar is the worker's end of a connection in the hands of a test.
type liar struct {
	fd    int
	seq   uint32
	token wire.Token // of the message it was given last
}

func (l *liar) say(k wire.Kind, t wire.Token, payload string) {
	l.frame(wire.Frame{Kind: k, Seq: l.seq, Token: t, Payload: []byte(payload)})
	l.seq++
}

func (l *liar) frame(f wire.Frame) {
	b, err := f.Encode()
	if err != nil {
		panic(err)
	}
	_, _ = unix.Write(l.fd, b) // the supervisor may have hung up: that is the point
}

// hear takes frames until one of the kind ('z' never comes: until the
// supervisor hangs up), and closes their descriptors.
func (l *liar) hear(k wire.Kind) {
	b, oob := make([]byte, wire.MaxFrame), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(l.fd, b, oob, 0)
		if err != nil || n == 0 {
			return
		}
		if oobn > 0 {
			msgs, _ := unix.ParseSocketControlMessage(oob[:oobn])
			for i := range msgs {
				fds, _ := unix.ParseUnixRights(&msgs[i])
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
		}
		f, err := wire.Decode(b[:n])
		if err != nil {
			panic(err)
		}
		if f.Kind == k {
			l.token = f.Token
			return
		}
	}
}

const (
	hello = `{"version":"1","lacks":[]}`
	done  = `{"parts":0,"findings":0,"message_id":"","subject":"","incomplete":null}`
)

func (l *liar) greet() { l.say(wire.Hello, wire.Token{}, hello) }

// honest does what a worker should.
func (l *liar) honest(messages int) {
	l.greet()
	for range messages {
		l.hear(wire.Message)
		l.say(wire.Stamp, l.token, `{"stage":"parse","part":""}`)
		l.say(wire.Done, l.token, done)
	}
	l.hear(wire.End)
	l.say(wire.Bye, wire.Token{}, "")
}

// meet runs the supervisor's end against a worker, over messages.
func meet(t *testing.T, timeout time.Duration, n int, s wire.Settings, worker func(*liar)) ([]int, error) {
	t.Helper()
	conn, theirs, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		defer theirs.Close()
		worker(&liar{fd: int(theirs.Fd())})
	}()
	defer func() { <-gone }()
	defer conn.Close() // before waiting for the worker: what blocks in a write gets an error
	var messages []*os.File
	for range n {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		messages = append(messages, f)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	var reports []int
	err = conn.Run(ctx, s, messages, Handler{
		Stamp:  func(int, string, string) {},
		Report: func(i int, _ scan.Report) { reports = append(reports, i) },
	})
	return reports, err
}

var settings = wire.Settings{Parts: 100}

func TestAnHonestWorkerIsBelieved(t *testing.T) {
	got, err := meet(t, time.Minute, 3, settings, func(l *liar) { l.honest(3) })
	if err != nil || fmt.Sprint(got) != "[0 1 2]" {
		t.Errorf("%v, %v", got, err)
	}
}

// TestALyingWorkerIsRefused: whatever a worker says, it is believed only of
// the message that it holds; what it finished before counts.
func TestALyingWorkerIsRefused(t *testing.T) {
	first := func(l *liar) { // one message done in good order, the second in hand
		l.greet()
		l.hear(wire.Message)
		l.say(wire.Done, l.token, done)
		l.hear(wire.Message)
	}
	for name, c := range map[string]struct {
		lie  func(l *liar)
		want error
	}{
		"garbage":                    {func(l *liar) { unix.Write(l.fd, []byte("garbage")) }, wire.ErrProtocol},
		"random bytes, long":         {func(l *liar) { unix.Write(l.fd, bytes.Repeat([]byte{0xA5}, 5000)) }, wire.ErrProtocol},
		"a packet too large":         {func(l *liar) { unix.Write(l.fd, make([]byte, wire.MaxFrame+1)) }, wire.ErrProtocol},
		"an empty packet":            {func(l *liar) { unix.Write(l.fd, nil) }, ErrEnded},
		"no such kind":               {func(l *liar) { l.say('z', l.token, "") }, wire.ErrProtocol},
		"the supervisor's own words": {func(l *liar) { l.say(wire.End, l.token, "") }, wire.ErrProtocol},
		"a wrong token":              {func(l *liar) { l.say(wire.Done, wire.Token{1}, done) }, wire.ErrProtocol},
		"no token":                   {func(l *liar) { l.say(wire.Done, wire.Token{}, done) }, wire.ErrProtocol},
		"a sequence repeated": {func(l *liar) {
			l.frame(wire.Frame{Kind: wire.Done, Seq: l.seq - 1, Token: l.token, Payload: []byte(done)})
		}, wire.ErrProtocol},
		"a sequence skipped": {func(l *liar) {
			l.frame(wire.Frame{Kind: wire.Done, Seq: l.seq + 1, Token: l.token, Payload: []byte(done)})
		}, wire.ErrProtocol},
		"hello again":          {func(l *liar) { l.greet() }, wire.ErrProtocol},
		"bye with work to do":  {func(l *liar) { l.say(wire.Bye, wire.Token{}, "") }, wire.ErrProtocol},
		"bye of a message":     {func(l *liar) { l.say(wire.Bye, l.token, "") }, wire.ErrProtocol},
		"counts that are not":  {func(l *liar) { l.say(wire.Done, l.token, strings.Replace(done, `"findings":0`, `"findings":1`, 1)) }, wire.ErrProtocol},
		"fields of the future": {func(l *liar) { l.say(wire.Done, l.token, strings.Replace(done, `{`, `{"deliver":true,`, 1)) }, wire.ErrProtocol},
		"two values":           {func(l *liar) { l.say(wire.Done, l.token, done+done) }, wire.ErrProtocol},
		"not JSON":             {func(l *liar) { l.say(wire.Done, l.token, "done") }, wire.ErrProtocol},
		"a part of less than nothing": {func(l *liar) {
			l.say(wire.Part, l.token, `{"path":"1","type":"text/plain","size":-1}`)
		}, wire.ErrProtocol},
		"a novel for a name": {func(l *liar) {
			l.say(wire.Part, l.token, `{"path":"1","type":"text/plain","name":"`+strings.Repeat("x", 50_000)+`"}`)
		}, wire.ErrProtocol},
		"too many parts": {func(l *liar) {
			for range 101 {
				l.say(wire.Part, l.token, `{"path":"1","type":"text/plain"}`)
			}
		}, wire.ErrProtocol},
		"too many findings": {func(l *liar) {
			for range wire.MaxFindings + 1 {
				l.say(wire.Finding, l.token, `{"rule":"x"}`)
			}
		}, wire.ErrProtocol},
		"a flood of stamps": {func(l *liar) {
			for range 2000 {
				l.say(wire.Stamp, l.token, `{"stage":"parse","part":""}`)
			}
		}, wire.ErrProtocol},
		"done, and done again": {func(l *liar) {
			l.say(wire.Done, l.token, done)
			l.say(wire.Done, l.token, done)
			l.hear('z')
		}, wire.ErrProtocol},
		"an early end": {func(*liar) {}, ErrEnded},
		"silence":      {func(l *liar) { l.hear('z') }, context.DeadlineExceeded},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			timeout := time.Minute
			if name == "silence" {
				timeout = 50 * time.Millisecond
			}
			got, err := meet(t, timeout, 3, settings, func(l *liar) { first(l); c.lie(l) })
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			want := "[0]"
			if name == "done, and done again" {
				want = "[0 1]"
			}
			if fmt.Sprint(got) != want {
				t.Errorf("reports of %v, want %s", got, want)
			}
		})
	}
}

// TestNothingBeforeHello: no message is given to a worker that has not said
// that it is shut in.
func TestNothingBeforeHello(t *testing.T) {
	lacking, err := json.Marshal(wire.Greeting{Version: "1", Lacks: []string{"sockets"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		word string
		best bool
		want error
	}{
		"not shut in":              {string(lacking), false, ErrSandbox},
		"not shut in, best-effort": {string(lacking), true, nil},
		"a novel":                  {`{"version":"` + strings.Repeat("x", 5000) + `","lacks":[]}`, true, wire.ErrProtocol},
	} {
		s := settings
		s.BestEffort = c.best
		got, err := meet(t, time.Minute, 1, s, func(l *liar) {
			l.say(wire.Hello, wire.Token{}, c.word)
			l.hear(wire.Message)
			l.say(wire.Done, l.token, done)
			l.hear(wire.End)
			l.say(wire.Bye, wire.Token{}, "")
		})
		if !errors.Is(err, c.want) || (len(got) == 1) != (c.want == nil) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	got, err := meet(t, time.Minute, 1, settings, func(l *liar) {
		l.say(wire.Done, wire.Token{}, done)
		l.hear('z')
	})
	if !errors.Is(err, wire.ErrProtocol) || len(got) > 0 {
		t.Errorf("done before hello: %v, %v", got, err)
	}
}
