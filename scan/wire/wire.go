// Package wire is the protocol between the supervisor and a worker: frames
// on a SOCK_SEQPACKET pair, one frame a packet.
//
//	frame = kind (1) sequence (4, big endian) token (16) payload (to the end)
//
// The supervisor sends config, then a message with its descriptor, waits for
// done, sends the next, and at the end an end frame. The worker sends hello,
// for each message stamps, parts, findings and done, and bye. A worker can
// lie about the message it holds; the token, drawn anew for each message, and
// the sequence keep it from speaking of any other.
package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"holdfast/scan"
)

// MaxFrame bounds a frame, in bytes.
const MaxFrame = 64 << 10

const headerLen = 1 + 4 + 16

// Kind is the first byte of a frame.
type Kind byte

// The frames. Capital: from the supervisor.
const (
	Config  Kind = 'C' // Settings
	Message Kind = 'M' // Start; the descriptor comes with it
	End     Kind = 'E' // nothing

	Hello   Kind = 'h' // Greeting
	Stamp   Kind = 's' // At
	Part    Kind = 'p' // scan.Part
	Finding Kind = 'f' // scan.Finding
	Done    Kind = 'd' // Summary
	Bye     Kind = 'b' // nothing
)

// Token ties a frame to a message.
type Token [16]byte

// Frame is one packet.
type Frame struct {
	Kind    Kind
	Seq     uint32
	Token   Token
	Payload []byte
}

// Settings are the limits of a worker.
type Settings struct {
	BestEffort bool  `json:"best_effort"`
	Memory     int64 `json:"memory"`
	CPUSeconds int64 `json:"cpu_seconds"`
	FileSize   int64 `json:"file_size"`
	Parts      int   `json:"parts"`
	Depth      int   `json:"depth"`
	Header     int64 `json:"header"`
	Decoded    int64 `json:"decoded"`
}

// Start announces a message.
type Start struct {
	Size int64 `json:"size"`
}

// Greeting is a worker's first word: what it could not be kept from.
type Greeting struct {
	Version string   `json:"version"`
	Lacks   []string `json:"lacks"`
}

// At says what is about to be touched.
type At struct {
	Stage string `json:"stage"`
	Part  string `json:"part"`
}

// Summary ends a message. The counts must be those of the frames sent.
type Summary struct {
	Parts      int      `json:"parts"`
	Findings   int      `json:"findings"`
	MessageID  string   `json:"message_id"`
	Subject    string   `json:"subject"`
	Incomplete []string `json:"incomplete"`
}

// ErrProtocol says that a peer broke the protocol.
var ErrProtocol = errors.New("protocol error")

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}

// Encode makes the packet of a frame.
func (f Frame) Encode() ([]byte, error) {
	if headerLen+len(f.Payload) > MaxFrame {
		return nil, broken("a frame of %d bytes", headerLen+len(f.Payload))
	}
	b := make([]byte, headerLen, headerLen+len(f.Payload))
	b[0] = byte(f.Kind)
	binary.BigEndian.PutUint32(b[1:5], f.Seq)
	copy(b[5:], f.Token[:])
	return append(b, f.Payload...), nil
}

// Decode reads a packet.
func Decode(b []byte) (Frame, error) {
	if len(b) < headerLen || len(b) > MaxFrame {
		return Frame{}, broken("a packet of %d bytes", len(b))
	}
	f := Frame{Kind: Kind(b[0]), Seq: binary.BigEndian.Uint32(b[1:5]), Payload: b[headerLen:]}
	copy(f.Token[:], b[5:headerLen])
	if bytes.IndexByte([]byte("CMEhspfdb"), b[0]) < 0 {
		return f, broken("unknown kind %q", b[0])
	}
	return f, nil
}

// Bounds of what a worker may say.
const (
	maxText     = 2000 // bytes of one text
	MaxFindings = 10_000
	maxList     = 50
)

// unpack decodes a payload strictly: no unknown field, nothing behind it.
func unpack(f Frame, into any) error {
	d := json.NewDecoder(bytes.NewReader(f.Payload))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return broken("payload of %q: %v", f.Kind, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return broken("data behind the payload of %q", f.Kind)
	}
	return nil
}

func checkTexts(texts ...string) error {
	for _, s := range texts {
		if len(s) > maxText || !utf8.ValidString(s) {
			return broken("a text of %d bytes, or not UTF-8", len(s))
		}
	}
	return nil
}

// Clip makes a text fit to be said: valid UTF-8, bounded.
func Clip(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "")
	}
	return s
}

// Event is what a worker's frame means.
type Event struct {
	Hello  *Greeting
	Stamp  *At
	Report *scan.Report // a message is done
	Bye    bool
}

