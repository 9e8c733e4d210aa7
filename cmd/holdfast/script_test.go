package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.etcd.io/bbolt"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/sample"
)

// TestScripts runs testdata/script: each command as a postmaster types it,
// against the real program.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", filepath.Dir(normal)+":"+os.Getenv("PATH"))
			env.Setenv("HOLDFAST", normal)
			env.Setenv("TZ", "UTC")
			env.Setenv("SUDO_USER", "postmaster")
			if err := os.Chmod(env.WorkDir, 0o755); err != nil {
				return err
			}
			for _, d := range []string{"in", "out"} {
				if err := os.Mkdir(filepath.Join(env.WorkDir, d), 0o700); err != nil {
					return err
				}
			}
			config := fmt.Sprintf("state: %[1]s/state\nqueues: [{name: mta, type: sendmail, in: %[1]s/in, out: %[1]s/out, kick: none}]\nmin_free: 1MB\n", env.WorkDir)
			return os.WriteFile(filepath.Join(env.WorkDir, "c.yaml"), []byte(config), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"samples": scriptSamples, "hostile": scriptHostile, "item": scriptItem, "up": scriptUp, "settled": scriptSettled, "signal": scriptSignal, "refused": scriptRefused, "reloaded": scriptReloaded, "holds": scriptHolds,
			"code": scriptCode, "newid": scriptNewID, "appears": scriptAppears, "matchsize": scriptMatchSize,
			"garbage": scriptGarbage,
		},
	})
}

// samples N EICAR: fills the inbound queue; EICAR is an index or -1.
func scriptSamples(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	bad, err := strconv.Atoi(args[1])
	ts.Check(err)
	for _, m := range sample.Demo(n, bad, -1) {
		ts.Check(m.Write(ts.MkAbs("in")))
	}
}

// hostile: one message whose every text wants to steer a terminal.
func scriptHostile(ts *testscript.TestScript, _ bool, _ []string) {
	m := sample.Demo(1, 0, -1)[0]
	m.ID = "6ANChostile01"
	m.From = "a\u202e\x1b[31m@example.com"
	m.To = []string{"b\u2066\x9b@example.net"}
	m.Header = strings.Replace(m.Header, "Subject: sample 0", "Subject: \x1b]0;owned\x07 \u202egnp.exe \xe2\x80\x8f \xff", 1)
	ts.Check(m.Write(ts.MkAbs("in")))
}

// item VAR: sets VAR to the name of the only item of the quarantine.
func scriptItem(ts *testscript.TestScript, _ bool, args []string) {
	items, err := filepath.Glob(ts.MkAbs("state/quarantine/2*/2*"))
	ts.Check(err)
	if len(items) != 1 {
		ts.Fatalf("%d items", len(items))
	}
	ts.Setenv(args[0], filepath.Base(items[0]))
}

// code N COMMAND…: runs a command that must end with that exit code.
func scriptCode(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	got := 0
	if ended := (*exec.ExitError)(nil); errors.As(err, &ended) {
		got = ended.ExitCode()
	} else {
		ts.Check(err)
	}
	if fmt.Sprint(got) != args[0] {
		ts.Fatalf("exit code %d, want %s", got, args[0])
	}
}

// newid VAR: sets VAR to the queue id of the newest message in out.
func scriptNewID(ts *testscript.TestScript, _ bool, args []string) {
	all, err := filepath.Glob(ts.MkAbs("out/qf*"))
	ts.Check(err)
	var newest os.FileInfo
	for _, path := range all {
		st, err := os.Stat(path)
		ts.Check(err)
		if newest == nil || st.ModTime().After(newest.ModTime()) {
			newest = st
		}
	}
	ts.Setenv(args[0], newest.Name()[2:])
}

// appears FILE: waits until a file is there.
func scriptAppears(ts *testscript.TestScript, _ bool, args []string) {
	until(ts, func() bool { _, err := os.Stat(ts.MkAbs(args[0])); return err == nil })
}

