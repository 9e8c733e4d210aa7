package sendmail

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"

	"holdfast/queue"
	"holdfast/queue/header"
)

// change describes a control file that is made from another.
type change struct {
	recipients []int // indexes of R lines to keep; nil: all
	edits      []queue.HeaderEdit
	marker     string // value of our $ line; "" for none
	newBody    bool   // the data file is another one: d and I lines go
	eightBit   bool   // the new body has 8-bit bytes
	created    int64  // new T; 0 keeps it
}

// build makes a control file from c. Lines that the change does not concern
// are kept verbatim, known or not.
func (c *control) build(ch change) (*control, error) {
	out := &control{}
	var pending []line // M, Q and r lines that belong to the next recipient
	recipient := -1
	for _, l := range c.lines {
		switch l.code {
		case 'M', 'Q', 'r':
			pending = append(pending, l)
			continue
		case 'R':
			if recipient++; ch.recipients == nil || slices.Contains(ch.recipients, recipient) {
				out.lines = append(append(out.lines, pending...), l)
			}
			pending = nil
			continue
		}
		out.lines = append(out.lines, pending...) // an M line before S is about the message
		pending = nil
		if l, keep := ch.line(l); keep {
			if l.code == 'S' && ch.marker != "" {
				out.lines = append(out.lines, makeLine("$"+macroName+ch.marker))
			}
			out.lines = append(out.lines, l)
		}
	}
	out.lines = append(out.lines, pending...)
	for _, e := range ch.edits {
		if err := out.edit(e); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// line is l as the changed file has it; false if it goes.
func (ch change) line(l line) (line, bool) {
	switch l.code {
	case '$':
		return l, !bytes.HasPrefix(l.value(), []byte(macroName))
	case 'd', 'I':
		return l, !ch.newBody
	case 'F':
		if ch.eightBit && bytes.IndexByte(l.value(), '8') < 0 {
			return makeLine("F8" + string(l.value())), true
		}
	case 'T':
		if ch.created != 0 {
			return makeLine("T" + strconv.FormatInt(ch.created, 10)), true
		}
	case 'K', 'N':
		if ch.created != 0 {
			return makeLine(string(l.code) + "0"), true
		}
	}
	return l, true
}

func makeLine(s string) line { return line{code: s[0], raw: []byte(s + "\n")} }

// edit applies one header edit.
func (c *control) edit(e queue.HeaderEdit) error {
	name, err := header.Name(e.Name)
	if err != nil {
		return err
	}
	first := slices.IndexFunc(c.lines, func(l line) bool { return l.code == 'H' && fieldName(l) == name })
	switch e.Op {
	case queue.HeaderRemove:
		c.removeHeaders(name)
	case queue.HeaderReplace:
		if first < 0 {
			c.lines = append(c.lines, makeHeader("??", e))
			return nil
		}
		cond, _ := condition(c.lines[first])
		c.lines[first] = makeHeader(string(cond), e)
		kept := c.lines[:first+1]
		for _, l := range c.lines[first+1:] {
			if l.code != 'H' || fieldName(l) != name {
				kept = append(kept, l)
			}
		}
		c.lines = kept
	case queue.HeaderAdd:
		c.lines = append(c.lines, makeHeader("??", e))
	case queue.HeaderPrepend:
		at := slices.IndexFunc(c.lines, func(l line) bool { return l.code == 'H' })
		if at < 0 {
			at = len(c.lines)
		}
		c.lines = slices.Insert(c.lines, at, makeHeader("??", e))
	default:
		return fmt.Errorf("header operation %q is not known", e.Op)
	}
	return nil
}

func (c *control) removeHeaders(name string) {
	c.lines = slices.DeleteFunc(c.lines, func(l line) bool { return l.code == 'H' && fieldName(l) == name })
}

// makeHeader writes an H line. The value is folded: it must never start a
// line of its own, which could add a recipient.
func makeHeader(cond string, e queue.HeaderEdit) line {
	raw := "H" + cond + e.Name + ": " + string(quote([]byte(header.Fold(e.Value)))) + "\n"
	return line{code: 'H', raw: []byte(raw)}
}
