package postfix

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"holdfast/queue"
)

// sizes are the fields of the C record (reference: B2).
type sizes struct {
	content int64 // from the first content record to X, in bytes of the file
	data    int64 // offset of the first content record
	rcpts   int64
	flags   int64 // of the queue manager
	length  int64 // content length for logs and SIZE=; since 2.4
	utf8    int64 // SMTPUTF8 flags; since 3.0
	fields  int
}

const (
	fullSizes   = 6
	smtputf8Bit = 1 // of sizes.utf8: requested
)

func parseSizes(data string) (sizes, error) {
	f := strings.Fields(data)
	s := sizes{fields: len(f)}
	into := []*int64{&s.content, &s.data, &s.rcpts, &s.flags, &s.length, &s.utf8}
	if len(f) < 3 || len(f) > len(into) {
		return s, surprise("a size record of %d fields", len(f))
	}
	for i, v := range f {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return s, damaged("size record: %.20q", v)
		}
		*into[i] = n
	}
	return s, nil
}

func (s sizes) String() string {
	out := fmt.Sprintf("%15d %15d %15d %15d %15d %15d", s.content, s.data, s.rcpts, s.flags, s.length, s.utf8)
	return out[:16*s.fields-1]
}

// file is a parsed queue file. The content is not in it: it is read from the
// file again, as often as it is needed.
type file struct {
	sizes    sizes
	env, ext []record // pointers followed, in logical order, without C, M, X, E
	flat     bool     // no pointers: logical and physical order are one
}

// parse reads a queue file whole, once over. It returns ErrIncomplete for one
// that ends too early, and ErrDamaged for one that Postfix itself would set
// aside; maxEnvelope bounds the bytes of envelope and extracted segment.
func parse(r io.ReaderAt, size, maxEnvelope int64, maxRcpts int) (*file, error) {
	c := &cursor{r: r, size: size}
	f := &file{}
	kind, data, _, err := c.next()
	if err != nil {
		return nil, err
	}
	if kind != recSize {
		return nil, damaged("it begins with %q, not with a size record", kind)
	}
	if f.sizes, err = parseSizes(string(data)); err != nil {
		return nil, err
	}
	budget := maxEnvelope
	if f.env, _, err = segment(c, envelopeTypes, recMessage, &budget); err != nil {
		return nil, err
	}
	if c.at != f.sizes.data {
		return nil, damaged("its content begins at %d, the size record says %d", c.at, f.sizes.data)
	}
	x, err := skipContent(c)
	if err != nil {
		return nil, err
	}
	if x-f.sizes.data != f.sizes.content {
		return nil, damaged("its content is of %d bytes, the size record says %d", x-f.sizes.data, f.sizes.content)
	}
	if f.ext, _, err = segment(c, extractedTypes, recEnd, &budget); err != nil {
		return nil, err
	}
	f.flat = c.pointers == 0
	return f, f.check(maxRcpts)
}

// segment reads records up to the one that ends the segment.
func segment(c *cursor, allowed string, end byte, budget *int64) (out []record, at int64, err error) {
	for {
		kind, data, at, err := c.next()
		if err != nil {
			return nil, 0, err
		}
		switch {
		case kind == end:
			return out, at, nil
		case strings.IndexByte(allowed, kind) < 0 || kind == recMessage || kind == recSize:
			return nil, 0, surprise("a record of type %q at %d", kind, at)
		case kind == recPad:
			continue
		}
		if *budget -= int64(len(data)) + 2; *budget < 0 {
			return nil, 0, damaged("its envelope is larger than limits.control_file")
		}
		out = append(out, record{kind, string(data)})
	}
}

// skipContent walks over the content and returns where X lies.
func skipContent(c *cursor) (int64, error) {
	for {
		kind, _, at, err := c.next()
		switch {
		case err != nil:
			return 0, err
		case kind == recXtra:
			return at, nil
		case strings.IndexByte(contentTypes, kind) < 0:
			return 0, surprise("a record of type %q in the content at %d", kind, at)
		}
	}
}

// check demands what the queue manager demands.
func (f *file) check(maxRcpts int) error {
	if _, ok := f.first(recSender); !ok {
		return damaged("no sender record")
	}
	t, ok := f.first(recTime)
	if !ok {
		return damaged("no time record")
	}
	if _, err := parseTime(t); err != nil {
		return err
	}
	n := 0
	for _, r := range f.all() {
		if r.kind == recRcpt {
			n++
		}
	}
	switch {
	case n == 0:
		return damaged("no recipient is left to be delivered to")
	case n > maxRcpts:
		return damaged("%d recipients, more than limits.recipients (%d)", n, maxRcpts)
	}
	return nil
}

func (f *file) all() []record { return append(append([]record(nil), f.env...), f.ext...) }

