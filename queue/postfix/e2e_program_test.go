//go:build e2e

package postfix

import (
	"fmt"
	"strings"
	"testing"
)

// The EICAR test file, in two pieces so that this file is not one.
const eicar = `X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-STANDARD-` + `ANTIVIRUS-TEST-FILE!$H+H*` + "\n"

// TestE2EVirusByTheListener: any local user may speak to the listener for
// changed mail, and say any name. What comes by it is scanned all the same.
func TestE2EVirusByTheListener(t *testing.T) {
	m := newMTA(t, mtaOptions{})
	m.configured("")
	forged := "hf-" + strings.Repeat("0123456789abcdef", 2) + "-0-0.holdfast.invalid"
	bob := []string{"<b@example.net>"}
	names := map[string]string{"plain": "client.example.com", "forged": forged, "short": "hf-1-0-0.holdfast.invalid"}
	hand := func(round int) {
		for name, helo := range names {
			for kind, body := range map[string]string{"virus": eicar, "good": "hello\n"} {
				text := lettered(fmt.Sprintf("%s-%s-%d", kind, name, round), "", body)
				if _, err := deliver(m.listener, helo, mail{"a@example.com", "", bob, text}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	hand(0)
	for round := 1; round < 3; round++ { // the second time, the program has a journal
		if n := len(m.held()); n != 2*len(names) {
			t.Fatalf("%d messages on hold, want %d", n, 2*len(names))
		}
		if out, err := m.holdfast("", "run", "--drain"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		m.settle()
		for name := range names {
			subject := fmt.Sprintf("%s-%d", name, round-1)
			if n := len(m.sink.about("good-" + subject)); n != 1 {
				t.Errorf("the good message %s was delivered %d times", subject, n)
			}
			if n := len(m.sink.about("virus-" + subject)); n != 0 {
				t.Errorf("the virus %s was delivered", subject)
			}
		}
		hand(round)
	}
	list, err := m.holdfast("", "quarantine", "list")
	if n := strings.Count(list, "EICAR"); err != nil || n != 2*len(names) {
		t.Errorf("%d in quarantine, want %d (%v)\n%s", n, 2*len(names), err, list)
	}
}
