package sendmail

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"holdfast/queue"
)

// macroName is the $ line that carries a decision. Macro lines never come
// from the wire, and a runner ignores names that it does not know.
const macroName = "{holdfast}"

// marker is a decision written into a control file (CUSTODY 2): what was
// prepared, by inode, and what is to be done with it.
type marker struct {
	token  string // this installation's
	self   uint64 // inode of the control file that carries the marker
	orig   uint64 // inode of the original control file
	df     uint64 // inode of the original data file
	final  string // publish or remove: the last step for the original id
	groups []prepared
}

// prepared is one group of a decided plan.
type prepared struct {
	do   queue.Disposition
	id   string // Release: queue id on the outbound side
	qf   uint64 // Release: inode of the control file
	df   uint64 // Release: inode of the data file
	item string // Quarantine: name of the item
}

const (
	finalPublish = "publish"
	finalRemove  = "remove"
)

func (m marker) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "1 token=%s self=%d orig=%d df=%d final=%s", m.token, m.self, m.orig, m.df, m.final)
	for _, g := range m.groups {
		fmt.Fprintf(&b, " %s=%s,%d,%d", g.do, g.id+g.item, g.qf, g.df)
	}
	return b.String()
}

var errMarker = errors.New("not a marker of this version")

// parseMarker reads what String wrote.
func parseMarker(s string) (marker, error) {
	var m marker
	words := strings.Split(s, " ")
	if len(words) < 7 || words[0] != "1" {
		return m, errMarker
	}
	for _, w := range words[1:] {
		key, v, ok := strings.Cut(w, "=")
		if !ok {
			return m, errMarker
		}
		var err error
		switch key {
		case "token":
			m.token = v
		case "self":
			m.self, err = strconv.ParseUint(v, 10, 64)
		case "orig":
			m.orig, err = strconv.ParseUint(v, 10, 64)
		case "df":
			m.df, err = strconv.ParseUint(v, 10, 64)
		case "final":
			m.final = v
		default:
			var g prepared
			g, err = parsePrepared(key, v)
			m.groups = append(m.groups, g)
		}
		if err != nil {
			return m, errMarker
		}
	}
	if m.final != finalPublish && m.final != finalRemove || len(m.token) == 0 || len(m.groups) == 0 || m.self == 0 {
		return m, errMarker
	}
	return m, nil
}

func parsePrepared(key, v string) (prepared, error) {
	g := prepared{do: queue.Disposition(key)}
	f := strings.Split(v, ",")
	if len(f) != 3 {
		return g, errMarker
	}
	var err, err2 error
	g.qf, err = strconv.ParseUint(f[1], 10, 64)
	g.df, err2 = strconv.ParseUint(f[2], 10, 64)
	if err != nil || err2 != nil {
		return g, errMarker
	}
	switch g.do {
	case queue.Release:
		g.id = f[0]
		if !validID(g.id) {
			return g, errMarker
		}
	case queue.Quarantine:
		g.item = f[0]
	case queue.Drop:
	default:
		return g, errMarker
	}
	return g, nil
}

// marker returns the marker in a control file. Whose it is its reader checks.
func (c *control) marker() (marker, bool) {
	v, ok := c.macro(macroName)
	if !ok {
		return marker{}, false
	}
	m, err := parseMarker(string(v))
	return m, err == nil
}
