package conf

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// place is where something stands in a file. Line and column count from 1,
// the column in characters.
type place struct {
	file         string
	line, column int
}

func (p place) String() string { return fmt.Sprintf("%s:%d", printable(p.file), p.line) }

// Error is one thing that is wrong in a configuration.
type Error struct {
	File         string
	Line, Column int    // from 1; the column counts characters
	Key          string // dotted path of the key, "" if it is not about one
	Message      string // what is wrong: lower case, no full stop
	Hint         string // what to do about it, or ""
	Text         string // the line of the file
}

// Error returns file:line:column: message, and the hint in parentheses.
func (e Error) Error() string {
	s := fmt.Sprintf("%s:%d:%d: %s", printable(e.File), e.Line, e.Column, e.Message)
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Errors is everything that is wrong in a configuration, by place.
type Errors []Error

// Error returns one line per error.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

// Format returns the errors for a terminal: each with the line that it is
// about, a caret under the place, and what to do. Nothing in it comes from
// the files unescaped.
func (e Errors) Format() string {
	var b strings.Builder
	for _, one := range e {
		fmt.Fprintf(&b, "%s:%d:%d: %s\n", printable(one.File), one.Line, one.Column, one.Message)
		text, caret := excerpt(one.Text, one.Column)
		if strings.TrimSpace(text) != "" {
			fmt.Fprintf(&b, "    %s\n    %s^\n", strings.TrimRight(text, " "), strings.Repeat(" ", caret))
		}
		if one.Hint != "" {
			fmt.Fprintf(&b, "    %s\n", one.Hint)
		}
	}
	return b.String()
}

// excerpt cuts a line to what fits beside the given column (from 1) and
// returns the column's new offset (from 0). One character stays one.
func excerpt(line string, column int) (string, int) {
	const before, width = 60, 76
	at := max(column-1, 0)
	from := max(0, at-before)
	for range from { // by hand, since a line may have a million characters
		_, size := utf8.DecodeRuneInString(line)
		line = line[size:]
	}
	end := 0
	for i := 0; i < width && end < len(line); i++ {
		_, size := utf8.DecodeRuneInString(line[end:])
		end += size
	}
	return printable(line[:end]), at - from
}

// printable replaces what a terminal might act on, character by character.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s)
}

// nearest returns the word that was probably meant by s, or "".
func nearest(s string, words []string) string {
	const longest = 40
	if len(s) > longest {
		return ""
	}
	fold := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }
	best, least := "", max(1, len(s)/3)+1
	for _, w := range words {
		if d := distance(fold(s), fold(w)); d < least {
			best, least = w, d
		}
	}
	return best
}

// distance counts the letters to insert, remove, change or swap with their
// neighbour that make b of a (optimal string alignment).
func distance(a, b string) int {
	var before []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
