package signature

import (
	"bytes"
	"math/rand"
	"slices"
	"testing"
)

func TestAMatchMayStraddleWrites(t *testing.T) {
	for _, p := range patterns {
		text := []byte("some text before " + p.text + " and after")
		for cut := range text {
			var m Matcher
			for _, piece := range [][]byte{text[:cut], text[cut:]} {
				if n, err := m.Write(piece); n != len(piece) || err != nil {
					t.Fatal(n, err)
				}
			}
			if !slices.Equal(m.Found(), []string{p.rule}) {
				t.Fatalf("%s cut at %d: %v", p.rule, cut, m.Found())
			}
		}
		var m Matcher
		for i := range text { // byte by byte
			if _, err := m.Write(text[i : i+1]); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(m.Found(), []string{p.rule}) {
			t.Errorf("%s byte by byte: %v", p.rule, m.Found())
		}
	}
}

// FuzzMatcher: any cutting of a stream finds what a look at the whole finds.
func FuzzMatcher(f *testing.F) {
	f.Add([]byte("x"+patterns[0].text), int64(1))
	f.Add([]byte(patterns[1].text+patterns[0].text), int64(2))
	f.Fuzz(func(t *testing.T, b []byte, seed int64) {
		r := rand.New(rand.NewSource(seed))
		var m Matcher
		for rest := b; len(rest) > 0; {
			n := 1 + r.Intn(min(len(rest), 100))
			if _, err := m.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		for _, p := range patterns {
			if got, want := slices.Contains(m.Found(), p.rule), bytes.Contains(b, []byte(p.text)); got != want {
				t.Fatalf("%s: found %v, is there %v", p.rule, got, want)
			}
		}
	})
}