// matchsize ID: queue list says how large both files of a message are together.
func scriptMatchSize(ts *testscript.TestScript, _ bool, args []string) {
	var size int64
	for _, kind := range []string{"qf", "df"} {
		st, err := os.Stat(ts.MkAbs("in/" + kind + args[0]))
		ts.Check(err)
		size += st.Size()
	}
	ts.Check(ts.Exec("holdfast", "queue", "list", "--json", "-c", "c.yaml"))
	if want := fmt.Sprintf(`"id":"%s",`, args[0]); !regexp.MustCompile(want + `[^\n]*"size":` + fmt.Sprint(size) + `,`).MatchString(ts.ReadFile("stdout")) {
		ts.Fatalf("size is not %d", size)
	}
}

// up: waits until the daemon answers.
func scriptUp(ts *testscript.TestScript, _ bool, _ []string) {
	until(ts, func() bool {
		_, err := control.Dial(ts.MkAbs("state/control.sock")).Status(context.Background())
		return err == nil
	})
}

// settled N: waits until the daemon has settled N messages.
func scriptSettled(ts *testscript.TestScript, _ bool, args []string) {
	until(ts, func() bool {
		st, err := control.Dial(ts.MkAbs("state/control.sock")).Status(context.Background())
		var n int64
		for _, c := range st.Counts {
			n += c
		}
		return err == nil && fmt.Sprint(n) == args[0]
	})
}

// signal NAME: sends a signal to the keeper of the daemon.
func scriptSignal(ts *testscript.TestScript, _ bool, args []string) {
	st, err := control.Dial(ts.MkAbs("state/control.sock")).Status(context.Background())
	ts.Check(err)
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", st.PID))
	ts.Check(err)
	parent := regexp.MustCompile(`PPid:\t(\d+)`).FindSubmatch(stat)
	ts.Check(ts.Exec("kill", "-"+args[0], string(parent[1])))
}

// holds ID WORD: waits until the daemon leaves a message alone for a reason
// with that word.
func scriptHolds(ts *testscript.TestScript, _ bool, args []string) {
	until(ts, func() bool {
		st, err := control.Dial(ts.MkAbs("state/control.sock")).Status(context.Background())
		return err == nil && slices.ContainsFunc(st.Waiting, func(w control.Waiting) bool {
			return w.ID == args[0] && strings.Contains(w.Why, args[1])
		})
	})
}

// garbage FILE: a ledger whose pages are damaged below the first, which kills
// whoever opens it.
func scriptGarbage(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	db, err := bbolt.Open(path, 0o600, nil)
	ts.Check(err)
	ts.Check(db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte("aside"))
		for i := 0; err == nil && i < 300; i++ {
			err = b.Put(fmt.Appendf(nil, "%0200d", i), []byte("x"))
		}
		return err
	}))
	ts.Check(db.Close())
	text, err := os.ReadFile(path)
	ts.Check(err)
	for i := 2 * os.Getpagesize(); i < len(text); i++ {
		text[i] = 0xA5
	}
	ts.Check(os.WriteFile(path, text, 0o600))
}

// refused waits until the daemon says that it refused to reload.
func scriptRefused(ts *testscript.TestScript, _ bool, _ []string) {
	until(ts, func() bool {
		st, err := control.Dial(ts.MkAbs("state/control.sock")).Status(context.Background())
		return err == nil && st.ReloadRefused != ""
	})
}

// reloaded waits until the daemon runs with another configuration than the
// one that it started with.
func scriptReloaded(ts *testscript.TestScript, _ bool, _ []string) {
	until(ts, func() bool {
		st, err := control.Dial(ts.MkAbs("state/control.sock")).Status(context.Background())
		return err == nil && st.Loaded.After(st.Started)
	})
}

func until(ts *testscript.TestScript, ok func() bool) {
	for range 1200 {
		if ok() {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	ts.Fatalf("it does not happen")
}
