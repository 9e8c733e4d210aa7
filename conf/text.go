package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// Bounds of the text, so that no file costs much, whatever is in it.
const (
	maxFile  = 1 << 20 // bytes
	maxDepth = 50      // sections and lists within each other
)

type kind int

const (
	scalarNode kind = iota
	mapNode
	listNode
	badNode // refused, and reported already
)

// node is a value in a file. A map's content is key, value, key, value.
type node struct {
	kind    kind
	tag     string // of a scalar, as YAML resolves it: !!str, !!int, !!null ...
	value   string
	quoted  bool
	at      place
	content []*node
}

func (n *node) null() bool { return n.kind == scalarNode && n.tag == "!!null" }

// what names a value's type as a user sees it.
func (n *node) what() string {
	switch {
	case n.kind == mapNode:
		return "a section"
	case n.kind == listNode:
		return "a list"
	case n.null():
		return "empty"
	case n.tag == "!!int" || n.tag == "!!float":
		return "a number"
	case n.tag == "!!bool":
		return "yes or no"
	}
	return "a text"
}

// text is a file on its way to nodes.
type text struct {
	name  string
	lines []string
	errs  []Error
}

func (t *text) fail(line, column int, message, hint string) {
	if len(t.errs) > maxErrors {
		return // report leaves out even the last
	}
	line = min(max(line, 1), max(len(t.lines), 1))
	e := Error{File: t.name, Line: line, Column: max(column, 1), Message: message, Hint: hint}
	if line <= len(t.lines) {
		e.Text = t.lines[line-1]
	}
	t.errs = append(t.errs, e)
}

// parseText turns a file into nodes. It returns nil and at least one error
// in t.errs if there is no tree; with a tree there may be errors too.
func parseText(src Source) (*node, *text) {
	t := &text{name: src.Name}
	data := bytes.TrimPrefix(src.Data, []byte("\xef\xbb\xbf"))
	if len(data) > maxFile {
		t.fail(1, 1, fmt.Sprintf("file has %d bytes, more than the %d allowed", len(data), maxFile), "")
		return nil, t
	}
	t.lines = strings.Split(strings.ReplaceAll(string(data), "\r\n", "\n"), "\n")
	if t.characters(); len(t.errs) > 0 {
		return nil, t
	}
	data = []byte(strings.Join(t.lines, "\n"))
	dec := yaml.NewDecoder(bytes.NewReader(data))
	doc, err := decodeNode(dec)
	switch {
	case errors.Is(err, io.EOF) || err == nil && emptyDocument(doc):
		t.fail(1, 1, "file is empty", "remove it, or see the example configuration")
		return nil, t
	case err != nil:
		t.syntax(data, err)
		return nil, t
	}
	switch second, err := decodeNode(dec); {
	case err == nil:
		t.fail(second.Line, second.Column, "second YAML document in the file", "remove the line with ---, or put this part into a file of its own in conf.d")
	case !errors.Is(err, io.EOF):
		t.syntax(data, err)
	}
	return t.convert(doc.Content[0], 1), t
}

func emptyDocument(doc *yaml.Node) bool {
	return len(doc.Content) != 1 || doc.Content[0].Tag == "!!null"
}

// decodeNode reads the next document. The library has been known to panic
// on broken input, and its authors have archived it.
func decodeNode(dec *yaml.Decoder) (doc *yaml.Node, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("yaml: not understood: %v", r)
		}
	}()
	doc = new(yaml.Node)
	return doc, dec.Decode(doc)
}

// characters refuses what is not UTF-8, and characters that YAML forbids or
// that it would count as line ends where an editor does not.
func (t *text) characters() {
	for i, line := range t.lines {
		column := 0
		for at, r := range line {
			column++
			if r == utf8.RuneError {
				if _, size := utf8.DecodeRuneInString(line[at:]); size == 1 {
					t.fail(i+1, column, fmt.Sprintf("byte 0x%02x is not UTF-8", line[at]), "save the file in UTF-8 encoding")
					break
				}
			}
			if forbidden(r) {
				t.fail(i+1, column, fmt.Sprintf("character U+%04X is not allowed", r), "remove it")
				break
			}
		}
	}
}

// forbidden follows YAML 1.1, 5.1, and adds the line ends of 5.4 other than
// LF and CR LF.
func forbidden(r rune) bool {
	switch {
	case r == '\t':
		return false
	case r < 0x20, r >= 0x7f && r < 0xa0, r == 0x2028, r == 0x2029, r == 0xfeff, r == 0xfffe, r == 0xffff:
		return true
	}
	return false
}

