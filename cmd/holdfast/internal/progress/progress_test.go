package progress

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestAPipeGetsALineNowAndThenAndNoEscapes(t *testing.T) {
	var out bytes.Buffer
	b := New(&out, "messages")
	at := b.start
	b.now = func() time.Time { return at }
	for i := range 2001 {
		at = at.Add(50 * time.Millisecond) // 100 s in all
		b.Set(i, 2000, "")
	}
	b.Clear()
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 10 {
		t.Fatalf("%d lines in 100 s:\n%s", len(lines), out.String())
	}
	if strings.ContainsAny(out.String(), "\x1b\r") {
		t.Fatal("escape sequence in a pipe")
	}
	if want := "[#############################.] 1999 of 2000 messages, 1m40s"; lines[9] != want {
		t.Fatalf("last line %q, want %q", lines[9], want)
	}
}

func TestATerminalIsRedrawnAtMostTenTimesASecond(t *testing.T) {
	var out bytes.Buffer
	b := New(&out, "messages")
	b.terminal = true
	at := b.start
	b.now = func() time.Time { return at }
	for i := range 1000 {
		at = at.Add(time.Millisecond)
		b.Set(i, 1000, "")
	}
	if n := strings.Count(out.String(), "\r"); n != 10 {
		t.Fatalf("drawn %d times in a second", n)
	}
}

func TestMoreThanTheTotalDoesNotOverflow(t *testing.T) {
	var out bytes.Buffer
	b := New(&out, "messages")
	at := b.start.Add(time.Minute)
	b.now = func() time.Time { return at }
	b.Set(5, 0, "")
	if !strings.Contains(out.String(), "5 of 5") {
		t.Fatal(out.String())
	}
}
