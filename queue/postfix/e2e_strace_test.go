//go:build e2e

package postfix

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"holdfast/queue/quarantine"
)

// What the program changes the disk with, or speaks to the listener with.
var changingCalls = []string{"renameat2", "linkat", "unlinkat", "fsync", "fdatasync", "pwrite64", "write"}

// maxKills bounds the kills per call and route: the torture goes on to the end.
const maxKills = 5

// TestE2EKilledAtSystemCalls: the real program is killed at its n-th system
// call of a kind while it releases, changes, splits and quarantines mail, beside
// a sender and the real queue manager. The next run finishes: at the sink and in
// the quarantine each recipient has each message once, and no virus is delivered.
func TestE2EKilledAtSystemCalls(t *testing.T) {
	for _, r := range routes {
		t.Run(r.name, func(t *testing.T) {
			m := newMTA(t, mtaOptions{})
			m.configured(map[Modify]string{ByRewriting: ", modify: rewrite", ByReinjection: ""}[r.modify])
			points := 0
			for _, call := range changingCalls {
				kills := 0
				for n, quiet := 1, 0; quiet < 3 && kills < maxKills; n++ {
					round := fmt.Sprintf("%s-%d", call, n)
					m.sendRound(round)
					quiet++
					if m.killAt(call, n) {
						kills++
						quiet = 0
					}
					m.sendRound(round + "-later")
					if out, err := m.holdfast("faults", "run", "--drain"); err != nil {
						t.Fatalf("killed at %s %d: then %v\n%s", call, n, err, out)
					}
					m.settle()
					m.accountRound(round)
					m.accountRound(round + "-later")
					if t.Failed() {
						return
					}
				}
				if kills == 0 && call != "linkat" { // re-injection gives no name but to items
					t.Errorf("no process was killed at %s: the program does not use it any more", call)
				}
				points += kills
			}
			t.Logf("%5d points  %-24s  1 rounds  lost 0  doubled 0  (strace)", points, r.name)
		})
	}
}

// sendRound sends one message of each kind.
func (m *mta) sendRound(round string) {
	m.t.Helper()
	for kind, more := range map[string]string{"plain": "", "edit": "X-Holdfast-Fault: edit@plan\n", "split": "X-Holdfast-Fault: split@plan\n", "virus": ""} {
		body := "body of " + kind + "\n"
		if kind == "virus" {
			body = eicar
		}
		x := mail{from: "a@example.com", text: lettered(kind+"-"+round, more, body)}
		for _, r := range officeRcpts {
			x.rcpts = append(x.rcpts, "<"+r+">")
		}
		m.send(x)
	}
}

// killAt runs the program's supervisor, and kills whatever process of it makes
// its n-th call of a kind. It reports whether one was.
func (m *mta) killAt(call string, n int) bool {
	m.t.Helper()
	log := m.dir + "/strace"
	cmd := exec.Command("strace", "-f", "-q", "-o", log, "-e", "trace="+call, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n),
		program(m.t, "faults"), "supervise", "--drain", "-c", m.dir+"/holdfast.yaml")
	out, err := cmd.CombinedOutput()
	text, rerr := os.ReadFile(log)
	if rerr != nil {
		m.t.Fatalf("strace: %v, %v\n%s", err, rerr, out)
	}
	return bytes.Contains(text, []byte("+++ killed by SIGKILL +++"))
}

func (m *mta) accountRound(round string) {
	m.t.Helper()
	have := map[string]int{}
	for _, kind := range []string{"plain", "edit", "split", "virus"} {
		for _, d := range m.sink.about(kind + "-" + round) {
			if changed := strings.Contains(d.message, "X-Changed: yes\n"); kind == "edit" && !changed || kind == "plain" && changed || kind == "virus" {
				m.t.Errorf("%s of round %s was delivered as %q", kind, round, d.message)
			}
			for _, r := range d.rcpts {
				_, address, _ := strings.Cut(r, "<")
				address, _, _ = strings.Cut(address, ">")
				have[kind+" "+address]++
			}
		}
	}
	store, err := quarantine.New(m.dir+"/state/quarantine", nil) // the program's
	if err != nil {
		m.t.Fatal(err)
	}
	err = store.List(context.Background(), func(meta quarantine.Meta, err error) bool {
		text, rerr := os.ReadFile(meta.Dir + "/message")
		if err != nil || rerr != nil {
			m.t.Error(err, rerr)
		}
		if kind, ok := strings.CutSuffix(subjectOf(string(text)), "-"+round); ok {
			for _, r := range meta.Envelope.Recipients {
				have[kind+" "+r.Address]++
			}
		}
		return true
	})
	if err != nil {
		m.t.Error(err)
	}
	for _, kind := range []string{"plain", "edit", "split", "virus"} {
		for _, r := range officeRcpts {
			if n := have[kind+" "+r]; n != 1 {
				m.t.Errorf("round %s: %s has %s %d times", round, r, kind, n)
			}
		}
	}
}