// problem splits the library's errors.
var problem = regexp.MustCompile(`(?s)^(?:yaml: )?(?:line [0-9]+: )?(.*)$`)

// What the library says, and what helps most often.
var syntaxHints = []struct{ said, hint string }{
	{"mapping values are not allowed", `check the indentation; a text with ": " in it needs quotes`},
	{"did not find expected key", "check the indentation against the lines above"},
	{"could not find expected ':'", "a key needs a colon and a space after it"},
	{"cannot start any token", "a text that starts with this character needs quotes"},
	{"did not find expected ',' or ']'", "the list that begins here needs commas and a closing ]"},
	{"did not find expected ',' or '}'", "the section that begins here needs commas and a closing }"},
	{"unexpected end of stream", "a quote that is opened here is not closed"},
	{"block sequence entries are not allowed", "a list begins on the line after its key"},
	{"did not find expected '-' indicator", "check the indentation against the lines above"},
	{"unknown anchor", "a text that starts with * needs quotes; aliases are not supported"},
}

// syntax reports a syntax error. The library names the line at which the
// construct began, or the one before the error, or none; what is right is
// the first line with which the text fails in the same way.
func (t *text) syntax(data []byte, failed error) {
	end := lineEnds(data)
	line := 1 + sort.Search(len(end)-1, func(i int) bool {
		err := parseAll(data[:end[i]])
		return err != nil && err.Error() == failed.Error()
	})
	message := problem.FindStringSubmatch(failed.Error())[1]
	text := t.lines[min(line, len(t.lines))-1]
	if tabIndent(text) >= 0 {
		t.tabs()
		return
	}
	hint := ""
	for _, h := range syntaxHints {
		if strings.Contains(message, h.said) {
			hint = h.hint
		}
	}
	t.fail(line, 1+len(text)-len(strings.TrimLeft(text, " ")), "not valid YAML: "+message, hint)
}

// tabs reports every line that is indented with a tab. Called only for text
// that fails at such a line: within a block of text a tab may be right.
func (t *text) tabs() {
	for i, line := range t.lines {
		if at := tabIndent(line); at >= 0 {
			t.fail(i+1, at+1, "tab in the indentation", "indent with spaces")
		}
	}
}

// tabIndent returns the offset of the first tab that indents a line, or -1.
func tabIndent(line string) int {
	indent := line[:len(line)-len(strings.TrimLeft(line, " \t"))]
	if len(indent) == len(line) {
		return -1
	}
	return strings.IndexByte(indent, '\t')
}

func lineEnds(data []byte) []int {
	var ends []int
	for i, c := range data {
		if c == '\n' {
			ends = append(ends, i+1)
		}
	}
	return append(ends, len(data))
}

// parseAll returns the first error of any document.
func parseAll(data []byte) error {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		if _, err := decodeNode(dec); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// convert copies the library's tree and refuses what a configuration does
// not need. depth bounds the recursion; a subtree beyond it is refused.
func (t *text) convert(y *yaml.Node, depth int) *node {
	n := &node{value: y.Value, tag: y.Tag, at: place{t.name, y.Line, y.Column}}
	n.quoted = y.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0
	fail := func(message, hint string) *node {
		t.fail(y.Line, y.Column, message, hint)
		return &node{kind: badNode, at: n.at}
	}
	switch {
	case y.Kind == yaml.AliasNode:
		return fail("alias *"+printable(cut(y.Value))+" is not supported", "write the value out; a text that starts with * needs quotes")
	case y.Anchor != "":
		return fail("anchor &"+printable(cut(y.Anchor))+" is not supported", "remove it; a text that starts with & needs quotes")
	case y.Style&yaml.TaggedStyle != 0:
		return fail("tag "+printable(cut(y.Tag))+" is not supported", "remove it; a text that starts with ! needs quotes")
	case depth > maxDepth:
		return fail(fmt.Sprintf("more than %d levels deep", maxDepth), "")
	case y.Kind == yaml.MappingNode:
		n.kind = mapNode
	case y.Kind == yaml.SequenceNode:
		n.kind = listNode
	}
	for _, c := range y.Content {
		n.content = append(n.content, t.convert(c, depth+1))
	}
	return n
}

// cut bounds a text that goes into a message.
func cut(s string) string {
	const most = 60
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "..."
	}
	return s
}
