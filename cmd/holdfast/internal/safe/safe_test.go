package safe

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", "gr\u00fc\u00dfe \u4e16\u754c": "gr\u00fc\u00dfe \u4e16\u754c", "a\x1b[31mb": `a\x1b[31mb`, "a\nb\tc": `a\nb\tc`,
		"\u202egnp.exe": `\u{202e}gnp.exe`, "\xff\xc3": `\xff\xc3`, "\u0085": `\u{85}`, `back\slash`: `back\\slash`, "\u200b\ufeff\u2028": `\u{200b}\u{feff}\u{2028}`,
		"\U000e0041": `\u{e0041}`, "\u2066x\u2069": `\u{2066}x\u{2069}`,
	} {
		if got := Text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestATableIsAlignedByWhatItShows(t *testing.T) {
	table := NewTable("A", "B")
	table.Row("\u4e16\u754c", "x")
	table.Row("abc", "y\x1b[2J")
	var b bytes.Buffer
	if err := table.Write(&b); err != nil {
		t.Fatal(err)
	}
	if want := "A     B\n\u4e16\u754c  x\nabc   y\\x1b[2J\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
	if got := Cut("\u4e16\u754c\u4e16", 4); Width(got) > 4 || !strings.HasSuffix(got, "\u2026") {
		t.Errorf("%q", got)
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\x1b\u202e\xff")
	f.Fuzz(func(t *testing.T, s string) {
		got := Text(s)
		if !utf8.ValidString(got) {
			t.Fatalf("%q", got)
		}
		for _, r := range got {
			if hostile(r) {
				t.Fatalf("%q lets %U through", s, r)
			}
		}
		if c := Cut(got, 10); Width(c) > 10 {
			t.Fatalf("%q is %d wide", c, Width(c))
		}
	})
}

func FuzzJSON(f *testing.F) {
	f.Add("a\x1b\u202e\U000e0041")
	f.Fuzz(func(t *testing.T, s string) {
		var b bytes.Buffer
		if err := WriteJSON(&b, s); err != nil {
			t.Fatal(err)
		}
		var back string
		if err := json.Unmarshal(b.Bytes(), &back); err != nil || back != strings.ToValidUTF8(s, "\ufffd") && utf8.ValidString(s) {
			t.Fatalf("%q became %q, %v", s, back, err)
		}
		for _, r := range strings.TrimSuffix(b.String(), "\n") {
			if hostile(r) && r != utf8.RuneError {
				t.Fatalf("%q lets %U through", b.String(), r)
			}
		}
	})
}
