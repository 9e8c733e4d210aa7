package conf

import (
	"cmp"
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// field is a key of the schema: what the tags of a struct's field say.
type field struct {
	index                                   int
	name                                    string // of the struct's field
	key, kind, def, min, max, below, sample string
	need                                    bool
	enum                                    []string
}

// fieldsOf returns the keys of a section.
func fieldsOf(t reflect.Type) []field {
	var all []field
	for i := range t.NumField() {
		tag := t.Field(i).Tag
		if tag.Get("key") == "" {
			continue
		}
		all = append(all, field{
			index: i, name: t.Field(i).Name, key: tag.Get("key"), kind: tag.Get("kind"),
			def: tag.Get("default"), min: tag.Get("min"), max: tag.Get("max"),
			below: tag.Get("below"), sample: tag.Get("sample"),
			need: tag.Get("need") == "yes", enum: strings.Fields(tag.Get("enum")),
		})
	}
	return all
}

func section(t reflect.Type) bool { return t.Kind() == reflect.Struct && t != reflect.TypeFor[Kick]() }

// maxErrors bounds what one load reports: a file can hold a wrong key in
// every fourth byte, and nobody reads a thousand errors.
const maxErrors = 200

// Bounds of what is compared with each other.
const (
	maxQueues = 256
	maxDirs   = 1024 // in and out of all queues
)

// decoder fills a Config from the nodes of several files.
type decoder struct {
	conf  *Config
	files []*text
	errs  []Error
	named []name // of conf.Queues, same index
	more  bool   // errors were left out
}

// name is where a queue is named, and the key under which its places are.
type name struct {
	at  place
	key string
}

// fail reports an error at a place. The line's text is added by report.
func (d *decoder) fail(at place, key, message, hint string) {
	if d.full() {
		return
	}
	d.errs = append(d.errs, Error{File: at.file, Line: at.line, Column: at.column, Key: key, Message: message, Hint: hint})
}

// full says that no more errors are taken, and notes that something
// was not checked.
func (d *decoder) full() bool {
	d.more = d.more || len(d.errs) >= maxErrors
	return d.more
}

// report returns all errors by place: files in the order they were given.
func (d *decoder) report() error {
	all := d.errs
	order := map[string]int{}
	for i, f := range d.files {
		order[f.name] = i
		all = append(all, f.errs...)
	}
	if len(all) == 0 {
		return nil
	}
	slices.SortStableFunc(all, func(a, b Error) int {
		return cmp.Or(cmp.Compare(order[a.File], order[b.File]), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if len(all) > maxErrors {
		all, d.more = all[:maxErrors], true
	}
	all = slices.Compact(all)
	for i := range all {
		if lines := d.files[order[all[i].File]].lines; all[i].Text == "" && all[i].Line <= len(lines) {
			all[i].Text = lines[all[i].Line-1]
		}
	}
	if d.more {
		last := &all[len(all)-1]
		last.Message += "; too many errors, the rest was not checked"
	}
	return Errors(all)
}

// setDefaults fills a section with the defaults of the schema.
func setDefaults(v reflect.Value) {
	for _, f := range fieldsOf(v.Type()) {
		switch fv := v.Field(f.index); {
		case section(fv.Type()):
			setDefaults(fv)
		case f.def != "":
			// A default that does not parse is a mistake in the schema, which
			// a test finds: every default is loaded there.
			_ = setText(fv.Addr().Interface(), f.def)
		}
	}
}

// section fills one section from one file.
func (d *decoder) section(n *node, v reflect.Value, path string) {
	if n.kind == badNode || n.null() {
		return // null: all of its keys are commented out
	}
	if n.kind != mapNode {
		d.fail(n.at, path, fmt.Sprintf("%s must be a section of keys, not %s", subject(path), n.what()), "")
		return
	}
	fields := fieldsOf(v.Type())
	seen := map[string]place{}
	for i := 0; i < len(n.content) && !d.full(); i += 2 {
		k, value := n.content[i], n.content[i+1]
		if k.kind == badNode {
			continue
		}
		if k.kind != scalarNode {
			d.fail(k.at, path, fmt.Sprintf("a key must be a word, not %s", k.what()), "")
			continue
		}
		if first, twice := seen[k.value]; twice {
			d.fail(k.at, join(path, printable(cut(k.value))), fmt.Sprintf("key %s is twice in this section: first in line %d", quote(k.value), first.line), "")
			continue
		}
		seen[k.value] = k.at
		f := slices.IndexFunc(fields, func(f field) bool { return f.key == k.value })
		if f < 0 {
			d.unknown(k, fields, path)
			continue
		}
		d.key(fields[f], k.at, value, v.Field(fields[f].index), join(path, k.value))
	}
	for _, f := range fields {
		if _, ok := seen[f.key]; f.need && !ok && path != "" {
			d.fail(n.at, join(path, f.key), fmt.Sprintf("%s has no key %q, which it needs", subject(path), f.key), "")
		}
	}
}

// key fills the field of one key.
func (d *decoder) key(f field, at place, n *node, v reflect.Value, path string) {
	_, isSet := d.conf.places[path]
	if !isSet {
		d.conf.places[path] = at
	}
	if section(v.Type()) {
		d.section(n, v, path)
		return
	}
	if n.kind == badNode {
		return
	}
	if queues, ok := v.Addr().Interface().(*[]Queue); ok {
		d.queues(n, queues, path)
		return
	}
	if isSet {
		d.fail(at, path, fmt.Sprintf("%s is set twice: first in %s", path, d.conf.places[path]), "keep one of the two")
		return
	}
	d.leaf(f, n, v, path)
}

// queues appends the queues of one file.
func (d *decoder) queues(n *node, queues *[]Queue, path string) {
	if n.kind != listNode {
		d.fail(n.at, path, fmt.Sprintf("%s must be a list, not %s", path, n.what()), "each entry begins with a dash: - name: mta")
		return
	}
	for _, item := range n.content {
		if len(*queues) == maxQueues {
			d.fail(item.at, path, fmt.Sprintf("more than %d queues", maxQueues), "")
			return
		}
		if item.kind == badNode {
			continue
		}
		var q Queue
		v := reflect.ValueOf(&q).Elem()
		setDefaults(v)
		if item.null() {
			d.fail(item.at, path, "queue is empty", "")
			continue
		}
		called, at := nameOf(item)
		if called == "" {
			called = fmt.Sprintf("#%d", len(*queues)+1)
		}
		base := join(path, called)
		if first := slices.IndexFunc(*queues, func(o Queue) bool { return o.Name == called }); first >= 0 {
			d.fail(at, base+".name", fmt.Sprintf("queue %s is there twice: first in %s", quote(called), d.named[first].at), "each queue has a name of its own")
			base = fmt.Sprintf("%s#%d", base, len(*queues)+1)
		}
		d.conf.places[base] = item.at
		d.section(item, v, base)
		*queues = append(*queues, q)
		d.named = append(d.named, name{at, base})
	}
}

// nameOf returns the name that an entry of queues gives itself, "" if none,
// and where.
func nameOf(item *node) (string, place) {
	for i := 0; item.kind == mapNode && i < len(item.content); i += 2 {
		if v := item.content[i+1]; item.content[i].value == "name" && v.kind == scalarNode {
			return printable(cut(v.value)), v.at
		}
	}
	return "", item.at
}

// unknown reports a key that the schema does not have here.
func (d *decoder) unknown(k *node, fields []field, path string) {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.key
	}
	hint := ""
	if near := nearest(k.value, names); near != "" {
		hint = fmt.Sprintf("did you mean %q?", near)
	} else if homes := whereIs(reflect.TypeFor[Config](), k.value, ""); len(homes) > 0 {
		hint = fmt.Sprintf("%q belongs here: %s", k.value, strings.Join(homes, ", "))
	} else {
		hint = "keys here: " + strings.Join(names, ", ")
	}
	d.fail(k.at, join(path, printable(cut(k.value))), fmt.Sprintf("unknown key %s in %s", quote(k.value), subject(path)), hint)
}

// whereIs returns the paths of all keys of that name.
func whereIs(t reflect.Type, key, path string) []string {
	var found []string
	for _, f := range fieldsOf(t) {
		ft, fpath := t.Field(f.index).Type, join(path, f.key)
		if f.key == key {
			found = append(found, fpath)
		}
		if ft.Kind() == reflect.Slice && section(ft.Elem()) {
			ft, fpath = ft.Elem(), fpath+".NAME"
		}
		if section(ft) {
			found = append(found, whereIs(ft, key, fpath)...)
		}
	}
	return found
}

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
	case *Kick:
		var k Kick
		k, ok = d.kick(n, bad)
		apply = func() { *p = k }
	default:
		fresh := reflect.New(v.Type())
		ok = d.scalar(f, n, fresh.Interface(), bad)
		apply = func() { v.Set(fresh.Elem()) }
	}
	if ok {
		apply()
	}
}

// kick reads auto, none or a list of words.
func (d *decoder) kick(n *node, bad func(place, string, string)) (Kick, bool) {
	if n.kind == scalarNode && n.value == "auto" {
		return Kick{Auto: true}, true
	}
	if n.kind == scalarNode && n.value == "none" {
		return Kick{}, true
	}
	if n.kind != listNode || len(n.content) == 0 {
		bad(n.at, fmt.Sprintf("must be auto, none or a list of words, not %s", describe(n)), "a command is written as [/usr/sbin/sendmail, -C, /etc/mail/out.cf]")
		return Kick{}, false
	}
	var k Kick
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
		k.Command = append(k.Command, s)
	}
	return k, ok
}

