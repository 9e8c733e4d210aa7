package keeper

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is the supervisor, and, for the test of its death, the
// keeper.
func TestMain(m *testing.M) {
	switch os.Getenv("KEEPER_TEST") {
	case "supervisor":
		supervisor(os.Getenv("KEEPER_DIR"))
	case "keeper":
		dir := os.Getenv("KEEPER_DIR")
		os.Setenv("KEEPER_TEST", "supervisor")
		code, err := Run(context.Background(), options(dir, nil))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(code)
	default:
		os.Exit(m.Run())
	}
}

// supervisor does what the script file says for this life.
func supervisor(dir string) {
	script, err := os.ReadFile(dir + "/script")
	if err != nil {
		os.Exit(9)
	}
	lives, _ := os.ReadFile(dir + "/lives")
	n := strings.Count(string(lives), "\n")
	f, err := os.OpenFile(dir+"/lives", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		os.Exit(9)
	}
	fmt.Fprintf(f, "%d %s\n", os.Getpid(), LastDeath())
	f.Close()
	words := strings.Fields(string(script))
	switch w := words[min(n, len(words)-1)]; {
	case w == "panic":
		panic("planted")
	case w == "kill":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case w == "silent":
		os.Exit(0)
	case w == "wait":
		c := make(chan os.Signal, 4)
		signal.Notify(c, unix.SIGTERM, unix.SIGHUP)
		if err := os.WriteFile(dir+"/ready", nil, 0o600); err != nil {
			os.Exit(9)
		}
		for s := range c {
			g, err := os.OpenFile(dir+"/signals", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				os.Exit(9)
			}
			fmt.Fprintln(g, s)
			g.Close()
			if s == unix.SIGTERM {
				_ = Bye(0)
				os.Exit(0)
			}
		}
	default:
		code, err := strconv.Atoi(w)
		if err != nil {
			os.Exit(9)
		}
		_ = Bye(code)
		os.Exit(code)
	}
}

func options(dir string, died func(string, time.Duration)) Options {
	if died == nil {
		died = func(string, time.Duration) {}
	}
	var sink bytes.Buffer
	return Options{
		Path: "/proc/self/exe", Name: "holdfast-test", Stdout: &sink, Stderr: &sink,
		First: time.Millisecond, Most: 8 * time.Millisecond, Settled: time.Minute, Died: died,
	}
}

func scene(t *testing.T, script string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/script", []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KEEPER_TEST", "supervisor")
	t.Setenv("KEEPER_DIR", dir)
	return dir
}

func lives(t *testing.T, dir string) []string {
	t.Helper()
	text, err := os.ReadFile(dir + "/lives")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func TestAnOrderlyEndIsPassedOn(t *testing.T) {
	for _, code := range []string{"0", "1", "2", "3"} {
		dir := scene(t, code)
		got, err := Run(t.Context(), options(dir, nil))
		if err != nil || fmt.Sprint(got) != code || len(lives(t, dir)) != 1 {
			t.Errorf("exit %s: %d, %v, %d lives", code, got, err, len(lives(t, dir)))
		}
	}
}

func TestEveryOtherEndIsADeathAndALifeFollows(t *testing.T) {
	dir := scene(t, "panic kill silent kill panic 0")
	var delays []time.Duration
	code, err := Run(t.Context(), options(dir, func(_ string, d time.Duration) { delays = append(delays, d) }))
	if err != nil || code != 0 {
		t.Fatalf("%d, %v", code, err)
	}
	all := lives(t, dir)
	if len(all) != 6 {
		t.Fatalf("%d lives: %q", len(all), all)
	}
	for i, want := range []string{"", "exit status 2", "signal: killed", "ended without a word", "signal: killed", "exit status 2"} {
		if _, how, _ := strings.Cut(all[i], " "); how != want {
			t.Errorf("life %d was told %q, want %q", i, how, want)
		}
	}
	for i := 1; i < len(delays); i++ {
		if delays[i] < delays[i-1] || delays[i] > 8*time.Millisecond {
			t.Errorf("delays %v", delays)
		}
	}
}

func await(t *testing.T, path string) {
	t.Helper()
	for range 2000 {
		if _, err := os.Stat(path); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s does not appear", path)
}

func start(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "KEEPER_TEST=keeper", "KEEPER_DIR="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	await(t, dir+"/ready")
	return cmd
}

func TestSignalsArePassedOn(t *testing.T) {
	dir := scene(t, "wait")
	cmd := start(t, dir)
	if err := cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	await(t, dir+"/signals")
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(dir + "/signals")
	if err != nil || string(text) != "hangup\nterminated\n" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestWithoutItsKeeperTheSupervisorStopsInOrder(t *testing.T) {
	dir := scene(t, "wait")
	cmd := start(t, dir)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, filepath.Join(dir, "signals"))
}
