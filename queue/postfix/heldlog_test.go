package postfix

import (
	"os"
	"testing"
)

func TestHeldLogFollowsTheLog(t *testing.T) {
	path := t.TempDir() + "/mail.log"
	add := func(to, text string) {
		t.Helper()
		f, err := os.OpenFile(to, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	const by = "Nov 25 04:31:44 mx postfix/cleanup[25262]: "
	add(path+".1", by+"00000000A1: message-id=<x@y>\n")
	add(path, by+"00000000B1: message-id=<x@y>\n"+by+"00000000B1: milter-hold: END-OF-MESSAGE from x\nnonsense\n"+by+"00000000C1: mess")
	l := NewHeldLog(path)
	ask := func(id string, known, held bool) {
		t.Helper()
		k, h, err := l.Ask(id)
		if err != nil || k != known || h != held {
			t.Errorf("%s: known %v, held %v, %v", id, k, h, err)
		}
	}
	ask("00000000A1", true, false)
	ask("00000000B1", true, true)
	ask("00000000D1", false, false)
	add(path, "age-id=<x@y>\n")
	ask("00000000C1", true, false)
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	add(path+".1", by+"00000000D1: milter-hold: a last line in the old log\n")
	add(path, by+"00000000E1: milter-hold: x\n")
	ask("00000000D1", true, true)
	ask("00000000E1", true, true)
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	add(path, by+"00000000F1: message-id=<>\n")
	ask("00000000F1", true, false)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.Ask("00000000F1"); err == nil {
		t.Error("a log that is gone is no error: mail would be taken that a milter has put on hold")
	}
}
