package recorder

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary becomes the process that dies.
func TestMain(m *testing.M) {
	if path := os.Getenv("RECORDER_TEST"); path != "" {
		r, _, err := Open(path)
		if err == nil {
			err = r.Stamp("parse", os.Getenv("RECORDER_ITEM"))
		}
		if err != nil {
			os.Exit(1)
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	os.Exit(m.Run())
}

func die(t *testing.T, path, item string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "RECORDER_TEST="+path, "RECORDER_ITEM="+item)
	if err := cmd.Run(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("it did not die: %v", err)
	}
}

func last(t *testing.T, path string) Last {
	t.Helper()
	r, l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestAStampOutlivesItsWriterAndDeathsAreCounted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "recorder")
	if l := last(t, path); l != (Last{}) {
		t.Fatalf("a new one says %+v", l)
	}
	die(t, path, "m1") // each life opens the recorder first, and so counts the one before
	die(t, path, "m1")
	if l := last(t, path); l != (Last{"parse", "m1", 2}) {
		t.Errorf("%+v", l)
	}
	if l := last(t, path); l.Item != "" {
		t.Errorf("an orderly life leaves %+v", l)
	}
	die(t, path, "m2")
	if l := last(t, path); l != (Last{"parse", "m2", 1}) {
		t.Errorf("another item: %+v", l)
	}
}

// TestDeathsWithAnOrderlyLifeBetweenAreNotInARow: they never add up to guilt.
func TestDeathsWithAnOrderlyLifeBetweenAreNotInARow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "recorder")
	for range 3 {
		die(t, path, "m1")
		if l := last(t, path); l != (Last{"parse", "m1", 1}) {
			t.Errorf("%+v", l)
		}
		last(t, path) // a life with nothing stamped at its end
	}
}

func TestATornRecordIsNoAccusation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "recorder")
	die(t, path, "m1")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range b {
		torn := append([]byte(nil), b...)
		torn[at] ^= 0x55
		if err := os.WriteFile(path, torn, 0o600); err != nil {
			t.Fatal(err)
		}
		if l := last(t, path); l.Item != "" && l.Item != "m1" {
			t.Fatalf("byte %d changed: %+v", at, l)
		}
	}
	for n := range len(b) {
		if err := os.WriteFile(path, b[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if l := last(t, path); l.Item != "" && l.Item != "m1" {
			t.Fatalf("cut at %d: %+v", n, l)
		}
	}
}

func TestALongItemIsCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "recorder")
	r, _, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 10_000)
	if err := r.Stamp(long, long); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if l := last(t, path); l.Item != long[:maxItem] || l.Step != long[:maxStep] {
		t.Errorf("%d and %d bytes", len(l.Step), len(l.Item))
	}
}

func BenchmarkStamp(b *testing.B) {
	r, _, err := Open(filepath.Join(b.TempDir(), "recorder"))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := r.Stamp("parse", "mta\x00/var/spool/mqueue.in\x006ANC000001000790"); err != nil {
			b.Fatal(err)
		}
	}
}
