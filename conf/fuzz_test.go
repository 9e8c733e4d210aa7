package conf

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// FuzzParse: what loads is the same after it was written and loaded again;
// what does not load has errors that all stand in one of the files.
func FuzzParse(f *testing.F) {
	names, err := filepath.Glob("testdata/errors/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, []byte("workers: 3\n"))
	}
	f.Add(Example(), []byte("queues: [{name: b, type: sendmail, in: /b*, out: \"/c \\u263a\", kick: [/x, '- y', \"1\"]}]"))
	f.Add([]byte(least), []byte("limits: {depth: 3}\nnewest_share: 0.07\nuser: '12'\nstate: '/a: b #c'\n"))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		files := []Source{{"holdfast.yaml", one}, {"conf.d/1.yaml", two}}
		c, err := Parse(files)
		if err != nil {
			var wrong Errors
			if !errors.As(err, &wrong) || c != nil {
				t.Fatalf("error is %T", err)
			}
			checkErrors(t, files, wrong)
			return
		}
		for key := range c.places {
			at := c.places[key]
			i := 0
			if at.file == files[1].Name {
				i = 1
			}
			if n := strings.Count(string(files[i].Data), "\n") + 1; at.line < 1 || at.line > n {
				t.Errorf("%s is said to be in %s, a file of %d lines", key, c.Pos(key), n)
			}
		}
		again, err := Parse([]Source{{"again.yaml", c.YAML()}})
		if err != nil {
			t.Fatalf("what was written does not load: %v\n%s", err, c.YAML())
		}
		if !reflect.DeepEqual(values(again), values(c)) {
			t.Fatalf("changed by writing and reading:\n%s", diff(again.YAML(), c.YAML()))
		}
	})
}

// FuzzValues: what a user may write as a value is refused, or means the same
// after it was written in its one form.
func FuzzValues(f *testing.F) {
	for _, s := range []string{"10 MiB", "0", "512k", "1h30m", "7d", "25%", "0.07", "1e3", "9223372036854775807B", "007d", "１s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize(s); err == nil {
			if again, err := ParseSize(n.String()); again != n || err != nil || n < 0 {
				t.Errorf("size %q: %d, then %s", s, n, n)
			}
		}
		if d, err := ParseDuration(s); err == nil {
			if again, err := ParseDuration(FormatDuration(d)); again != d || err != nil || d < 0 {
				t.Errorf("duration %q: %d, then %s", s, d, FormatDuration(d))
			}
		}
		if p, err := ParseShare(s); err == nil {
			if again, err := ParseShare(valueText(p)); again != p || err != nil || p < 0 || p > 1 {
				t.Errorf("share %q: %v, then %s", s, p, valueText(p))
			}
		}
	})
}
