package conf

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

// TestErrors compares what a user sees for each file of testdata/errors
// (with NAME.d/*.yaml as its conf.d) with NAME.err.
func TestErrors(t *testing.T) {
	names, err := filepath.Glob("testdata/errors/*.yaml")
	if err != nil || len(names) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, name := range names {
		base := strings.TrimSuffix(name, ".yaml")
		t.Run(filepath.Base(base), func(t *testing.T) {
			more, err := filepath.Glob(base + ".d/*.yaml")
			if err != nil {
				t.Fatal(err)
			}
			var texts []string
			for _, file := range append([]string{name}, more...) {
				data, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				texts = append(texts, string(data))
			}
			files := sources(texts...)
			c, err := Parse(files)
			var wrong Errors
			if !errors.As(err, &wrong) || c != nil {
				t.Fatalf("got %v and error %v, want Errors", c, err)
			}
			checkErrors(t, files, wrong)
			golden(t, base+".err", []byte(wrong.Format()))
		})
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s (see -update):\n%s\n--- got ---\n%s", file, diff(got, want), got)
	}
}

// checkErrors demands of errors that each has a place within its file, that
// they are in order, and that they are fit for a terminal.
func checkErrors(t *testing.T, files []Source, wrong Errors) {
	t.Helper()
	if len(wrong) == 0 || len(wrong) > maxErrors {
		t.Fatalf("%d errors", len(wrong))
	}
	order, split := map[string]int{}, make([][]string, len(files))
	for i, f := range files {
		order[f.Name] = i
		split[i] = strings.Split(strings.ReplaceAll(strings.TrimPrefix(string(f.Data), "\ufeff"), "\r\n", "\n"), "\n")
	}
	var last Error
	for i, e := range wrong {
		at, ok := order[e.File]
		if !ok {
			t.Fatalf("error names no file: %+v", e)
		}
		lines := split[at]
		if e.Line < 1 || e.Line > len(lines) || e.Column < 1 || e.Column > len([]rune(lines[e.Line-1]))+1 {
			t.Errorf("place is not in the file of %d lines: %s", len(lines), e.Error())
		}
		if len(files[at].Data) <= maxFile && e.Text != lines[e.Line-1] {
			t.Errorf("line %d is %q, not %q", e.Line, lines[e.Line-1], e.Text)
		}
		if i > 0 && (at < order[last.File] || at == order[last.File] && (e.Line < last.Line || e.Line == last.Line && e.Column < last.Column)) {
			t.Errorf("not sorted by place: %s after %s", e.Error(), last.Error())
		}
		if e.Message == "" {
			t.Errorf("no message: %+v", e)
		}
		last = e
	}
	for _, shown := range []string{wrong.Format(), wrong.Error()} {
		for _, r := range shown {
			if r != '\n' && !unicode.IsGraphic(r) {
				t.Fatalf("U+%04X in what is shown: %q", r, shown)
			}
		}
	}
}