// Conversation checks a worker's frames against what it was asked: pure, so
// that it can be fuzzed without a socket.
type Conversation struct {
	MaxParts int

	seq      uint32
	greeted  bool
	ended    bool // End was sent
	gone     bool // Bye was accepted
	holds    bool // the worker holds a message
	token    Token
	report   scan.Report
	stamps   int
	Violated bool
}

// Given notes that the worker was given a message.
func (c *Conversation) Given(t Token) {
	c.holds, c.token, c.report, c.stamps = true, t, scan.Report{}, 0
}

// Ended notes that the worker was told that no message follows.
func (c *Conversation) Ended() { c.ended = true }

// Ready says that the worker may be given a message.
func (c *Conversation) Ready() bool { return c.greeted && !c.holds && !c.ended }

// Accept takes the next frame. After an error it accepts nothing more.
func (c *Conversation) Accept(f Frame) (Event, error) {
	ev, err := c.accept(f)
	if err != nil || c.Violated {
		c.Violated = true
		if err == nil {
			err = broken("a frame after an error")
		}
		return Event{}, err
	}
	c.seq++
	return ev, nil
}

func (c *Conversation) accept(f Frame) (Event, error) {
	switch {
	case f.Seq != c.seq:
		return Event{}, broken("sequence %d, expected %d", f.Seq, c.seq)
	case c.gone:
		return Event{}, broken("%q after bye", f.Kind)
	case f.Kind == Hello:
		return c.hello(f)
	case !c.greeted:
		return Event{}, broken("%q before hello", f.Kind)
	case f.Kind == Bye:
		if c.holds || !c.ended || len(f.Payload) > 0 || f.Token != (Token{}) {
			return Event{}, broken("bye out of turn")
		}
		c.gone = true
		return Event{Bye: true}, nil
	case !c.holds:
		return Event{}, broken("%q about no message", f.Kind)
	case f.Token != c.token:
		return Event{}, broken("%q about another message", f.Kind)
	}
	return c.about(f)
}

func (c *Conversation) hello(f Frame) (Event, error) {
	if c.greeted || f.Token != (Token{}) {
		return Event{}, broken("hello out of turn")
	}
	var g Greeting
	if err := unpack(f, &g); err != nil {
		return Event{}, err
	}
	if len(g.Lacks) > maxList {
		return Event{}, broken("hello too long")
	}
	if err := checkTexts(append(g.Lacks, g.Version)...); err != nil {
		return Event{}, err
	}
	c.greeted = true
	return Event{Hello: &g}, nil
}

// about takes a frame about the message that the worker holds.
func (c *Conversation) about(f Frame) (Event, error) {
	switch f.Kind {
	case Stamp:
		var at At
		if err := unpack(f, &at); err != nil {
			return Event{}, err
		}
		if c.stamps++; c.stamps > 10*(c.MaxParts+10) {
			return Event{}, broken("%d stamps", c.stamps)
		}
		return Event{Stamp: &at}, checkTexts(at.Stage, at.Part)
	case Part:
		var p scan.Part
		if err := unpack(f, &p); err != nil {
			return Event{}, err
		}
		if len(c.report.Parts) >= c.MaxParts || p.Size < 0 {
			return Event{}, broken("%d parts", len(c.report.Parts)+1)
		}
		c.report.Parts = append(c.report.Parts, p)
		return Event{}, checkTexts(p.Path, p.Type, p.Name, p.Encoding)
	case Finding:
		var x scan.Finding
		if err := unpack(f, &x); err != nil {
			return Event{}, err
		}
		if len(c.report.Findings) >= MaxFindings {
			return Event{}, broken("more than %d findings", MaxFindings)
		}
		c.report.Findings = append(c.report.Findings, x)
		return Event{}, checkTexts(x.Rule, x.Part, x.Detail)
	case Done:
		return c.done(f)
	}
	return Event{}, broken("%q is not for a worker to say", f.Kind)
}

func (c *Conversation) done(f Frame) (Event, error) {
	var s Summary
	if err := unpack(f, &s); err != nil {
		return Event{}, err
	}
	if s.Parts != len(c.report.Parts) || s.Findings != len(c.report.Findings) || len(s.Incomplete) > maxList {
		return Event{}, broken("done counts %d parts and %d findings, %d and %d were sent", s.Parts, s.Findings, len(c.report.Parts), len(c.report.Findings))
	}
	if err := checkTexts(append(s.Incomplete, s.MessageID, s.Subject)...); err != nil {
		return Event{}, err
	}
	r := c.report
	r.MessageID, r.Subject, r.Incomplete = s.MessageID, s.Subject, s.Incomplete
	c.holds = false
	return Event{Report: &r}, nil
}
