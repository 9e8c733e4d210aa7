// Package worker is both ends of a worker: Main is the process that parses
// hostile bytes, shut in before it reads the first; Conn is the supervisor's
// side, which believes nothing.
package worker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"holdfast/scan"
	"holdfast/scan/part"
	"holdfast/scan/sandbox"
	"holdfast/scan/signature"
	"holdfast/scan/wire"
)

// Descriptors that a worker inherits.
const (
	ConnFD  = 3
	CrashFD = 4
)

// Exit codes of a worker that ends by itself.
const (
	exitOK       = 0
	exitSandbox  = 70 // it could not be shut in, and refuses to work
	exitProtocol = 71
)

type worker struct {
	seq      uint32 // of our frames
	heard    uint32 // of the supervisor's
	settings wire.Settings
	token    wire.Token
	parts    int
	findings int
	raw      *signature.Matcher
	leaf     *signature.Matcher
}

// Main is the worker's main function. It returns the exit code.
func Main(version string) int {
	crash := os.NewFile(CrashFD, "crash")
	if err := debug.SetCrashOutput(crash, debug.CrashOptions{}); err != nil {
		fmt.Fprintln(os.Stderr, "crash output:", err)
	}
	w := &worker{}
	f, _, err := w.receive()
	if err != nil || f.Kind != wire.Config || json.Unmarshal(f.Payload, &w.settings) != nil {
		fmt.Fprintln(os.Stderr, "no settings:", err)
		return exitProtocol
	}
	s := w.settings
	restricted := sandbox.Restrict(sandbox.Limits{Memory: s.Memory, CPUSeconds: s.CPUSeconds, FileSize: s.FileSize})
	lacks := sandbox.SelfTest()
	if restricted != nil {
		lacks = append(lacks, restricted.Error())
	}
	if err := w.say(wire.Hello, wire.Greeting{Version: version, Lacks: clipAll(lacks)}); err != nil {
		return exitProtocol
	}
	if len(lacks) > 0 && !s.BestEffort {
		fmt.Fprintln(os.Stderr, "the sandbox does not hold:", lacks)
		return exitSandbox
	}
	if err := w.serve(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitProtocol
	}
	return exitOK
}

func clipAll(in []string) []string {
	out := make([]string, 0, len(in))
	for _, s := range in {
		out = append(out, wire.Clip(s))
	}
	return out
}

// serve takes one message after the other until the end.
func (w *worker) serve() error {
	for {
		f, fd, err := w.receive()
		if err != nil {
			return err
		}
		switch f.Kind {
		case wire.End:
			w.token = wire.Token{}
			return w.send(wire.Frame{Kind: wire.Bye})
		case wire.Message:
			w.token = f.Token
			if err := w.message(fd); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%w: %q from the supervisor", wire.ErrProtocol, f.Kind)
		}
	}
}

// message parses one message. A panic is not caught: a worker that has
// panicked may be in any state, and the stamp says where it was.
func (w *worker) message(fd int) error {
	in := os.NewFile(uintptr(fd), "message")
	defer in.Close()
	w.parts, w.findings = 0, 0
	w.raw = &signature.Matcher{}
	if err := w.stamp("parse", ""); err != nil {
		return err
	}
	body := io.NewSectionReader(in, 0, 1<<62)
	w.fault("parse", body)
	s := w.settings
	sum, err := part.Walk(io.TeeReader(body, w.raw), part.Limits{Depth: s.Depth, Parts: s.Parts, Header: s.Header, Decoded: s.Decoded}, w)
	if err != nil {
		return err
	}
	if err := w.stamp("signature", ""); err != nil {
		return err
	}
	w.fault("signature", body)
	for _, rule := range w.raw.Found() {
		w.found(scan.Finding{Rule: rule, Detail: "in the message as it is"})
	}
	return w.say(wire.Done, wire.Summary{
		Parts: w.parts, Findings: w.findings, Incomplete: sum.Incomplete,
		MessageID: wire.Clip(sum.Header.Get("Message-Id")), Subject: wire.Clip(sum.Header.Get("Subject")),
	})
}

// lost is what a worker does when the supervisor is gone: it ends.
func lost(err error) {
	if err != nil {
		os.Exit(exitProtocol)
	}
}

// Begin stamps a leaf and looks for signatures in it.
func (w *worker) Begin(p scan.Part) io.Writer {
	lost(w.stamp("part", p.Path))
	if w.parts == 0 {
		w.faultHere("part")
	}
	w.leaf = &signature.Matcher{}
	return w.leaf
}

// End reports a leaf.
func (w *worker) End(p scan.Part) {
	w.parts++
	lost(w.say(wire.Part, p))
	for _, rule := range w.leaf.Found() {
		w.found(scan.Finding{Rule: rule, Part: p.Path, Detail: wire.Clip(p.Name)})
	}
}

func (w *worker) found(f scan.Finding) {
	if w.findings < wire.MaxFindings {
		w.findings++
		lost(w.say(wire.Finding, f))
	}
}

func (w *worker) stamp(stage, at string) error {
	return w.say(wire.Stamp, wire.At{Stage: stage, Part: wire.Clip(at)})
}

func (w *worker) say(k wire.Kind, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("encode %q: %w", k, err)
	}
	return w.send(wire.Frame{Kind: k, Token: w.token, Payload: bytes.TrimRight(b.Bytes(), "\n")})
}

func (w *worker) send(f wire.Frame) error {
	f.Seq = w.seq
	w.seq++
	b, err := f.Encode()
	if err != nil {
		return err
	}
	for {
		_, err = unix.Write(ConnFD, b)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("tell the supervisor: %w", err)
	}
	return nil
}

// receive reads the next frame, and the descriptor that comes with it.
func (w *worker) receive() (wire.Frame, int, error) {
	b := make([]byte, wire.MaxFrame)
	oob := make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	var err error
	for {
		n, oobn, _, _, err = unix.Recvmsg(ConnFD, b, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil || n == 0 {
		return wire.Frame{}, -1, fmt.Errorf("the supervisor is gone: %w", errors.Join(err, io.EOF))
	}
	f, err := wire.Decode(b[:n])
	if err != nil {
		return f, -1, err
	}
	if f.Seq != w.heard {
		return f, -1, fmt.Errorf("%w: sequence %d from the supervisor", wire.ErrProtocol, f.Seq)
	}
	w.heard++
	fd := -1
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			return f, -1, fmt.Errorf("%w: control message", wire.ErrProtocol)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			return f, -1, fmt.Errorf("%w: descriptors", wire.ErrProtocol)
		}
		fd = fds[0]
	}
	if (f.Kind == wire.Message) != (fd >= 0) {
		return f, fd, fmt.Errorf("%w: a message without its descriptor", wire.ErrProtocol)
	}
	return f, fd, nil
}
