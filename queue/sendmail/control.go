package sendmail

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"time"

	"holdfast/queue"
)

// A control file is text: one code letter, a value, LF; lines that begin
// with space or TAB continue the one before; a single "." ends it
// (reference: queue-formats.md, A3). It is kept as the lines it came in, so
// that what is not understood is written back verbatim.
type control struct {
	lines []line
}

// line is one logical line with its continuations and their line ends.
type line struct {
	code byte
	raw  []byte // from the code letter to the last LF
}

// value is what stands after the code letter: inner line breaks kept, the
// last one and a CR before it dropped, as sendmail does.
func (l line) value() []byte {
	v := bytes.TrimSuffix(l.raw[1:], []byte("\n"))
	return bytes.TrimSuffix(v, []byte("\r"))
}

// Lines that sendmail 8.17 accepts; any other is an attack to it.
const knownCodes = "VTKNPdIBqMF$SZA!CQrRHEDL"

// Bounds of a control file besides its size.
const maxLines = 2_000_000

// parseControl splits a control file into lines and checks what makes it
// acceptable to a queue runner. ErrIncomplete: it does not end yet.
// ErrDamaged: a runner would refuse it, lose it, or crash on it.
func parseControl(b []byte, maxRecipients int) (*control, error) {
	c := &control{}
	for len(b) > 0 {
		if b[0] == '.' && (len(b) == 1 || b[1] == '\n' || b[1] == '\r') {
			return c, endOfControl(c, b, maxRecipients)
		}
		n, err := logicalLine(b)
		if err != nil {
			return nil, err
		}
		l := line{code: b[0], raw: b[:n]}
		if strings.IndexByte(knownCodes, l.code) < 0 {
			return nil, fmt.Errorf("%w: line %d begins with %q", queue.ErrDamaged, len(c.lines)+1, l.code)
		}
		if len(c.lines) >= maxLines {
			return nil, fmt.Errorf("%w: more than %d lines", queue.ErrDamaged, maxLines)
		}
		c.lines = append(c.lines, l)
		b = b[n:]
	}
	return nil, fmt.Errorf("%w: the final dot is missing", queue.ErrIncomplete)
}

// logicalLine is the length of the first line and its continuations.
func logicalLine(b []byte) (int, error) {
	if b[0] == ' ' || b[0] == '\t' || b[0] == '\n' || b[0] == '\r' {
		return 0, fmt.Errorf("%w: a line begins with %q and continues nothing", queue.ErrDamaged, b[0])
	}
	n := 0
	for {
		i := bytes.IndexByte(b[n:], '\n')
		if i < 0 {
			return 0, fmt.Errorf("%w: the last line has no end", queue.ErrIncomplete)
		}
		n += i + 1
		if n == len(b) || b[n] != ' ' && b[n] != '\t' {
			return n, nil
		}
	}
}

func endOfControl(c *control, rest []byte, maxRecipients int) error {
	if s := string(rest); s != ".\n" && s != ".\r\n" {
		if s == "." || s == ".\r" {
			return fmt.Errorf("%w: the final dot has no line end", queue.ErrIncomplete)
		}
		return fmt.Errorf("%w: data after the final dot", queue.ErrDamaged)
	}
	return c.acceptable(maxRecipients)
}

// acceptable checks what a runner would refuse or lose.
func (c *control) acceptable(maxRecipients int) error {
	damaged := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{queue.ErrDamaged}, args...)...)
	}
	if len(c.lines) == 0 || c.lines[0].code != 'V' {
		return damaged("the version line is not first")
	}
	v, err := strconv.Atoi(string(c.lines[0].value()))
	if err != nil || v < 1 || v > 8 {
		return damaged("version %q is not one of 1 to 8", c.lines[0].value())
	}
	sender, recipients := false, 0
	for _, l := range c.lines {
		switch l.code {
		case 'S':
			sender = true
		case 'R':
			if recipients++; recipients > maxRecipients {
				return damaged("more than %d recipients (limits.recipients)", maxRecipients)
			}
			if !sender {
				return damaged("a recipient stands before the sender")
			}
			if bytes.IndexByte(l.value(), ':') < 0 {
				return damaged("recipient without flags: %.100q", l.value())
			}
		case 'B':
			if s := string(l.value()); s != "7BIT" && s != "8BITMIME" {
				return damaged("body type %.100q", s)
			}
		case 'F':
			if bytes.HasPrefix(l.raw, []byte("From ")) {
				return damaged("a mailbox From line")
			}
		case 'q':
			return fmt.Errorf("%w: quarantined in the MTA: %.200q", queue.ErrForeign, l.value())
		}
	}
	switch {
	case !sender:
		return damaged("no sender")
	case recipients == 0:
		return damaged("no recipient")
	}
	return nil
}

// bytes is the whole file again.
func (c *control) bytes() []byte {
	var b bytes.Buffer
	for _, l := range c.lines {
		b.Write(l.raw)
	}
	b.WriteString(".\n")
	return b.Bytes()
}

// first is the value of the first line with a code, or nil.
func (c *control) first(code byte) []byte {
	for _, l := range c.lines {
		if l.code == code {
			return l.value()
		}
	}
	return nil
}

