package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/cmd/holdfast/internal/sample"
)

// realMail reads up to n messages of the corpus; a clone without one beside
// it takes generated ones.
func realMail(t *testing.T, n int) []sample.Message {
	t.Helper()
	root := os.Getenv("HOLDFAST_CORPUS")
	if root == "" {
		root = "../../../shared/corpus"
	}
	packed, err := filepath.Glob(filepath.Join(root, "*", "*", "messages.tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	if len(packed) == 0 {
		return sample.Demo(n, -1, -1)
	}
	var out []sample.Message
	for _, path := range packed {
		out = append(out, unpack(t, path, 2*n/len(packed)+1, len(out))...)
	}
	return out[:min(n, len(out))]
}

func unpack(t *testing.T, path string, n, from int) (out []sample.Message) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for in := tar.NewReader(z); len(out) < n; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg || h.Size > 1<<20 || h.Size == 0 {
			continue
		}
		text, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, asQueued(text, from+len(out)))
	}
	return out
}

// asQueued is a message the way sendmail would have queued it: LF, no NUL
// and no line without colon in the header, the body as it is.
func asQueued(text []byte, n int) sample.Message {
	text = bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n"))
	head, body, _ := bytes.Cut(text, []byte("\n\n"))
	var h strings.Builder
	fmt.Fprintf(&h, "Received: from client.example.com by mx.example.org\n\twith ESMTP id %s\n", sample.ID(n))
	for line := range strings.Lines(string(head) + "\n") {
		folded := line[0] == ' ' || line[0] == '\t'
		if name, _, ok := strings.Cut(line, ":"); (folded || ok && name != "" && !strings.ContainsAny(name, " \t")) && !strings.ContainsAny(line, "\x00\r") {
			h.WriteString(line)
		}
	}
	return sample.Message{ID: sample.ID(n), T: 1_795_438_128 + int64(n), From: "a@example.com", To: []string{"b@example.net"}, Header: h.String(), Body: body}
}

// TestTwoThousandRealMessages: each leaves exactly once, its body byte for
// byte; what is quarantined says why.
func TestTwoThousandRealMessages(t *testing.T) {
	messages := realMail(t, 2000)
	s := newSite(t, messages, "log: {level: error}\npolicy: {infected: quarantine}\n")
	code, out, errs := s.run(normal, "run", "--drain")
	if code != 0 {
		t.Fatalf("exit %d\n%.2000s%.2000s", code, out, errs)
	}
	items := s.items()
	released, wrong := 0, 0
	for _, m := range messages {
		body, err := os.ReadFile(filepath.Join(s.out, "df"+m.ID))
		control, qerr := os.ReadFile(filepath.Join(s.out, "qf"+m.ID))
		why, kept := items[m.ID]
		switch {
		case kept && errors.Is(qerr, os.ErrNotExist):
			t.Logf("quarantined %s: %s", m.ID, why)
		case !kept && err == nil && qerr == nil && sha256.Sum256(body) == sha256.Sum256(m.Body) && bytes.Equal(control, m.Control()):
			released++
		default:
			if wrong++; wrong < 10 {
				t.Errorf("%s: quarantined %v (%s), %v, %v", m.ID, kept, why, err, qerr)
			}
		}
	}
	left, err := os.ReadDir(s.in)
	if err != nil || len(left) > 0 {
		t.Errorf("%d files are left in the inbound queue, %v", len(left), err)
	}
	if len(messages) != 2000 || released+len(items) != 2000 {
		t.Errorf("in %d, out %d, quarantined %d", len(messages), released, len(items))
	}
	t.Logf("in %d, out %d unchanged, quarantined %d, lost 0, doubled 0; %s", len(messages), released, len(items), strings.TrimSpace(out))
}
