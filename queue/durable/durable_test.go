package durable_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/queue/durable"
	"holdfast/queue/durable/fault"
)

func content(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	dir := t.TempDir()
	var f *durable.FS // nil works
	a, b := dir+"/a", dir+"/b"
	for _, p := range []string{a, b} {
		if err := f.WriteFile(p, 0o600, content(p)); err != nil {
			t.Fatal(err)
		}
	}
	open, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := f.Create(a, 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create: %v", err)
	}
	for what, err := range map[string]error{"write": f.WriteFile(a, 0o600, content("x")), "link": f.Link(open, b), "rename": f.Rename(a, b)} {
		if !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s over an existing file: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"exchange": f.Exchange(a, dir+"/none"), "rename": f.Rename(dir+"/none", dir+"/c"), "unlink": f.Unlink(dir + "/none"),
	} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of nothing: %v", what, err)
		}
	}
	if err := f.Exchange(a, b); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(a); err != nil || string(got) != b {
		t.Errorf("after the exchange: %q, %v", got, err)
	}
	if err := os.Symlink(b, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Create(dir+"/link", 0o600); err == nil {
		t.Error("create followed a link")
	}
}

func TestOwnerAndMode(t *testing.T) {
	var f durable.FS
	tmp, err := f.TmpFile(t.TempDir(), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer tmp.Close()
	if err := tmp.Own(1234, 4321, 0o640); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(tmp.OS().Fd()), &st); err != nil || st.Uid != 1234 || st.Gid != 4321 || st.Mode&0o7777 != 0o640 {
		t.Errorf("%d:%d %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if _, err := f.TmpFile("/nonexistent", 0o600); err == nil {
		t.Error("no error")
	}
}

// TestReplaceIsOldOrNew: killed or without power at any operation, the file
// is there with one of its contents, whole.
func TestReplaceIsOldOrNew(t *testing.T) {
	long := strings.Repeat("new content ", 1000)
	for _, power := range []bool{false, true} {
		points := 0
		for at := 0; ; at++ {
			reached := false
			for choose := 0; ; choose++ {
				dir := t.TempDir()
				root, shadow := dir+"/d", dir+"/shadow"
				for _, d := range []string{root, shadow} {
					if err := os.Mkdir(d, 0o700); err != nil {
						t.Fatal(err)
					}
				}
				path := filepath.Join(root, "file")
				if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path+".new", []byte("left by a crash"), 0o600); err != nil {
					t.Fatal(err)
				}
				p, err := fault.NewPower(shadow, root)
				if err != nil {
					t.Fatal(err)
				}
				hook := &fault.Crash{At: at, Next: p}
				err = (&durable.FS{Hook: hook}).ReplaceFile(path, 0o600, content(long))
				reached = hook.Dead
				if power {
					choices := fault.Choices(p.Pending(), 1)
					if choose >= 2*len(choices) {
						break
					}
					if err := p.Lose(choices[choose/2], fault.Content(1+choose%2)); err != nil {
						t.Fatal(err)
					}
				}
				points++
				got, rerr := os.ReadFile(path)
				if rerr != nil || string(got) != "old" && string(got) != long {
					t.Fatalf("stopped before %q, power %v: %d bytes, %v", hook.Name, power, len(got), rerr)
				}
				if err == nil && string(got) != long {
					t.Fatalf("it said that it was done, and the content is %q", got[:min(len(got), 20)])
				}
				if !power {
					break
				}
			}
			if !reached {
				break
			}
		}
		if points < 5 {
			t.Errorf("only %d points", points)
		}
	}
}

func TestMkdirAllMakesWhatIsMissing(t *testing.T) {
	var f durable.FS
	dir := t.TempDir()
	for range 2 {
		if err := f.MkdirAll(dir+"/a/b/c", 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.MkdirAll(dir+"/file/x", 0o700); err == nil {
		t.Error("a file as a directory")
	}
	if err := f.Rmdir(dir + "/a"); err == nil {
		t.Error("removed a directory that is not empty")
	}
	if err := f.Rmdir(dir + "/a/b/c"); err != nil {
		t.Error(err)
	}
}

func TestAWriteThatFailsIsAnError(t *testing.T) {
	var f durable.FS
	err := f.WriteFile(t.TempDir()+"/x", 0o600, func(io.Writer) error { return fmt.Errorf("no content") })
	if err == nil || !strings.Contains(err.Error(), "no content") {
		t.Errorf("%v", err)
	}
}
