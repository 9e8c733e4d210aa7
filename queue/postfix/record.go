package postfix

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"holdfast/queue"
)

// The record types of a queue file (reference: B2; Postfix rec_type.h).
const (
	recSize    = 'C'
	recTime    = 'T'
	recAttr    = 'A'
	recSender  = 'S'
	recFilter  = 'L' // envelope and extracted segment; in the content: recCont
	recRedir   = '>'
	recVerp    = 'V'
	recRcpt    = 'R'
	recDone    = 'D'
	recCancel  = '/'
	recOrcpt   = 'O'
	recMessage = 'M'
	recNorm    = 'N' // a line, its newline implied
	recCont    = 'L' // a piece of a line
	recPad     = 'w'
	recPtr     = 'p'
	recXtra    = 'X'
	recEnd     = 'E'
)

// What may stand where; anything else has the queue manager move the file to
// corrupt, where nobody looks (reference: B2, B4).
const (
	envelopeTypes  = "MCTcFILSDRO/WVA>K<ionwp"
	contentTypes   = "XLNwp"
	extractedTypes = "EDRO/PreAFIL>Konwp"
)

const (
	maxBackward = 10_000  // jumps, as Postfix has it
	maxLength   = 1 << 20 // bytes of one record; Postfix writes lines of 2048
	maxVarint   = 5       // bytes of a length: Postfix refuses more than 32 bits
)

// record is one record of the envelope or the extracted segment.
type record struct {
	kind byte
	data string
}

// errSurprise: the file is whole, and has something in it that we do not know.
// Postfix's own program may.
var errSurprise = errors.New("something that is not known here")

func surprise(format string, args ...any) error {
	return fmt.Errorf("%w: %w: "+format, append([]any{queue.ErrDamaged, errSurprise}, args...)...)
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{queue.ErrDamaged}, args...)...)
}

// cursor reads the records of a queue file in their logical order: it
// follows pointers, and so skips what milters left behind. The bytes that it
// visits are bounded by the file's size, since no honest file visits one
// twice.
type cursor struct {
	r        io.ReaderAt
	size     int64
	at       int64 // of the next record
	visited  int64
	backward int
	pointers int // that were met, place-holders too
	buf      []byte
	bufAt    int64
}

const readAhead = 64 << 10

// fill returns n bytes at the given offset. It allocates for what the file
// has, not for what a length claims.
func (c *cursor) fill(at int64, n int) ([]byte, error) {
	if at >= c.bufAt && at+int64(n) <= c.bufAt+int64(len(c.buf)) {
		return c.buf[at-c.bufAt:][:n], nil
	}
	if at+int64(n) > c.size {
		return nil, fmt.Errorf("%w: it ends within a record at %d", queue.ErrIncomplete, at)
	}
	want := int(min(max(int64(n), readAhead), c.size-at))
	if cap(c.buf) < want {
		c.buf = make([]byte, want)
	}
	c.buf = c.buf[:want]
	m, err := c.r.ReadAt(c.buf, at)
	c.buf, c.bufAt = c.buf[:m], at
	if m >= n {
		return c.buf[:n], nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: it ends within a record at %d", queue.ErrIncomplete, at)
	}
	return nil, fmt.Errorf("read at %d: %w", at, err)
}

// next reads one record and follows pointers. The data is valid until the
// next call. at is where the record itself lies.
func (c *cursor) next() (kind byte, data []byte, at int64, err error) {
	for {
		at = c.at
		kind, data, err = c.physical()
		if err != nil || kind != recPtr {
			return kind, data, at, err
		}
		c.pointers++
		to, perr := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		if perr != nil || to < 0 || to > c.size {
			return 0, nil, at, damaged("a pointer to %.20q at %d", data, at)
		}
		if to == 0 {
			continue // a place-holder
		}
		if to <= at {
			if c.backward++; c.backward > maxBackward {
				return 0, nil, at, damaged("more than %d pointers that lead back", maxBackward)
			}
		}
		c.at = to
	}
}

// physical reads the record at c.at and moves behind it.
func (c *cursor) physical() (byte, []byte, error) {
	if c.at >= c.size {
		return 0, nil, fmt.Errorf("%w: it has no end record", queue.ErrIncomplete)
	}
	head, err := c.fill(c.at, int(min(1+maxVarint, c.size-c.at)))
	if err != nil {
		return 0, nil, err
	}
	kind, length, n := head[0], 0, 1
	for shift := 0; ; shift += 7 {
		if n == len(head) {
			if n <= maxVarint {
				return 0, nil, fmt.Errorf("%w: it ends within a record at %d", queue.ErrIncomplete, c.at)
			}
			return 0, nil, damaged("the record at %d has no length", c.at)
		}
		b := head[n]
		n++
		length |= int(b&0x7F) << shift
		if b < 0x80 {
			break
		}
	}
	if length > maxLength {
		return 0, nil, damaged("a record of %d bytes at %d", length, c.at)
	}
	whole, err := c.fill(c.at, n+length)
	if err != nil {
		return 0, nil, err
	}
	if c.visited += int64(n + length); c.visited > c.size {
		return 0, nil, damaged("its pointers lead round in circles")
	}
	c.at += int64(n + length)
	return kind, whole[n:], nil
}

// put appends one record.
func put(b []byte, kind byte, data string) []byte {
	b = append(b, kind)
	n := len(data)
	for n >= 0x80 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	b = append(b, byte(n))
	return append(b, data...)
}
