package conf

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// field is a key of the schema: what the tags of a struct's field say.
type field struct {
	index                                   int
	name                                    string // of the struct's field
	key, kind, def, min, max, below, sample string
	words                                   string // of a command, for a hint
	mta                                     string // type of queue that has it; "" is any
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
			below: tag.Get("below"), sample: tag.Get("sample"), words: tag.Get("words"), mta: tag.Get("for"),
			need: tag.Get("need") == "yes", enum: strings.Fields(tag.Get("enum")),
		})
	}
	return all
}

func section(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t != reflect.TypeFor[Command]()
}

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
	mta := queueType(n)
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
		if other := fields[f].mta; other != "" && mta != "" && mta != other {
			d.fail(k.at, join(path, k.value), fmt.Sprintf("%s is of type %s, and %s is for %s", subject(path), mta, quote(k.value), other), "")
			continue
		}
		d.key(fields[f], k.at, value, v.Field(fields[f].index), join(path, k.value))
	}
	for _, f := range fields {
		if _, ok := seen[f.key]; f.need && !ok && path != "" && (f.mta == "" || f.mta == mta) {
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
		for _, f := range fieldsOf(v.Type()) {
			if f.mta != "" && f.mta != string(q.Type) {
				v.Field(f.index).SetZero() // a default that means nothing here
			}
		}
		*queues = append(*queues, q)
		d.named = append(d.named, name{at, base})
	}
}

// queueType is the type that an entry of queues gives itself, "" if it is
// none of those that there are.
func queueType(item *node) string {
	for i := 0; item.kind == mapNode && i < len(item.content); i += 2 {
		if v := item.content[i+1]; item.content[i].value == "type" && v.kind == scalarNode {
			if t := QueueType(v.value); t == Sendmail || t == Postfix {
				return v.value
			}
		}
	}
	return ""
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
