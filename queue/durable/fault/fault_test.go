package fault

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/queue/durable"
)

// A toy of the real thing: a body and a control file go from one directory
// to another. Planted bugs must be caught, or the harness is broken.

type step func(f *durable.FS, in, out string) error

func linkBody(f *durable.FS, in, out string) error {
	b, err := os.Open(in + "/body")
	if err != nil {
		return err
	}
	defer b.Close()
	return f.Link(b, out+"/body")
}

func syncOut(f *durable.FS, _, out string) error { return f.FsyncDir(out) }

func moveControl(f *durable.FS, in, out string) error { return f.Rename(in+"/control", out+"/control") }

func syncBoth(f *durable.FS, in, out string) error {
	return errors.Join(f.FsyncDir(out), f.FsyncDir(in))
}

func dropBody(f *durable.FS, in, _ string) error { return f.Unlink(in + "/body") }

// newBody writes a body of its own instead of linking the old one.
func newBody(sync bool) step {
	return func(f *durable.FS, _, out string) error {
		t, err := f.TmpFile(out, 0o600)
		if err != nil {
			return err
		}
		defer t.Close()
		if _, err := t.Write([]byte("the body, which is long enough to be torn")); err != nil {
			return err
		}
		if sync {
			if err := t.Fsync(); err != nil {
				return err
			}
		}
		return f.Link(t.OS(), out+"/body")
	}
}

const text = "the body, which is long enough to be torn"

func setUp(t *testing.T) (dir, in, out string) {
	t.Helper()
	dir = t.TempDir()
	in, out = dir+"/in", dir+"/out"
	for _, d := range []string{in, out, dir + "/shadow"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, s := range map[string]string{"body": text, "control": "c"} {
		if err := os.WriteFile(in+"/"+name, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, in, out
}

// whole says in how many places the message is complete, and whether a
// control file stands without its whole body: then a runner would lose it.
func whole(dirs ...string) (n int, lost bool) {
	for _, d := range dirs {
		if _, err := os.Stat(d + "/control"); err != nil {
			continue
		}
		b, err := os.ReadFile(d + "/body")
		if err != nil || string(b) != text {
			lost = true
			continue
		}
		n++
	}
	return n, lost
}

func drive(t *testing.T, steps []step, at int, power bool, choose int) (ops int, caught string) {
	t.Helper()
	dir, in, out := setUp(t)
	hook := &Crash{At: at}
	var p *Power
	if power {
		var err error
		if p, err = NewPower(dir+"/shadow", in, out); err != nil {
			t.Fatal(err)
		}
		hook.Next = p
	}
	f := &durable.FS{Hook: hook}
	for _, s := range steps {
		if err := s(f, in, out); err != nil {
			break
		}
	}
	if power {
		choices := Choices(p.Pending(), 1)
		if choose >= 2*len(choices) {
			return hook.N, "no more"
		}
		if err := p.Lose(choices[choose/2], Content(1+choose%2)); err != nil {
			t.Fatal(err)
		}
	}
	n, lost := whole(in, out)
	switch {
	case lost:
		caught = "a control file without its body"
	case n == 0:
		caught = "lost"
	case n > 1:
		caught = "doubled"
	}
	return hook.N, caught
}

// hunt runs every injection point and says what it caught first.
func hunt(t *testing.T, steps []step, power bool) string {
	t.Helper()
	ops, caught := drive(t, steps, -1, false, 0)
	if caught != "" {
		return "clean run: " + caught
	}
	for at := range ops + 1 {
		for choose := 0; ; choose++ {
			_, caught := drive(t, steps, at, power, choose)
			if caught == "no more" {
				break
			}
			if caught != "" {
				return fmt.Sprintf("operation %d: %s", at, caught)
			}
			if !power {
				break
			}
		}
	}
	return ""
}

func TestPlantedBugsAreCaught(t *testing.T) {
	for _, c := range []struct {
		name        string
		steps       []step
		kill, power bool // caught by
	}{
		{"correct", []step{linkBody, syncOut, moveControl, syncBoth, dropBody}, false, false},
		{"correct with a new body", []step{newBody(true), syncOut, moveControl, syncBoth, dropBody}, false, false},
		{"control before body", []step{moveControl, linkBody, syncBoth, dropBody}, true, true},
		{"no fsync of the directory before the control file", []step{linkBody, moveControl, syncBoth, dropBody}, false, true},
		{"no fsync of the new body", []step{newBody(false), syncOut, moveControl, syncBoth, dropBody}, false, true},
		{"body dropped before it is sure", []step{linkBody, syncOut, moveControl, dropBody, syncBoth}, false, true},
		{"body dropped first", []step{dropBody, linkBody, moveControl, syncBoth}, true, true},
	} {
		if got := hunt(t, c.steps, false); (got != "") != c.kill {
			t.Errorf("%s, by kills: %q", c.name, got)
		}
		if got := hunt(t, c.steps, true); (got != "") != c.power {
			t.Errorf("%s, by power loss: %q", c.name, got)
		}
	}
}

func TestAFailedOperationFailsOnce(t *testing.T) {
	_, in, out := setUp(t)
	hook := &Fail{At: 0, Err: unix.ENOSPC}
	f := &durable.FS{Hook: hook}
	if err := linkBody(f, in, out); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v", err)
	}
	if err := linkBody(f, in, out); err != nil {
		t.Errorf("the second try: %v", err)
	}
}

func TestPowerKeepsInodesAndDirectories(t *testing.T) {
	dir, in, out := setUp(t)
	p, err := NewPower(dir+"/shadow", in, out)
	if err != nil {
		t.Fatal(err)
	}
	f := &durable.FS{Hook: p}
	for _, err := range []error{f.Mkdir(in+"/item", 0o700), f.WriteFile(in+"/item/a", 0o600, writeX), f.FsyncDir(in), f.Rename(in+"/item", out+"/item")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var before, after unix.Stat_t
	if err := unix.Stat(out+"/item/a", &before); err != nil {
		t.Fatal(err)
	}
	if err := p.Lose(make([]bool, p.Pending()), Missing); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(in+"/item/a", &after); err != nil || before.Ino != after.Ino || after.Nlink != 1 {
		t.Errorf("%v: inode %d became %d, %d links", err, before.Ino, after.Ino, after.Nlink)
	}
}

func writeX(w io.Writer) error {
	_, err := w.Write([]byte("x"))
	return err
}
