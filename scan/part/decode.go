package part

import "io"

// decoder writes decoded bytes to what is behind it. It never stops at
// damage: what some client would still show must be seen.
type decoder interface {
	Write(b []byte)
	Close()
}

func newDecoder(encoding string, to io.Writer) decoder {
	switch encoding {
	case "base64":
		return &base64Decoder{to: to}
	case "quoted-printable":
		return &qpDecoder{to: to}
	}
	return identity{to}
}

// The writers behind are in memory and never fail.

type identity struct{ to io.Writer }

func (d identity) Write(b []byte) { _, _ = d.to.Write(b) }
func (d identity) Close()         {}

// base64Decoder skips what is not of the alphabet; padding ends a group, and
// what follows begins a new one (RFC 2045, 6.8, read generously).
type base64Decoder struct {
	to   io.Writer
	bits uint32
	n    int
}

func (d *base64Decoder) Write(b []byte) {
	out := make([]byte, 0, len(b)*3/4+3)
	for _, c := range b {
		v := digit(c)
		if v < 0 {
			if c == '=' && d.n >= 2 { // padding nowhere else: decoders pass over it
				out = d.flush(out)
			}
			continue
		}
		d.bits = d.bits<<6 | uint32(v)
		if d.n++; d.n == 4 {
			out = append(out, byte(d.bits>>16), byte(d.bits>>8), byte(d.bits))
			d.bits, d.n = 0, 0
		}
	}
	_, _ = d.to.Write(out)
}

func (d *base64Decoder) flush(out []byte) []byte {
	switch d.n {
	case 2:
		out = append(out, byte(d.bits>>4))
	case 3:
		out = append(out, byte(d.bits>>10), byte(d.bits>>2))
	}
	d.bits, d.n = 0, 0
	return out
}

func (d *base64Decoder) Close() { _, _ = d.to.Write(d.flush(nil)) }

func digit(c byte) int {
	switch {
	case c >= 'A' && c <= 'Z':
		return int(c - 'A')
	case c >= 'a' && c <= 'z':
		return int(c-'a') + 26
	case c >= '0' && c <= '9':
		return int(c-'0') + 52
	case c == '+':
		return 62
	case c == '/':
		return 63
	}
	return -1
}

// qpDecoder undoes quoted-printable (RFC 2045, 6.7); a broken escape is kept
// as it is. hold is an escape that may not be complete yet.
type qpDecoder struct {
	to   io.Writer
	hold []byte
}

func (d *qpDecoder) Write(b []byte) {
	out := make([]byte, 0, len(b)+3)
	for _, c := range b {
		if len(d.hold) == 0 {
			if c == '=' {
				d.hold = append(d.hold, c)
			} else {
				out = append(out, c)
			}
			continue
		}
		d.hold = append(d.hold, c)
		switch {
		case c == '\n' && soft(d.hold):
			d.hold = d.hold[:0]
		case len(d.hold) == 3 && hex(d.hold[1]) >= 0 && hex(d.hold[2]) >= 0:
			out = append(out, byte(hex(d.hold[1])<<4|hex(d.hold[2])))
			d.hold = d.hold[:0]
		case len(d.hold) == 2 && hex(c) >= 0, blank(c) && len(d.hold) < 80:
		case c == '=': // perhaps an escape of its own
			out = append(out, d.hold[:len(d.hold)-1]...)
			d.hold = append(d.hold[:0], c)
		default:
			out = append(out, d.hold...)
			d.hold = d.hold[:0]
		}
	}
	_, _ = d.to.Write(out)
}

// soft says that what is held is a soft line break: "=", blanks, the end.
func soft(b []byte) bool {
	for _, c := range b[1 : len(b)-1] {
		if !blank(c) {
			return false
		}
	}
	return true
}

func blank(c byte) bool { return c == ' ' || c == '\t' || c == '\r' }

func hex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	}
	return -1
}

func (d *qpDecoder) Close() { _, _ = d.to.Write(d.hold) }
