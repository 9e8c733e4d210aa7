package conf

import (
	"cmp"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// leaf sets a value that is not a section, and checks it by its tags. A
// value that is wrong leaves the default.
func (d *decoder) leaf(f field, n *node, v reflect.Value, path string) {
	bad := func(at place, message, hint string) { d.fail(at, path, path+": "+message, hint) }
	if n.null() {
		bad(n.at, "has no value", defaultHint(f))
		return
	}
	values, ok := []*node{n}, true
	var apply func()
	switch p := v.Addr().Interface().(type) {
	case *List:
		if n.kind == listNode {
			values = n.content
		}
		if len(values) == 0 {
			bad(n.at, "the list is empty", "")
			return
		}
		list := make(List, len(values))
		for i, one := range values {
			ok = d.scalar(f, one, &list[i], bad) && ok
		}
		apply = func() { *p = list }
	case *Command:
		var c Command
		c, ok = d.command(f, n, bad)
		apply = func() { *p = c }
	default:
		fresh := reflect.New(v.Type())
		ok = d.scalar(f, n, fresh.Interface(), bad)
		apply = func() { v.Set(fresh.Elem()) }
	}
	if ok {
		apply()
	}
}

// command reads none, a list of words, or auto if that is the default.
func (d *decoder) command(f field, n *node, bad func(place, string, string)) (Command, bool) {
	mayAuto := f.def == "auto"
	if n.kind == scalarNode && (n.value == "auto" && mayAuto || n.value == "none") {
		return Command{Auto: n.value == "auto"}, true
	}
	if n.kind != listNode || len(n.content) == 0 {
		wants := "none or a list of words"
		if mayAuto {
			wants = "auto, none or a list of words"
		}
		bad(n.at, fmt.Sprintf("must be %s, not %s", wants, describe(n)), "a command is written as ["+f.words+"]")
		return Command{}, false
	}
	var c Command
	ok := true
	for i, word := range n.content {
		var s string
		switch {
		case word.kind == badNode:
			ok = false
		case word.kind != scalarNode || word.null():
			bad(word.at, "a word of a command must be a text, not "+word.what(), "")
			ok = false
		case strings.ContainsFunc(word.value, unicode.IsControl):
			bad(word.at, "control character in "+quote(word.value), "")
			ok = false
		case i == 0:
			ok = d.scalar(field{kind: "path"}, word, &s, bad) && ok
		default:
			s = word.value
		}
		c.Words = append(c.Words, s)
	}
	return c, ok
}

// scalar reads one word into target and checks it.
func (d *decoder) scalar(f field, n *node, target any, bad func(place, string, string)) bool {
	if n.kind == badNode {
		return false
	}
	if message, hint := mistyped(f, n, target); message != "" {
		bad(n.at, message, hint)
		return false
	}
	message := ""
	if err := setText(target, n.value); err != nil {
		message = err.Error()
	} else if message = f.outside(target); message == "" {
		if s, ok := target.(*string); ok {
			*s, message = checkText(f.kind, *s, f.key == "in" || f.key == "out")
		}
	}
	if message != "" {
		bad(n.at, message, "")
	}
	return message == ""
}

// mistyped says what is wrong with the type of a value as YAML sees it, or
// with a word that is not one of those allowed.
func mistyped(f field, n *node, target any) (message, hint string) {
	if n.kind != scalarNode || n.null() {
		return fmt.Sprintf("must be %s, not %s", wanted(f, target), n.what()), ""
	}
	if len(f.enum) > 0 {
		if slices.Contains(f.enum, n.value) {
			return "", ""
		}
		if near := nearest(n.value, f.enum); near != "" {
			hint = fmt.Sprintf("did you mean %q?", near)
		}
		return fmt.Sprintf("must be %s, not %s", wanted(f, target), quote(n.value)), hint
	}
	switch target.(type) {
	case *int, *bool:
		if n.quoted {
			return fmt.Sprintf("must be %s, not a text", wanted(f, target)), "remove the quotes"
		}
	case *string:
		if number := f.kind == "name" && n.tag == "!!int"; n.tag != "!!str" && !number {
			return "must be a text, not " + n.what(), "write it in quotes: " + strconv.QuoteToASCII(cut(n.value))
		}
	}
	return "", ""
}

// setText reads a text into a value of the schema.
func setText(target any, s string) (err error) {
	switch p := target.(type) {
	case *string:
		*p = s
	case *List:
		*p = List{s}
	case *Command:
		*p = Command{Auto: s == "auto"}
	case *bool:
		*p, err = parseBool(s)
	case *int:
		var n int64
		n, err = parseInt(s)
		*p = int(n)
	case *Count:
		*p, err = parseCount(s)
	case *Size:
		*p, err = ParseSize(s)
	case *Share:
		*p, err = ParseShare(s)
	case *time.Duration:
		*p, err = ParseDuration(s)
	default:
		v := reflect.ValueOf(target).Elem()
		if v.Kind() != reflect.String {
			return fmt.Errorf("no way to read a %s", v.Type())
		}
		v.SetString(s)
	}
	return err
}

// outside says what is wrong with a number that is not within the bounds of
// its key. Bounds are of the value's own type.
func (f field) outside(target any) string {
	for _, bound := range []struct {
		text, word string
		sign       int
	}{{f.min, "least", -1}, {f.max, "most", 1}} {
		if bound.text == "" {
			continue
		}
		limit := reflect.New(reflect.TypeOf(target).Elem())
		_ = setText(limit.Interface(), bound.text) // a test reads every bound
		value := reflect.ValueOf(target).Elem()
		if _, ok := target.(*Count); ok && value.Int() == 0 {
			continue // auto
		}
		if cmp.Compare(value.Int(), limit.Elem().Int()) == bound.sign {
			return fmt.Sprintf("must be at %s %s", bound.word, bound.text)
		}
	}
	return ""
}

var (
	label    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$`)
	userName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?$`)
	userID   = regexp.MustCompile(`^[1-9][0-9]{0,9}$`)
)

