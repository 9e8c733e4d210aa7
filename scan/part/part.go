// Package part walks the parts of a message: once over its bytes, without
// recursion, within limits. Damage is data: what cannot be understood is
// visited as it is, and what a limit ends is said.
package part

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"regexp"
	"slices"
	"strings"

	"github.com/emersion/go-message/textproto"

	"holdfast/scan"
)

// Limits bound a walk.
type Limits struct {
	Depth   int   // of parts within parts
	Parts   int   // over all depths
	Header  int64 // bytes of one header
	Decoded int64 // bytes of all decoded leaves together
}

// Visitor sees the leaves in order. Begin is called before the first byte
// of one, with what its header says; what it returns gets the decoded bytes.
type Visitor interface {
	Begin(p scan.Part) io.Writer
	End(p scan.Part) // with its size
}

// Summary is what a walk says of the whole.
type Summary struct {
	Header     textproto.Header // of the message
	Incomplete []string         // limits that bit
}

const (
	lineBuffer   = 64 << 10 // a longer line comes in pieces
	maxBoundary  = 1000     // bytes; RFC 2046 allows 70
	rootLeaf     = "1"
	nameField    = 1000
	maxReadings  = 8 // of one header: boundaries that a client may read out of it
	mixedDefault = "text/plain"
)

// level is one open multipart, or a message within the message.
type level struct {
	boundaries []string // none for a message within
	path       string
	children   int
	digest     bool // what has no type is a message (RFC 2046, 5.1.5)
}

type walker struct {
	lim     Limits
	v       Visitor
	stack   []level
	path    string
	header  bytes.Buffer
	inHead  bool
	tooLong bool
	parts   int
	decoded int64
	leaf    *scan.Part
	sink    decoder
	sum     Summary
	first   bool
}

// Walk visits the leaves of the message in r.
func Walk(r io.Reader, lim Limits, v Visitor) (Summary, error) {
	w := &walker{lim: lim, v: v, path: "", inHead: true, first: true}
	in := bufio.NewReaderSize(r, lineBuffer)
	start := true
	for {
		piece, err := in.ReadSlice('\n')
		if len(piece) > 0 {
			w.line(piece, start)
		}
		start = len(piece) > 0 && piece[len(piece)-1] == '\n'
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			if w.inHead {
				w.endHeader()
			}
			w.endLeaf()
			return w.sum, nil
		case err != nil:
			return w.sum, fmt.Errorf("read message: %w", err)
		}
	}
}

func (w *walker) incomplete(why string) {
	for _, s := range w.sum.Incomplete {
		if s == why {
			return
		}
	}
	w.sum.Incomplete = append(w.sum.Incomplete, why)
}

// line takes one line, or a piece of a long one.
func (w *walker) line(b []byte, start bool) {
	if start && len(b) > 2 && b[0] == '-' && b[1] == '-' && w.delimiter(b) {
		return
	}
	if !w.inHead {
		w.bareCR(b)
		w.body(b)
		return
	}
	if start && (len(b) == 1 && b[0] == '\n' || len(b) == 2 && b[0] == '\r' && b[1] == '\n') {
		w.endHeader()
		return
	}
	if int64(w.header.Len()+len(b)) > w.lim.Header {
		w.incomplete("limits.header")
		w.tooLong = true
		return
	}
	w.header.Write(b)
}

// bareCR notices a delimiter behind a CR that ends no line: some clients take
// it for one.
func (w *walker) bareCR(b []byte) {
	for {
		i := bytes.IndexByte(b, '\r')
		if i < 0 || i+1 >= len(b) || b[i+1] == '\n' {
			return
		}
		if b = b[i+1:]; len(b) < 3 || b[0] != '-' || b[1] != '-' {
			continue
		}
		line, _, _ := bytes.Cut(b[2:], []byte("\r"))
		text := strings.TrimSuffix(string(bytes.TrimRight(line, "\n\t ")), "--")
		for _, l := range w.stack {
			if slices.Contains(l.boundaries, text) {
				w.incomplete("a boundary behind a bare CR")
			}
		}
	}
}

// delimiter tries a line against every open boundary, the innermost first:
// clients differ in which one they believe.
func (w *walker) delimiter(b []byte) bool {
	text := string(bytes.TrimRight(b[2:], "\r\n\t "))
	for i := len(w.stack) - 1; i >= 0; i-- {
		for _, bound := range w.stack[i].boundaries {
			switch text {
			case bound:
				w.next(i)
				return true
			case bound + "--":
				w.finish(i)
				return true
			}
		}
	}
	return false
}

// next begins another part of the multipart at level i.
func (w *walker) next(i int) {
	w.leave(i)
	w.stack[i].children++
	w.path = join(w.stack[i].path, w.stack[i].children)
	w.inHead, w.tooLong = true, false
	w.header.Reset()
}