// scalar reads one word into target and checks it.
func (d *decoder) scalar(f field, n *node, target any, bad func(place, string, string)) bool {
	if n.kind == badNode {
		return false
	}
	if n.kind != scalarNode || n.null() {
		bad(n.at, fmt.Sprintf("must be %s, not %s", wanted(f, target), n.what()), "")
		return false
	}
	s, isText := target.(*string)
	isText = isText || len(f.enum) > 0
	switch target.(type) {
	case *int, *bool:
		if n.quoted {
			bad(n.at, fmt.Sprintf("must be %s, not a text", wanted(f, target)), "remove the quotes")
			return false
		}
	}
	number := f.kind == "name" && n.tag == "!!int"
	if isText && len(f.enum) == 0 && n.tag != "!!str" && !number {
		bad(n.at, fmt.Sprintf("must be a text, not %s", n.what()), "write it in quotes: "+strconv.QuoteToASCII(cut(n.value)))
		return false
	}
	if len(f.enum) > 0 && !slices.Contains(f.enum, n.value) {
		hint := ""
		if near := nearest(n.value, f.enum); near != "" {
			hint = fmt.Sprintf("did you mean %q?", near)
		}
		bad(n.at, fmt.Sprintf("must be %s, not %s", wanted(f, target), quote(n.value)), hint)
		return false
	}
	if err := setText(target, n.value); err != nil {
		bad(n.at, err.Error(), "")
		return false
	}
	if message := f.outside(target); message != "" {
		bad(n.at, message, "")
		return false
	}
	if s == nil {
		return true
	}
	clean, message := checkText(f.kind, *s, f.key == "in" || f.key == "out")
	if message != "" {
		bad(n.at, message, "")
		return false
	}
	*s = clean
	return true
}

// setText reads a text into a value of the schema.
func setText(target any, s string) (err error) {
	switch p := target.(type) {
	case *string:
		*p = s
	case *List:
		*p = List{s}
	case *Kick:
		*p = Kick{Auto: s == "auto"}
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

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// subject names a section in a message.
func subject(path string) string {
	if name, ok := strings.CutPrefix(path, "queues."); ok {
		return "queue " + printable(name)
	}
	if path == "" {
		return "the configuration"
	}
	return path
}