// checkText checks a text by its kind, and returns it in its one form.
func checkText(kind, s string, pattern bool) (clean, message string) {
	switch kind {
	case "label":
		if !label.MatchString(s) {
			return "", quote(s) + " is not a name: letters, digits, - and _, at most 32"
		}
	case "name":
		if s == "root" || s == "0" {
			return "", "workers never run as root"
		}
		id, err := strconv.ParseUint(s, 10, 32)
		if !userName.MatchString(s) && (!userID.MatchString(s) || err != nil || id == 1<<32-1) {
			return "", quote(s) + " is not a user's name or number"
		}
	case "path":
		return checkPath(s, pattern)
	case "hostport":
		host, port, err := net.SplitHostPort(s)
		n, nerr := strconv.ParseUint(port, 10, 16)
		if ip := net.ParseIP(host); err != nil || nerr != nil || n == 0 || ip == nil || !ip.IsLoopback() {
			return "", "must be an address of this machine and a port, such as 127.0.0.1:10027, not " + quote(s)
		}
	}
	return s, ""
}

func checkPath(s string, pattern bool) (clean, message string) {
	const longest = 4095 // PATH_MAX without its NUL
	switch {
	case strings.ContainsFunc(s, unicode.IsControl):
		return "", "control character in " + quote(s)
	case !filepath.IsAbs(s):
		return "", "must be an absolute path, which begins with /, not " + quote(s)
	case len(s) > longest:
		return "", fmt.Sprintf("path has %d bytes, more than %d", len(s), longest)
	}
	if pattern {
		if _, err := filepath.Match(s, ""); err != nil {
			return "", quote(s) + " is not a valid pattern: [ without ]"
		}
	}
	if s = filepath.Clean(s); s == "/" {
		return "", "must not be /"
	}
	return s, ""
}

// wanted names what a key takes.
func wanted(f field, target any) string {
	if n := len(f.enum); n == 1 {
		return f.enum[0]
	} else if n > 1 {
		return strings.Join(f.enum[:n-1], ", ") + " or " + f.enum[n-1]
	}
	switch target.(type) {
	case *bool:
		return "yes or no"
	case *int:
		return "a number"
	case *Count:
		return "a number or auto"
	case *Size:
		return "a size such as 10MB"
	case *Share:
		return "a share such as 25%"
	case *time.Duration:
		return "a duration such as 5m"
	}
	if f.kind == "path" {
		return "a path"
	}
	return "a text"
}

func describe(n *node) string {
	if n.kind == scalarNode {
		return quote(n.value)
	}
	return n.what()
}

func defaultHint(f field) string {
	if f.def == "" {
		return ""
	}
	return "remove the line for the default, " + f.def
}
