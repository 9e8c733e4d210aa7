// Package header changes the header of a message as text: fields go, come and
// are replaced, and every other byte stays.
package header

import (
	"bytes"
	"fmt"
	"strings"

	"holdfast/queue"
)

// Name returns a field name in lower case, and refuses what is none (RFC 5322,
// 2.2).
func Name(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("header edit without a field name")
	}
	for i := range len(name) {
		if name[i] <= ' ' || name[i] >= 0x7F || name[i] == ':' {
			return "", fmt.Errorf("%.100q is no header field name", name)
		}
	}
	return strings.ToLower(name), nil
}

// Fold makes a value fit to stand behind a field name: a line break becomes a
// fold, so that no value starts a field of its own. NUL is dropped, as MTAs do
// when they receive one.
func Fold(value string) string {
	v := strings.NewReplacer("\r\n", "\n", "\r", "\n", "\x00", "").Replace(value)
	var b strings.Builder
	for i, part := range strings.Split(v, "\n") {
		if i > 0 {
			b.WriteByte('\n')
			if part == "" || part[0] != ' ' && part[0] != '\t' {
				b.WriteByte('\t')
			}
		}
		b.WriteString(part)
	}
	return b.String()
}

// Edit applies edits to a header: its lines, each ended by LF, without the
// blank line that ends it.
func Edit(text []byte, edits []queue.HeaderEdit) ([]byte, error) {
	fields := split(text)
	for _, e := range edits {
		name, err := Name(e.Name)
		if err != nil {
			return nil, err
		}
		made := []byte(e.Name + ": " + Fold(e.Value) + "\n")
		switch e.Op {
		case queue.HeaderAdd:
			fields = append(fields, made)
		case queue.HeaderPrepend:
			fields = append([][]byte{made}, fields...)
		case queue.HeaderRemove:
			fields = without(fields, name, nil)
		case queue.HeaderReplace:
			fields = without(fields, name, made)
		default:
			return nil, fmt.Errorf("header operation %q is not known", e.Op)
		}
	}
	return bytes.Join(fields, nil), nil
}

// split cuts a header into fields with their folds. A line that is neither
// stays where it is.
func split(text []byte) (out [][]byte) {
	start := 0
	for at := 0; at < len(text); {
		end := len(text)
		if i := bytes.IndexByte(text[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		if at > start && text[at] != ' ' && text[at] != '\t' {
			out = append(out, text[start:at:at])
			start = at
		}
		at = end
	}
	if start < len(text) {
		out = append(out, text[start:])
	}
	return out
}

// without removes the fields of a name; put, if any, takes the first one's
// place, or the end.
func without(fields [][]byte, name string, put []byte) (out [][]byte) {
	for _, f := range fields {
		if nameOf(f) != name {
			out = append(out, f)
			continue
		}
		if put != nil {
			out, put = append(out, put), nil
		}
	}
	if put != nil {
		out = append(out, put)
	}
	return out
}

// nameOf is a field's name in lower case; some MTAs let blanks stand before
// the colon.
func nameOf(field []byte) string {
	name, _, ok := bytes.Cut(field, []byte(":"))
	if !ok {
		return ""
	}
	return strings.ToLower(string(bytes.TrimRight(name, " \t")))
}