func (f *file) first(kind byte) (string, bool) {
	for _, r := range f.env {
		if r.kind == kind {
			return r.data, true
		}
	}
	return "", false
}

// parseTime reads a T record: seconds, and microseconds that are not padded.
func parseTime(s string) (time.Time, error) {
	sec, usec, _ := strings.Cut(s, " ")
	n, err := strconv.ParseInt(sec, 10, 64)
	if err != nil || n <= 0 {
		return time.Time{}, damaged("arrival time %.40q", s)
	}
	var u int64
	if usec != "" {
		if u, err = strconv.ParseInt(usec, 10, 64); err != nil || u < 0 || u > 999_999 {
			return time.Time{}, damaged("arrival time %.40q", s)
		}
	}
	return time.Unix(n, u*1000), nil
}

// content reads the content as `postcat -bhq` prints it (reference: B3). The
// file has been parsed, so that damage here means that it changed.
func (f *file) content(r io.ReaderAt, size int64) io.Reader {
	return &contentReader{c: cursor{r: r, size: size, at: f.sizes.data}}
}

type contentReader struct {
	c    cursor
	text []byte // of the last record, not yet read
	line bool   // the record's line ends
	done bool
}

// Read reads content.
func (r *contentReader) Read(p []byte) (n int, err error) {
	for n < len(p) {
		switch {
		case len(r.text) > 0:
			m := copy(p[n:], r.text)
			r.text, n = r.text[m:], n+m
		case r.line:
			p[n] = '\n'
			r.line = false
			n++
		case r.done:
			if n == 0 {
				return 0, io.EOF
			}
			return n, nil
		default:
			if err := r.next(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

func (r *contentReader) next() error {
	kind, data, at, err := r.c.next()
	switch {
	case err != nil:
		return err
	case kind == recNorm:
		r.text, r.line = data, true
	case kind == recCont:
		r.text = data
	case kind == recPad:
	case kind == recXtra:
		r.done = true
	default:
		return damaged("a record of type %q in the content at %d", kind, at)
	}
	return nil
}

// Flags of recipients (Postfix dsn_mask.h).
const (
	notifyNever   = 1
	notifySuccess = 2
	notifyFailure = 4
	notifyDelay   = 8
	retFull       = 1
	retHeaders    = 2
)

func notifyText(flags string) string {
	n, err := strconv.Atoi(flags)
	if err != nil {
		return ""
	}
	var out []string
	for _, x := range []struct {
		bit  int
		word string
	}{{notifyNever, "NEVER"}, {notifySuccess, "SUCCESS"}, {notifyFailure, "FAILURE"}, {notifyDelay, "DELAY"}} {
		if n&x.bit != 0 {
			out = append(out, x.word)
		}
	}
	return strings.Join(out, ",")
}

// envelope is what the records say. Only recipients that are still to be
// delivered to are in it, in the order of the file.
func (f *file) envelope() queue.Envelope {
	e := queue.Envelope{SMTPUTF8: f.sizes.fields >= fullSizes && f.sizes.utf8&smtputf8Bit != 0}
	var rcpt queue.Recipient
	for _, r := range f.all() {
		switch r.kind {
		case recSender:
			e.Sender = r.data
		case recTime:
			e.Arrived, _ = parseTime(r.data) // checked by parse
		case recFilter:
			e.Filter = r.data // the last one counts
		case recRedir:
			e.Redirect = r.data
		case recVerp:
			e.VERP = r.data
		case recOrcpt:
			rcpt.Original = r.data
		case recRcpt:
			rcpt.Address = r.data
			e.Recipients = append(e.Recipients, rcpt)
			rcpt = queue.Recipient{}
		case recDone, recCancel:
			rcpt = queue.Recipient{}
		case recAttr:
			attribute(&e, &rcpt, r.data)
		}
	}
	return e
}

func attribute(e *queue.Envelope, rcpt *queue.Recipient, a string) {
	name, v, _ := strings.Cut(a, "=")
	switch name {
	case "notify_flags":
		rcpt.Notify = notifyText(v)
	case "dsn_orig_rcpt":
		rcpt.ORcpt = v
	case "envelope_id":
		e.EnvID = v
	case "ret_flags":
		e.Ret = map[string]string{strconv.Itoa(retFull): "FULL", strconv.Itoa(retHeaders): "HDRS"}[v]
	case "encoding":
		e.Body8Bit = v == "8bit"
	case "log_client_name":
		e.ClientName = known(v)
	case "log_client_address":
		e.ClientAddr = known(v)
	case "log_helo_name":
		e.Helo = known(v)
	case "log_protocol_name":
		e.Protocol = known(v)
	case "sasl_username":
		e.SASLUser = v
	case "sasl_sender":
		e.SASLSender = v
	}
}

// known drops the word that Postfix writes for "nothing".
func known(s string) string {
	if s == "unknown" {
		return ""
	}
	return s
}