// macro is the value of a $ line; name with braces if it is a long one.
func (c *control) macro(name string) ([]byte, bool) {
	for _, l := range c.lines {
		if l.code == '$' {
			if v, ok := bytes.CutPrefix(l.value(), []byte(name)); ok {
				return v, true
			}
		}
	}
	return nil, false
}

// unquote drops the 0xFF before each quoted byte (reference: A4).
func unquote(b []byte) []byte {
	if bytes.IndexByte(b, 0xFF) < 0 {
		return b
	}
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); i++ {
		if b[i] == 0xFF && i+1 < len(b) {
			i++
		}
		out = append(out, b[i])
	}
	return out
}

// quote puts 0xFF before the bytes that mean something to sendmail.
func quote(b []byte) []byte {
	out := make([]byte, 0, len(b))
	for _, c := range b {
		if c >= 0x80 && c <= 0x9F || c == 0xFF {
			out = append(out, 0xFF)
		}
		out = append(out, c)
	}
	return out
}

func address(v []byte) string {
	v = unquote(v)
	if len(v) >= 2 && v[0] == '<' && v[len(v)-1] == '>' {
		v = v[1 : len(v)-1]
	}
	return string(v)
}

// creation is the T line: unix seconds.
func (c *control) creation() int64 {
	t, err := strconv.ParseInt(string(c.first('T')), 10, 64)
	if err != nil {
		return 0 // no time is no reason to refuse: the runner does not either
	}
	return t
}

// envelope reads the typed view.
func (c *control) envelope() queue.Envelope {
	env := queue.Envelope{
		Sender: address(c.first('S')), Arrived: time.Unix(c.creation(), 0),
		EnvID: string(c.first('Z')), Body8Bit: string(c.first('B')) == "8BITMIME",
	}
	flags := string(c.first('F'))
	if env.Sender == "MAILER-DAEMON" && strings.Contains(flags, "r") {
		env.Sender = "" // sendmail's own bounces go out with a null sender
	}
	switch {
	case strings.Contains(flags, "n"):
		env.Ret = "HDRS"
	case strings.Contains(flags, "d"):
		env.Ret = "FULL"
	}
	if n, err := strconv.Atoi(string(c.first('N'))); err == nil {
		env.Attempts = n
	}
	env.ClientName, env.ClientAddr = client(c)
	if v, ok := c.macro("s"); ok {
		env.Helo = string(v)
	}
	if v, ok := c.macro("r"); ok {
		env.Protocol = string(v)
	}
	orcpt := ""
	for _, l := range c.lines {
		switch l.code {
		case 'Q':
			orcpt = string(l.value())
		case 'R':
			env.Recipients = append(env.Recipients, recipient(l.value(), orcpt))
			orcpt = ""
		}
	}
	return env
}

// client reads $_: "host [192.0.2.1]", "user@host [IPv6:2001:db8::1] (may be forged)".
func client(c *control) (name, addr string) {
	v, _ := c.macro("_")
	name = string(v)
	open := strings.LastIndexByte(name, '[')
	if open < 0 {
		return name, ""
	}
	rest := name[open+1:]
	name = strings.TrimSpace(name[:open])
	if end := strings.IndexByte(rest, ']'); end >= 0 {
		addr = strings.TrimPrefix(rest[:end], "IPv6:")
	}
	return name, addr
}

func recipient(v []byte, orcpt string) queue.Recipient {
	flags, addr, _ := bytes.Cut(v, []byte(":"))
	r := queue.Recipient{Address: address(addr), ORcpt: orcpt}
	if bytes.IndexByte(flags, 'N') < 0 {
		return r
	}
	var notify []string
	for _, f := range []struct {
		flag byte
		word string
	}{{'S', "SUCCESS"}, {'F', "FAILURE"}, {'D', "DELAY"}} {
		if bytes.IndexByte(flags, f.flag) >= 0 {
			notify = append(notify, f.word)
		}
	}
	if r.Notify = strings.Join(notify, ","); r.Notify == "" {
		r.Notify = "NEVER"
	}
	return r
}

// condition splits an H line: its condition with the question marks, and the
// field. Continuations keep their line breaks.
func condition(l line) (cond, field []byte) {
	v := l.value()
	if len(v) > 0 && v[0] == '?' {
		if end := bytes.IndexByte(v[1:], '?'); end >= 0 {
			return v[:end+2], v[end+2:]
		}
	}
	return nil, v
}

// fieldName is the lower-case name of an H line, "" if it has none.
func fieldName(l line) string {
	_, f := condition(l)
	name, _, ok := bytes.Cut(f, []byte(":"))
	if !ok {
		return ""
	}
	return strings.ToLower(strings.TrimRight(string(name), " \t"))
}

// shown says that sendmail sends this field by SMTP: no condition, one of
// the mailer flags D, F or M, or a macro that may be set. A field without
// colon is dropped on delivery.
func shown(l line) bool {
	cond, f := condition(l)
	if bytes.IndexByte(f, ':') < 0 {
		return false
	}
	return len(cond) <= 2 || cond[1] == '$' || bytes.ContainsAny(cond, "DFM")
}

// headerBlock is the header as a reader of the message sees it: LF line
// ends, no blank line after it.
func (c *control) headerBlock() []byte {
	var b bytes.Buffer
	for _, l := range c.lines {
		if l.code == 'H' && shown(l) {
			_, f := condition(l)
			b.Write(unquote(f))
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}
