package notify

import (
	"net"
	"path/filepath"
	"testing"
	"time"
)

func TestSendReachesTheNamedSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := FromEnv().Send("READY=1"); err != nil {
		t.Fatal(err)
	}
	if err := l.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := l.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Fatalf("got %q, %v", buf[:n], err)
	}
}

func TestWithoutASocketNothingHappens(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := FromEnv().Send("READY=1"); err != nil {
		t.Fatal(err)
	}
}

func TestADeadSocketIsAnError(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	if err := FromEnv().Send("READY=1"); err == nil {
		t.Fatal("no error")
	}
}

func TestWatchdogInterval(t *testing.T) {
	for env, want := range map[string]time.Duration{"": 0, "x": 0, "-5": 0, "3000000": 1500 * time.Millisecond} {
		t.Setenv("WATCHDOG_USEC", env)
		if got := WatchdogInterval(); got != want {
			t.Errorf("WATCHDOG_USEC=%q: %v, want %v", env, got, want)
		}
	}
}
