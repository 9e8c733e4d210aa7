package evidence

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSavedEvidenceHoldsMessageAndReason(t *testing.T) {
	d := Dir{Root: filepath.Join(t.TempDir(), "evidence")}
	for range 2 { // a second conviction replaces the first
		dir, err := d.Save("m1", Bundle{Key: "k", Why: "SIGSEGV at part 1.2"}, strings.NewReader("From: x\n\nhi\n"))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(dir, "message"))
		if err != nil || string(got) != "From: x\n\nhi\n" {
			t.Fatalf("message %q, %v", got, err)
		}
		text, err := os.ReadFile(filepath.Join(dir, "evidence.json"))
		if err != nil {
			t.Fatal(err)
		}
		var b Bundle
		if err := json.Unmarshal(text, &b); err != nil || b.Why != "SIGSEGV at part 1.2" {
			t.Fatalf("bundle %+v, %v", b, err)
		}
	}
}

func TestNamesThatLeaveTheDirectoryAreRefused(t *testing.T) {
	d := Dir{Root: t.TempDir()}
	for _, name := range []string{"", "..", "a/b", ".x", "a\x00b"} {
		if _, err := d.Save(name, Bundle{}, nil); err == nil {
			t.Errorf("%q accepted", name)
		}
	}
}

func TestPurgeTakesTheOldAndThenTheOldestOverSize(t *testing.T) {
	d := Dir{Root: t.TempDir()}
	now := time.Now()
	for i, name := range []string{"old", "middle", "new"} {
		dir, err := d.Save(name, Bundle{}, strings.NewReader(strings.Repeat("x", 1000)))
		if err != nil {
			t.Fatal(err)
		}
		at := now.Add(time.Duration(i-3) * 24 * time.Hour)
		if err := os.Chtimes(dir, at, at); err != nil {
			t.Fatal(err)
		}
	}
	gone, err := d.Purge(now, 60*time.Hour, 1<<20)
	if err != nil || !slices.Equal(gone, []string{"old"}) {
		t.Fatalf("by age: %v, %v", gone, err)
	}
	gone, err = d.Purge(now, 60*time.Hour, 1500)
	if err != nil || !slices.Equal(gone, []string{"middle"}) {
		t.Fatalf("by size: %v, %v", gone, err)
	}
}
