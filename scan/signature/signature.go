// Package signature finds the test strings of virus and spam scanners in a
// stream: EICAR's anti-virus test file and GTUBE.
package signature

import (
	"bytes"
	"sync"
)

// The strings are kept apart here, so that no scanner takes this program for
// what it looks for.
var patterns = []struct{ rule, text string }{
	{"signature/eicar", `X5O!P%@AP[4\PZX54(P^)7CC)7}$` + "EICAR-STANDARD-" + "ANTIVIRUS-TEST-FILE!$H+H*"},
	{"signature/gtube", "XJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-" + "ANTI-UBE-TEST-EMAIL*C.34X"},
}

// forms are the patterns as bytes: in ASCII, and in UTF-16.
var forms = sync.OnceValue(func() (out []form) {
	for _, p := range patterns {
		little := make([]byte, 0, 2*len(p.text))
		for i := range len(p.text) {
			little = append(little, p.text[i], 0)
		}
		// Without the last NUL it is in both orders of UTF-16.
		out = append(out, form{p.rule, []byte(p.text)}, form{p.rule, little[:len(little)-1]})
	}
	return out
})

type form struct {
	rule string
	text []byte
}

// Matcher looks through a stream; the zero value is ready.
type Matcher struct {
	tail  []byte
	found []string
}

// keep is the longest pattern less one byte: a match may straddle two writes.
func keep() int {
	n := 0
	for _, f := range forms() {
		n = max(n, len(f.text)-1)
	}
	return n
}

// Write looks at the next bytes.
func (m *Matcher) Write(p []byte) (int, error) {
	k := keep()
	window := append(m.tail, p[:min(len(p), k)]...)
	m.look(window)
	m.look(p)
	if len(p) >= k {
		m.tail = append(m.tail[:0], p[len(p)-k:]...)
	} else {
		m.tail = append([]byte(nil), window[max(0, len(window)-k):]...)
	}
	return len(p), nil
}

func (m *Matcher) look(b []byte) {
	for _, f := range forms() {
		if bytes.Contains(b, f.text) && !m.has(f.rule) {
			m.found = append(m.found, f.rule)
		}
	}
}

func (m *Matcher) has(rule string) bool {
	for _, f := range m.found {
		if f == rule {
			return true
		}
	}
	return false
}

// Found returns the rules that matched.
func (m *Matcher) Found() []string { return m.found }
