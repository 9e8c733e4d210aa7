package conf

import "strings"

// place is where something stands in a file. Line and column count from 1,
// the column in characters.
type place struct {
	file   string
	line   int
	column int
}

// Error is one thing that is wrong in a configuration.
type Error struct {
	File         string
	Line, Column int    // from 1; the column counts characters
	Key          string // dotted path of the key, "" if it is not about one
	Message      string // what is wrong: lower case, no full stop
	Hint         string // what to do about it, or ""
	Text         string // the line of the file
}

// Errors is everything that is wrong in a configuration, by place.
type Errors []Error

// Error returns one line per error: file:line:column: message.
func (e Errors) Error() string { return strings.TrimRight(e.Format(), "\n") }

// Format returns the errors for a terminal.
func (e Errors) Format() string { return "" }
