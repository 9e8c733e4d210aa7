package postfix

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"holdfast/queue"
)

// sidecar is what the reference says of a fixture.
type sidecar struct {
	QueueFile string    `json:"queue_file"`
	QueueID   string    `json:"queue_id"`
	Mode      string    `json:"mode"`
	Sizes     []int64   `json:"size_record"`
	Env       omittable `json:"envelope_records"`
	Ext       omittable `json:"extracted_records"`
	Sender    string    `json:"sender"`
	Rcpts     []struct {
		Original string `json:"original_recipient"`
		Address  string `json:"recipient"`
		ORcpt    string `json:"dsn_orig_rcpt"`
		Notify   int    `json:"notify_flags"`
		State    string `json:"state"`
	} `json:"recipients"`
	Content   string `json:"content_sha256"`
	Size      int64  `json:"content_size"`
	Postcat   string `json:"postcat_bh_sha256"`
	Pointers  bool   `json:"has_pointer_records"`
	Identical bool   `json:"flat_rebuild_identical"`
}

// omittable is a list of records, or, for a very long one, a remark in its
// place.
type omittable [][2]string

// UnmarshalJSON takes either.
func (o *omittable) UnmarshalJSON(b []byte) error {
	var remark string
	if json.Unmarshal(b, &remark) == nil {
		return nil
	}
	return json.Unmarshal(b, (*[][2]string)(o))
}

// fixtures returns the queue files of the reference, or, where it is not at
// hand, our own.
func fixtures(t testing.TB) map[string][]byte {
	t.Helper()
	dir := os.Getenv("HOLDFAST_REFERENCE")
	if dir == "" {
		dir = "../../../shared/reference"
	}
	dir += "/queues/postfix"
	if _, err := os.Stat(dir); err != nil {
		dir = "../../testdata/queues/postfix"
	}
	paths, err := filepath.Glob(dir + "/*.queue*")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no fixtures in %s: %v", dir, err)
	}
	out := map[string][]byte{}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		base, gz := strings.CutSuffix(p, ".gz")
		if gz {
			z, err := gzip.NewReader(bytes.NewReader(b))
			if err == nil {
				b, err = io.ReadAll(z)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		out[strings.TrimSuffix(base, ".queue")] = b
	}
	return out
}

func read(b []byte) (*file, error) {
	return parse(bytes.NewReader(b), int64(len(b)), 16<<20, 50_000)
}

func content(t testing.TB, f *file, b []byte) []byte {
	t.Helper()
	out, err := io.ReadAll(f.content(bytes.NewReader(b), int64(len(b))))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// pairs are records as the sidecars write them.
func pairs(rs []record) [][2]string {
	out := [][2]string{}
	for _, r := range rs {
		out = append(out, [2]string{string(r.kind), latin(r.data)})
	}
	return out
}

func latin(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// TestFixtures reads every queue file that real Postfix wrote, and finds what
// its sidecar says.
func TestFixtures(t *testing.T) {
	n := 0
	for path, b := range fixtures(t) {
		n++
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var want sidecar
			if err := json.Unmarshal(text, &want); err != nil {
				t.Fatal(err)
			}
			f, err := read(b)
			if filepath.Base(path) == "maildrop" { // not a finished queue file: pickup's input
				if !errors.Is(err, queue.ErrDamaged) {
					t.Errorf("a maildrop file was accepted: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			check(t, f, b, want)
		})
	}
	if os.Getenv("HOLDFAST_REFERENCE") != "" && n != 47 {
		t.Errorf("%d fixtures", n)
	}
}

func check(t *testing.T, f *file, b []byte, want sidecar) {
	t.Helper()
	if got := pairs(f.env); want.Env != nil && !slices.Equal(got, want.Env) {
		t.Errorf("envelope\n%q, want\n%q", got, want.Env)
	}
	if got := pairs(f.ext); want.Ext != nil && !slices.Equal(got, want.Ext) {
		t.Errorf("extracted\n%q, want\n%q", got, want.Ext)
	}
	s := f.sizes
	if got := []int64{s.content, s.data, s.rcpts, s.flags, s.length, s.utf8}; !reflect.DeepEqual(got, want.Sizes) {
		t.Errorf("sizes %v, want %v", got, want.Sizes)
	}
	text := content(t, f, b)
	if sum(text) != want.Content || sum(text) != want.Postcat || int64(len(text)) != want.Size {
		t.Errorf("content of %d bytes, want %d:\n%.300q", len(text), want.Size, text)
	}
	if f.flat == want.Pointers {
		t.Errorf("flat: %v", f.flat)
	}
	e := f.envelope()
	if latin(e.Sender) != want.Sender {
		t.Errorf("sender %q, want %q", e.Sender, want.Sender)
	}
	var rcpts, wanted []string
	for _, r := range e.Recipients {
		rcpts = append(rcpts, fmt.Sprintf("%s %s %s %s", latin(r.Address), latin(r.ORcpt), latin(r.Original), r.Notify))
	}
	for _, r := range want.Rcpts {
		if r.State == "todo" {
			notify := ""
			if r.Notify != 0 {
				notify = notifyText(fmt.Sprint(r.Notify))
			}
			wanted = append(wanted, fmt.Sprintf("%s %s %s %s", r.Address, r.ORcpt, r.Original, notify))
		}
	}
	if !reflect.DeepEqual(rcpts, wanted) {
		t.Errorf("recipients\n%q, want\n%q", rcpts, wanted)
	}
}

// TestTruncationIsNeverComplete: at every byte of every fixture.
func TestTruncationIsNeverComplete(t *testing.T) {
	for path, b := range fixtures(t) {
		if filepath.Base(path) == "maildrop" {
			continue
		}
		step := 1 // but for the very large
		if len(b) > 100_000 {
			step = len(b) / 500
		}
		for n := 0; n < len(b); n += step {
			_, err := read(b[:n])
			if err == nil {
				t.Fatalf("%s: accepted with %d of %d bytes", path, n, len(b))
			}
			if !errors.Is(err, queue.ErrIncomplete) && !errors.Is(err, queue.ErrDamaged) {
				t.Fatalf("%s cut at %d: %v", path, n, err)
			}
		}
	}
}
