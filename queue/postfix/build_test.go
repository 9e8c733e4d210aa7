package postfix

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"holdfast/queue"
)

// rebuilt is a file made from f, in memory.
func rebuilt(t testing.TB, f *file, text io.Reader, k keep, fresh time.Time) []byte {
	t.Helper()
	var out bytes.Buffer
	err := f.build(&out, func(b []byte) error { copy(out.Bytes(), b); return nil }, text, k, fresh, "")
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestRebuild: a rebuilt file is byte-identical where the reference says so,
// and the same records and content everywhere.
func TestRebuild(t *testing.T) {
	for path, b := range fixtures(t) {
		f, err := read(b)
		if err != nil {
			continue
		}
		text, err := os.ReadFile(path + ".json")
		if err != nil {
			t.Fatal(err)
		}
		var want sidecar
		if err := json.Unmarshal(text, &want); err != nil {
			t.Fatal(err)
		}
		body := content(t, f, b)
		got := rebuilt(t, f, bytes.NewReader(body), nil, time.Time{})
		name := filepath.Base(path)
		if want.Identical && !bytes.Equal(got, b) {
			t.Errorf("%s: not identical", name)
		}
		again, err := read(got)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !reflect.DeepEqual(pairs(again.env), pairs(f.env)) || !reflect.DeepEqual(pairs(again.ext), pairs(f.ext)) || !again.flat {
			t.Errorf("%s: other records", name)
		}
		if !bytes.Equal(content(t, again, got), body) {
			t.Errorf("%s: other content", name)
		}
	}
}

// TestSplitKeepsWhatBelongsToARecipient: its DSN parameters and original
// address go with it, and nobody else's.
func TestSplitKeepsWhatBelongsToARecipient(t *testing.T) {
	for path, b := range fixtures(t) {
		f, err := read(b)
		if err != nil {
			continue
		}
		all := f.envelope()
		for i := range min(len(all.Recipients), 5) {
			got := rebuilt(t, f, strings.NewReader("Subject: x\n\nother\n"), func(n int) bool { return n == i }, time.Unix(1800000000, 123456000))
			again, err := read(got)
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			e := again.envelope()
			want := all
			want.Recipients = all.Recipients[i : i+1]
			want.Arrived = time.Unix(1800000000, 123456000)
			if !reflect.DeepEqual(e, want) {
				t.Errorf("%s: %+v, want %+v", filepath.Base(path), e, want)
			}
			if again.sizes.rcpts != 1 {
				t.Errorf("%s: counts %d recipients", filepath.Base(path), again.sizes.rcpts)
			}
			for _, r := range again.all() {
				if r.kind == recDone || r.kind == recCancel {
					t.Errorf("%s: a recipient that is done with", filepath.Base(path))
				}
			}
		}
	}
}

func TestLinesBecomeRecords(t *testing.T) {
	long := strings.Repeat("x", lineLength)
	for text, want := range map[string]string{
		"":                 "",
		"\n":               "N0",
		"a\nb\n":           "N1 N1",
		"a":                "N1",
		long + "\n":        "L2048 N0",
		long + "y\n":       "L2048 N1",
		long + long + "\n": "L2048 L2048 N0",
		long:               "L2048 N0",
		long + "y":         "L2048 N1",
		"a\r\x00\n":        "N3",
	} {
		var out bytes.Buffer
		if err := writeRecords(&out, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		b := out.Bytes()
		c := &cursor{r: bytes.NewReader(b), size: int64(len(b))}
		var got []string
		for c.at < c.size {
			kind, data, err := c.physical()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%c%d", kind, len(data)))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%.10q (%d bytes): %v, want %s", text, len(text), got, want)
		}
	}
}

func TestEdited(t *testing.T) {
	add := []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "X-New", Value: "v"}}
	for name, c := range map[string]struct {
		in   string
		e    *queue.Edit
		want string
	}{
		"none":                   {"A: 1\n\nbody\n", nil, "A: 1\n\nbody\n"},
		"header":                 {"A: 1\n\nbody\n", &queue.Edit{Header: add}, "A: 1\nX-New: v\n\nbody\n"},
		"no blank line":          {"A: 1\n", &queue.Edit{Header: add}, "A: 1\nX-New: v\n"},
		"no header":              {"\nbody\n", &queue.Edit{Header: add}, "X-New: v\n\nbody\n"},
		"body":                   {"A: 1\n\nbody\n", &queue.Edit{Body: strings.NewReader("other\n")}, "A: 1\n\nother\n"},
		"body, no blank line":    {"A: 1\n", &queue.Edit{Body: strings.NewReader("other\n")}, "A: 1\n\nother\n"},
		"a value of three lines": {"A: 1\n\n", &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: "B", Value: "1\nRcpt: x\r\n y\x00"}}}, "A: 1\nB: 1\n\tRcpt: x\n y\n\n"},
		"replace, remove, prepend": {
			"A: 1\n 2\nB: 3\na : 4\n\nbody\n",
			&queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderReplace, Name: "a", Value: "9"}, {Op: queue.HeaderRemove, Name: "B"}, {Op: queue.HeaderPrepend, Name: "First", Value: "x"}}},
			"First: x\na: 9\n\nbody\n",
		},
	} {
		r, err := edited(strings.NewReader(c.in), c.e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, c.want)
		}
	}
	for _, bad := range []string{"", "a b", "a:", "a\n"} {
		if _, err := edited(strings.NewReader("A: 1\n\n"), &queue.Edit{Header: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: bad}}}); err == nil {
			t.Errorf("the field name %q was accepted", bad)
		}
	}
}

// FuzzQueueFile: what is accepted is read the same after it was rebuilt, and
// nothing costs more than its size.
func FuzzQueueFile(f *testing.F) {
	for _, b := range fixtures(f) {
		if len(b) < 20_000 {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := read(b)
		if err != nil {
			return
		}
		body := content(t, x, b)
		if len(body) > 2*len(b) {
			t.Fatalf("%d bytes of content out of %d", len(body), len(b))
		}
		if x.sizes.fields != fullSizes {
			return
		}
		got := rebuilt(t, x, bytes.NewReader(body), nil, time.Time{})
		again, err := read(got)
		if err != nil {
			t.Fatalf("what was written is not accepted: %v", err)
		}
		if !reflect.DeepEqual(again.all(), x.all()) {
			t.Fatalf("records\n%q, were\n%q", again.all(), x.all())
		}
		text := content(t, again, got)
		if len(body) > 0 && body[len(body)-1] != '\n' {
			body = append(body, '\n')
		}
		if !bytes.Equal(text, body) {
			t.Fatalf("content %q, was %q", text, body)
		}
	})
}
