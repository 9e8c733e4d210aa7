package conf

import (
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
)

// finish fills in what depends on other keys and checks what concerns more
// than one. It needs no machine: which directories exist is not its matter.
// broken means that a file could not be read at all, so that what is missing
// may well be there.
func (d *decoder) finish(broken bool) {
	c := d.conf
	paths := reflect.ValueOf(&c.Paths).Elem()
	for _, f := range fieldsOf(paths.Type()) {
		if v := paths.Field(f.index); v.String() == "" {
			v.SetString(filepath.Join(c.State, f.below))
		}
	}
	told := slices.ContainsFunc(d.errs, func(e Error) bool { return e.Key == "queues" || e.Hint == `did you mean "queues"?` })
	if len(c.Queues) == 0 && !broken && !told {
		d.wrong("queues", "there is no queue to work on", "the least is: queues: [{name: mta, type: sendmail, in: DIR, out: DIR}], or: queues: [{name: mta, type: postfix, dir: DIR}]")
	}
	d.order()
	d.unscanned()
	d.directories()
}

// wrong reports an error at a key, or, where that is not set, at the nearest
// section above it, or at the first file.
func (d *decoder) wrong(key, message, hint string) {
	at := place{line: 1, column: 1}
	if len(d.files) > 0 {
		at.file = d.files[0].name
	}
	for k := key; k != ""; {
		if p, ok := d.conf.places[k]; ok {
			at = p
			break
		}
		k = k[:max(0, strings.LastIndexByte(k, '.'))]
	}
	d.fail(at, key, message, hint)
}

// order checks pairs of which one must not be less than the other. The error
// stands at the key that is set, the greater one first.
func (d *decoder) order() {
	c := d.conf
	for _, pair := range []struct {
		section, less, more string
		wrong               bool
		a, b                string
	}{
		{"limits.", "memory", "memory_retry", c.Limits.MemoryRetry < c.Limits.Memory, c.Limits.Memory.String(), c.Limits.MemoryRetry.String()},
		{"limits.", "cpu", "wall", c.Limits.Wall < c.Limits.CPU, FormatDuration(c.Limits.CPU), FormatDuration(c.Limits.Wall)},
		{"alarm.", "warning", "urgent", c.Alarm.Urgent < c.Alarm.Warning, FormatDuration(c.Alarm.Warning), FormatDuration(c.Alarm.Urgent)},
	} {
		if !pair.wrong {
			continue
		}
		key := pair.section + pair.more
		if _, ok := c.places[key]; !ok {
			key = pair.section + pair.less
		}
		d.wrong(key, fmt.Sprintf("%s%s (%s) must not be below %s (%s)", pair.section, pair.more, pair.b, pair.less, pair.a), "")
	}
}

// unscanned demands the operator's word for what delivers mail that nothing
// has looked at.
func (d *decoder) unscanned() {
	p := d.conf.Policy
	if p.DeliverUnscanned {
		return
	}
	for _, one := range []struct {
		key    string
		action Action
	}{{"policy.unscannable", p.Unscannable}, {"policy.convicted", p.Convicted}} {
		if one.action == Release {
			d.wrong(one.key, one.key+": release would deliver mail that nothing has looked at", "if that is what you want, say so: policy: {deliver_unscanned: yes}")
		}
	}
}

// dir is a directory with the key that names it.
type dir struct{ path, key, what string }

// directories refuses directories that would get in each other's way, as far
// as their names show it.
func (d *decoder) directories() {
	c := d.conf
	var in, out []dir
	for i, q := range c.Queues {
		if q.Name == "" {
			continue // already reported
		}
		base := d.named[i].key
		for _, p := range q.In {
			in = append(in, dir{p, base + ".in", "the inbound side of queue " + q.Name})
		}
		for _, p := range q.Out {
			out = append(out, dir{p, base + ".out", "the outbound side of queue " + q.Name})
		}
		if q.Dir != "" {
			in = append(in, dir{q.Dir, base + ".dir", "the queue directory of queue " + q.Name})
		}
	}
	if len(in)+len(out) > maxDirs {
		d.wrong("queues", fmt.Sprintf("more than %d directories", maxDirs), "write them as patterns")
		return
	}
	for i, a := range in {
		for _, b := range in[:i] {
			d.apart(a, b)
		}
		for _, b := range out {
			d.apart(b, a)
		}
	}
	d.own([]dir{
		{c.Paths.Work, "paths.work", "the work directory"},
		{c.Paths.Outbox, "paths.outbox", "the outbox"},
		{c.Paths.Quarantine, "paths.quarantine", "the quarantine"},
		{c.Paths.History, "paths.history", "the history"},
		{c.Paths.Evidence, "paths.evidence", "the evidence"},
		{c.Paths.Ledger, "paths.ledger", "the ledger"},
		{c.Paths.Control, "paths.control", "the control socket"},
	}, append(in, out...))
	d.socket()
}

// socket refuses a name that no socket can have.
func (d *decoder) socket() {
	control := d.conf.Paths.Control
	const longest = 107 // sun_path of unix(7) without its NUL
	if n := len(control); n > longest {
		d.wrong(d.setKey("paths.control"), fmt.Sprintf("the control socket %s has a name of %d bytes, more than the %d that a socket can have", quote(control), n, longest), "set paths.control to a short path, such as /run/holdfast/control.sock")
	}
}

// own checks the places of our own data against each other and the queues.
func (d *decoder) own(own, queues []dir) {
	state := dir{d.conf.State, "state", "the state directory"}
	for _, q := range queues {
		if inside(state.path, q.path) {
			d.wrong("state", fmt.Sprintf("the state directory %s is %s", quote(state.path), within(state, q)), "an MTA would take its files for mail")
		}
	}
	for i, a := range own {
		for _, b := range own[:i] {
			d.apart(a, b)
		}
		for _, q := range queues {
			if !inside(state.path, q.path) {
				d.apart(a, q)
			}
		}
	}
}

// setKey returns the key, or state if it has its default from there.
func (d *decoder) setKey(key string) string {
	if _, ok := d.conf.places[key]; !ok && strings.HasPrefix(key, "paths.") {
		return "state"
	}
	return key
}

// apart refuses two directories of which one is, or is inside, the other.
func (d *decoder) apart(a, b dir) {
	if inside(b.path, a.path) && !inside(a.path, b.path) {
		a, b = b, a
	}
	if !inside(a.path, b.path) {
		return
	}
	hint := ""
	if a.key != b.key {
		hint = fmt.Sprintf("%s is set in %s", b.what, d.where(b.key))
	}
	d.wrong(d.setKey(a.key), fmt.Sprintf("%s %s is %s", a.what, quote(a.path), within(a, b)), hint)
}

func (d *decoder) where(key string) string { return d.conf.Pos(d.setKey(key)) }

func within(a, b dir) string {
	switch {
	case !inside(b.path, a.path):
		return fmt.Sprintf("inside %s, %s", b.what, quote(b.path))
	case a.key == b.key:
		return "there twice"
	}
	return "also " + b.what
}

// inside says whether a is b or below it. Either may be a shell pattern: a
// name and a pattern that matches it are the same. Two different patterns
// count as different, since only the machine can tell.
func inside(a, b string) bool {
	as, bs := strings.Split(a, "/"), strings.Split(b, "/")
	if len(as) < len(bs) {
		return false
	}
	for i := range bs {
		ab, _ := filepath.Match(as[i], bs[i]) // valid: checkPath has seen them
		ba, _ := filepath.Match(bs[i], as[i])
		if as[i] != bs[i] && !ab && !ba {
			return false
		}
	}
	return true
}
