package worker

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/scan"
	"holdfast/scan/wire"
)

// Errors of a worker's run, besides wire.ErrProtocol.
var (
	ErrEnded   = errors.New("the worker ended before its bye")
	ErrSandbox = errors.New("the worker could not be shut in")
)

// Conn is the supervisor's end.
type Conn struct {
	c   *net.UnixConn
	seq uint32
}

// Pair makes the two ends of a connection. The caller passes the worker's
// end as descriptor ConnFD and closes it.
func Pair() (*Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a worker's connection: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "worker")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		unix.Close(fds[1])
		return nil, nil, fmt.Errorf("make a worker's connection: %w", err)
	}
	return &Conn{c: c.(*net.UnixConn)}, os.NewFile(uintptr(fds[1]), "supervisor"), nil
}

// Close closes our end.
func (c *Conn) Close() error { return c.c.Close() }

// Handler is told what a worker says. Indexes are those of the messages.
type Handler struct {
	Hello  func(wire.Greeting)
	Stamp  func(i int, stage, part string)
	Report func(i int, r scan.Report)
}

// Run has the worker look at messages, one at a time, and returns nil after
// its bye. The descriptors must not be writable by anybody: a memfd sealed
// with WRITE, GROW, SHRINK and SEAL, or an unnamed file opened for reading.
func (c *Conn) Run(ctx context.Context, s wire.Settings, messages []*os.File, h Handler) error {
	stop := context.AfterFunc(ctx, func() { c.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := c.say(wire.Config, wire.Token{}, s, nil); err != nil {
		return c.fail(ctx, err)
	}
	talk := &wire.Conversation{MaxParts: s.Parts}
	next := 0
	buf := make([]byte, wire.MaxFrame+1)
	for {
		n, _, flags, _, err := c.c.ReadMsgUnix(buf, nil)
		switch {
		case err != nil || n == 0:
			return c.fail(ctx, err)
		case flags&unix.MSG_TRUNC != 0:
			return fmt.Errorf("%w: a packet over %d bytes", wire.ErrProtocol, wire.MaxFrame)
		}
		f, err := wire.Decode(buf[:n])
		if err != nil {
			return err
		}
		ev, err := talk.Accept(f)
		if err != nil {
			return err
		}
		switch {
		case ev.Hello != nil:
			if h.Hello != nil {
				h.Hello(*ev.Hello)
			}
			if len(ev.Hello.Lacks) > 0 && !s.BestEffort {
				return fmt.Errorf("%w: %v", ErrSandbox, ev.Hello.Lacks)
			}
		case ev.Stamp != nil:
			h.Stamp(next-1, ev.Stamp.Stage, ev.Stamp.Part)
		case ev.Report != nil:
			h.Report(next-1, *ev.Report)
		case ev.Bye:
			return nil
		}
		if talk.Ready() {
			if err := c.give(talk, s, messages, &next); err != nil {
				return c.fail(ctx, err)
			}
		}
	}
}

// give sends the next message, or the end.
func (c *Conn) give(talk *wire.Conversation, _ wire.Settings, messages []*os.File, next *int) error {
	if *next == len(messages) {
		talk.Ended()
		return c.send(wire.Frame{Kind: wire.End}, nil)
	}
	f := messages[*next]
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("size of message %d: %w", *next, err)
	}
	var t wire.Token
	if _, err := rand.Read(t[:]); err != nil {
		return fmt.Errorf("draw a token: %w", err)
	}
	talk.Given(t)
	*next++
	return c.say(wire.Message, t, wire.Start{Size: st.Size()}, unix.UnixRights(int(f.Fd())))
}

func (c *Conn) say(k wire.Kind, t wire.Token, v any, oob []byte) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %q: %w", k, err)
	}
	return c.send(wire.Frame{Kind: k, Token: t, Payload: b}, oob)
}

func (c *Conn) send(f wire.Frame, oob []byte) error {
	f.Seq = c.seq
	c.seq++
	b, err := f.Encode()
	if err != nil {
		return err
	}
	_, _, err = c.c.WriteMsgUnix(b, oob, nil)
	return err
}

// fail says why a run ended: our deadline, or the worker's end.
func (c *Conn) fail(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("worker stopped: %w", context.Cause(ctx))
	}
	if err == nil {
		return ErrEnded
	}
	return fmt.Errorf("%w: %w", ErrEnded, err)
}
