package postfix

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"holdfast/queue"
	"holdfast/queue/header"
)

const (
	lineLength = 2048    // bytes of a content record (main.cf, line_length_limit)
	maxHeader  = 8 << 20 // bytes of a header that is changed; Postfix cuts at header_size_limit, 100 kB
)

// keep says which of a file's recipients a new file has, by their position
// among those that are still to be delivered to; nil keeps all, and those
// that are done with as well.
type keep func(i int) bool

// markAttr is an attribute of ours in a file that we write: see mark.
const markAttr = "hf_plan="

// build writes a whole queue file: the records of f, pointers undone, with
// the given content. mark, unless empty, is the value of our attribute. w is positioned at the start of an empty file; the size
// record is written last, by overwrite. fresh, unless zero, is the new time of
// arrival and creation.
func (f *file) build(w io.Writer, overwrite func([]byte) error, content io.Reader, k keep, fresh time.Time, mark string) error {
	s := f.sizes
	if s.fields != fullSizes {
		return fmt.Errorf("a size record of %d fields is of a Postfix before 3.0, whose files are not written", s.fields)
	}
	sieve := &sieve{keep: k, fresh: fresh, mark: mark}
	head := put(nil, recSize, s.String())
	head = sieve.records(head, f.env)
	head = put(head, recMessage, "")
	out := &counting{w: bufio.NewWriterSize(w, readAhead)}
	if _, err := out.Write(head); err != nil {
		return err
	}
	s.data = out.n
	if err := writeRecords(out, content); err != nil {
		return err
	}
	s.content = out.n - s.data
	s.length = s.content
	tail := put(nil, recXtra, "")
	tail = sieve.records(tail, f.ext)
	tail = put(tail, recEnd, "")
	if _, err := out.Write(tail); err != nil {
		return err
	}
	if err := out.w.Flush(); err != nil {
		return err
	}
	if s.rcpts = sieve.rcpts; sieve.todo == 0 {
		return errors.New("a queue file without a recipient")
	}
	return overwrite(put(nil, recSize, s.String()))
}

// sieve passes on the records that a new file has.
type sieve struct {
	keep    keep
	fresh   time.Time
	mark    string
	pending []record // that belong to the next recipient
	todo    int      // recipients still to be delivered to, that passed
	seen    int      // and all of them
	rcpts   int64    // recipient records that passed
}

func (s *sieve) records(b []byte, in []record) []byte {
	for _, r := range in {
		switch {
		case r.kind == recRcpt, r.kind == recDone, r.kind == recCancel:
			ok := s.passes(r.kind)
			for _, p := range s.pending {
				if ok || !ofRecipient(p) {
					b = put(b, p.kind, s.renewed(p))
				}
			}
			if ok {
				b = put(b, r.kind, r.data)
				s.rcpts++
			}
			s.pending = nil
		case r.kind == recAttr && strings.HasPrefix(r.data, markAttr):
			// of an earlier time through Holdfast
		case r.kind == recSender && s.mark != "":
			b = put(put(b, recAttr, markAttr+s.mark), r.kind, r.data)
		case len(s.pending) > 0 || ofRecipient(r):
			s.pending = append(s.pending, r) // in its place, whatever it is
		default:
			b = put(b, r.kind, s.renewed(r))
		}
	}
	for _, p := range s.pending { // of no recipient: kept as they are
		b = put(b, p.kind, s.renewed(p))
	}
	s.pending = nil
	return b
}

func (s *sieve) passes(kind byte) bool {
	if kind != recRcpt {
		return s.keep == nil
	}
	ok := s.keep == nil || s.keep(s.seen)
	s.seen++
	if ok {
		s.todo++
	}
	return ok
}

// ofRecipient says that a record is about the recipient that follows.
func ofRecipient(r record) bool {
	return r.kind == recOrcpt || r.kind == recAttr && (strings.HasPrefix(r.data, "notify_flags=") || strings.HasPrefix(r.data, "dsn_orig_rcpt="))
}

func (s *sieve) renewed(r record) string {
	switch {
	case s.fresh.IsZero():
	case r.kind == recTime:
		return fmt.Sprintf("%d %d", s.fresh.Unix(), s.fresh.Nanosecond()/1000)
	case r.kind == recAttr && strings.HasPrefix(r.data, "create_time="):
		return "create_time=" + strconv.FormatInt(s.fresh.Unix(), 10)
	}
	return r.data
}

// counting counts what is written.
type counting struct {
	w *bufio.Writer
	n int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// writeRecords writes text as content records, as cleanup does: a line is N,
// a longer one begins with L pieces. A last line without its end gets one:
// the content of a queue file always ends with LF (reference: B3).
func writeRecords(w io.Writer, text io.Reader) error {
	in := bufio.NewReaderSize(text, lineLength)
	var rec []byte
	open := false // within a line
	for {
		piece, err := in.ReadSlice('\n')
		done := errors.Is(err, io.EOF)
		if err != nil && !done && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		line, whole := bytes.CutSuffix(piece, []byte("\n"))
		rec = rec[:0]
		switch {
		case whole && len(line) == lineLength: // cannot be: the buffer is full before the line end
			return errors.New("a line longer than its buffer")
		case whole:
			rec = put(rec, recNorm, string(line))
			open = false
		case len(line) > 0 && done:
			rec = put(rec, recNorm, string(line))
			open = false
		case len(line) > 0:
			rec = put(rec, recCont, string(line))
			open = true
		case done && open:
			rec = put(rec, recNorm, "")
			open = false
		}
		if _, err := w.Write(rec); err != nil {
			return err
		}
		if done {
			return nil
		}
	}
}

// edited is the content of a message after an edit. original yields the
// content as it is.
func edited(original io.Reader, e *queue.Edit) (io.Reader, error) {
	if e == nil {
		return original, nil
	}
	in := bufio.NewReaderSize(original, readAhead)
	var head bytes.Buffer
	sep := "" // a message of headers only has no blank line
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) || int64(head.Len()+len(line)) > maxHeader {
			return nil, fmt.Errorf("its header is too large to be changed (%d bytes so far)", head.Len()+len(line))
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if len(line) == 1 {
			sep = "\n"
			break
		}
		head.Write(line)
		if errors.Is(err, io.EOF) {
			break
		}
	}
	text, err := header.Edit(head.Bytes(), e.Header)
	if err != nil {
		return nil, err
	}
	if e.Body != nil {
		return io.MultiReader(bytes.NewReader(text), strings.NewReader("\n"), e.Body), nil
	}
	return io.MultiReader(bytes.NewReader(text), strings.NewReader(sep), in), nil
}