// finish ends the multipart at level i; what follows is its epilogue, and
// some clients show it.
func (w *walker) finish(i int) {
	w.leave(i)
	w.stack[i].children++
	w.path = join(w.stack[i].path, w.stack[i].children)
	w.inHead = false
	w.begin(scan.Part{Type: mixedDefault, Name: "", Encoding: "epilogue"})
}

func (w *walker) leave(i int) {
	if w.inHead {
		w.endHeader() // a part without a body
	}
	w.endLeaf()
	w.stack = w.stack[:i+1]
}

func join(path string, n int) string {
	if path == "" {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s.%d", path, n)
}

func (w *walker) body(b []byte) {
	if w.leaf == nil {
		w.begin(scan.Part{Type: mixedDefault, Encoding: "preamble"})
	}
	if w.sink != nil {
		w.sink.Write(b)
	}
}

// endHeader reads the header of a part and says what its body is.
func (w *walker) endHeader() {
	w.inHead = false
	raw := rawHeader(bytes.Clone(w.header.Bytes()))
	h := fields(raw)
	w.header.Reset()
	if w.first {
		w.sum.Header, w.first = h, false
	}
	kind, params := contentType(h, w.inDigest())
	enc := w.encoding(h)
	encoded := enc == "base64" || enc == "quoted-printable"
	if raw.ambiguous(encoded) {
		w.incomplete("a header of which clients see different ends")
	}
	switch {
	case strings.HasPrefix(kind, "multipart/"):
		bounds := boundaries(h, params)
		if encoded || len(bounds) == 0 {
			w.incomplete("a multipart that is encoded, or has no boundary")
		}
		if len(bounds) > 0 && w.deeper() {
			w.stack = append(w.stack, level{boundaries: bounds, path: w.path, digest: kind == "multipart/digest"})
			w.leaf = nil
			return
		}
	case kind == "message/partial" || kind == "message/external-body":
		w.incomplete("a fragment of a message, or one that is elsewhere (" + kind + ")")
	case strings.HasPrefix(kind, "message/") && encoded:
		w.incomplete("a message within the message that is encoded")
	case strings.HasPrefix(kind, "message/"):
		if w.deeper() {
			w.stack = append(w.stack, level{path: w.path})
			w.path = join(w.path, 1)
			w.inHead, w.tooLong = true, false
			return
		}
	}
	w.begin(scan.Part{Type: clip(kind), Name: clip(fileName(h, params)), Encoding: clip(enc)})
}

func (w *walker) inDigest() bool { return len(w.stack) > 0 && w.stack[len(w.stack)-1].digest }

// rawHeader is a header before it is read.
type rawHeader []byte

// ambiguous says that clients may disagree about where the header ends, and so
// about what is encoded.
func (h rawHeader) ambiguous(encoded bool) bool {
	for i, c := range h {
		if c == '\r' && i+1 < len(h) && h[i+1] != '\n' {
			return true
		}
	}
	if !encoded {
		return false // each reading shows the same bytes, and they are all looked at
	}
	for line := range bytes.Lines(h) {
		if line[0] != ' ' && line[0] != '\t' && bytes.IndexByte(line, ':') <= 0 && !bytes.HasPrefix(line, []byte("From ")) {
			return true
		}
	}
	return false
}

func (w *walker) deeper() bool {
	if len(w.stack) >= w.lim.Depth {
		w.incomplete("limits.depth")
		return false
	}
	return true
}

func (w *walker) begin(p scan.Part) {
	w.endLeaf()
	if p.Path = w.path; p.Path == "" {
		p.Path = rootLeaf
	}
	if w.parts++; w.parts > w.lim.Parts {
		w.incomplete("limits.parts")
		w.leaf = &p // its bytes are not looked at
		return
	}
	w.leaf = &p
	w.sink = newDecoder(p.Encoding, &counter{w: w, to: w.v.Begin(p)})
}

// counter enforces the limit on decoded bytes.
type counter struct {
	w  *walker
	to io.Writer
}

func (c *counter) Write(b []byte) (int, error) {
	if room := c.w.lim.Decoded - c.w.decoded; int64(len(b)) > room {
		c.w.incomplete("limits.decoded")
		b = b[:max(room, 0)]
	}
	c.w.decoded += int64(len(b))
	c.w.leaf.Size += int64(len(b))
	return c.to.Write(b)
}

func (w *walker) endLeaf() {
	if w.leaf == nil {
		return
	}
	if w.sink != nil {
		w.sink.Close()
		w.v.End(*w.leaf)
	}
	w.leaf, w.sink = nil, nil
}

// fields reads a header with go-message; one that it refuses is read again
// line by line, keeping what has a colon.
func fields(b []byte) textproto.Header {
	text := append(bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n")), []byte("\r"), []byte("\n")), '\n')
	h, err := textproto.ReadHeader(bufio.NewReader(bytes.NewReader(bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n")))))
	if err == nil {
		return h
	}
	var loose textproto.Header
	var names, values []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		if n := len(values); n > 0 && line != "" && (line[0] == ' ' || line[0] == '\t') {
			values[n-1] += " " + strings.TrimSpace(line)
			continue
		}
		if name, v, ok := strings.Cut(line, ":"); ok {
			names, values = append(names, strings.TrimSpace(name)), append(values, strings.TrimSpace(v))
		}
	}
	for i := len(names) - 1; i >= 0; i-- { // Add puts a field on top
		loose.Add(names[i], values[i])
	}
	return loose
}

// A search in a lower-case copy would not do: folding moves the bytes behind
// one that is not UTF-8.
var boundaryWord = regexp.MustCompile(`(?i)boundary(\*[0-9]*\*?)?[ \t]*=[ \t]*`)

// contentType is the type in lower case; a broken field still says what it
// begins with.
func contentType(h textproto.Header, inDigest bool) (string, map[string]string) {
	v := withoutComments(h.Get("Content-Type"))
	kind, params, err := mime.ParseMediaType(v)
	if err != nil {
		kind, _, _ = strings.Cut(v, ";")
		kind = strings.ToLower(strings.NewReplacer(" ", "", "\t", "", `"`, "", "\x00", "").Replace(kind))
	}
	switch {
	case kind != "":
		return kind, params
	case inDigest:
		return "message/rfc822", nil
	}
	return mixedDefault, nil
}

// withoutComments drops RFC 822 comments, which stand in parentheses outside
// of quotes.
func withoutComments(s string) string {
	if !strings.Contains(s, "(") {
		return s
	}
	var out strings.Builder
	depth, quoted := 0, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && i+1 < len(s):
			if depth == 0 {
				out.WriteString(s[i : i+2])
			}
			i++
		case c == '"' && depth == 0:
			quoted = !quoted
			out.WriteByte(c)
		case c == '(' && !quoted:
			depth++
		case c == ')' && depth > 0:
			depth--
		case depth == 0:
			out.WriteByte(c)
		}
	}
	return strings.TrimSpace(out.String())
}

// boundaries are all boundaries that a client may read out of the header:
// the parsed one, and what stands behind the word in every such field.
func boundaries(h textproto.Header, params map[string]string) []string {
	var out []string
	add := func(b string) {
		b = strings.TrimRight(b, " \t")
		if b == "" || len(b) > maxBoundary {
			return
		}
		for _, have := range out {
			if have == b {
				return
			}
		}
		out = append(out, b)
	}
	add(params["boundary"])
	for i, v := range h.Values("Content-Type") {
		if i == maxReadings {
			break
		}
		for _, text := range []string{v, withoutComments(v)} {
			whole := ""
			for _, at := range boundaryWord.FindAllStringIndex(text, maxReadings) {
				t := token(text[at[1]:])
				add(t)
				whole += t // of a value in pieces (RFC 2231, 3)
			}
			add(whole)
		}
	}
	return out
}

func token(s string) string {
	if q, ok := strings.CutPrefix(s, `"`); ok {
		t, _, _ := strings.Cut(q, `"`)
		return t
	}
	if i := strings.IndexAny(s, "; \t("); i >= 0 {
		s = s[:i]
	}
	return s
}

var encodingWord = regexp.MustCompile(`[a-z0-9-]+`)

// encoding is the transfer encoding by its first word. Fields that contradict
// each other leave open what a client shows.
func (w *walker) encoding(h textproto.Header) string {
	first := ""
	for i, v := range h.Values("Content-Transfer-Encoding") {
		e := encodingWord.FindString(strings.ToLower(withoutComments(v)))
		if i == 0 {
			first = e
		} else if e != first {
			w.incomplete("transfer encodings that contradict each other")
		}
	}
	if first != "base64" && first != "quoted-printable" && decodedBySome.MatchString(first) {
		w.incomplete("a transfer encoding that is not decoded here: " + clip(first))
	}
	return first
}

// decodedBySome are encodings that clients know beside the standard's. Of any
// other the bytes are shown as they are (RFC 2045, 6.4), and looked at so.
var decodedBySome = regexp.MustCompile(`uu|binhex|yenc|base64|quoted`)

func fileName(h textproto.Header, params map[string]string) string {
	if _, p, err := mime.ParseMediaType(h.Get("Content-Disposition")); err == nil && p["filename"] != "" {
		return p["filename"]
	}
	return params["name"]
}

func clip(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > nameField {
		s = strings.ToValidUTF8(s[:nameField], "")
	}
	return s
}
