package sendmail

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/queue"
)

// reference finds the real queue files that the sidecars describe; "" in a
// clone that has none beside it.
func reference() string {
	dir := os.Getenv("HOLDFAST_REFERENCE")
	if dir == "" {
		dir = "../../../shared/reference"
	}
	dir = filepath.Join(dir, "queues", "sendmail")
	if _, err := os.Stat(dir); err != nil {
		return ""
	}
	return dir
}

type sidecar struct {
	ControlFile string          `json:"control_file"`
	DataFile    string          `json:"data_file"`
	QueueID     string          `json:"queue_id"`
	Sender      string          `json:"sender"`
	Version     string          `json:"version"`
	Fields      json.RawMessage `json:"fields"`
	QFHash      string          `json:"qf_sha256"`
	DFHash      string          `json:"df_sha256"`
	HeaderHash  string          `json:"header_block_lf_sha256"`
	HeaderSize  int             `json:"header_block_size"`
	MessageHash string          `json:"message_lf_sha256"`
	MessageSize int             `json:"message_lf_size"`
	Recipients  []struct{ Address, Flags, Orcpt string }
}

func readMaybeGzip(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		return b
	}
	f, err := os.Open(path + ".gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err = io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sum(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func TestRealQueueFilesAgreeWithTheirSidecars(t *testing.T) {
	root := reference()
	if root == "" {
		root = "../../testdata/queues/sendmail"
	}
	dirs, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		t.Run(d.Name(), func(t *testing.T) {
			dir := filepath.Join(root, d.Name())
			var want sidecar
			text, err := os.ReadFile(filepath.Join(dir, "fixture.json"))
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(text, &want); err != nil {
				t.Fatal(err)
			}
			qf := readMaybeGzip(t, filepath.Join(dir, want.ControlFile))
			df := readMaybeGzip(t, filepath.Join(dir, strings.TrimSuffix(want.DataFile, ".gz")))
			checkFixture(t, want, qf, df)
		})
	}
}

func checkFixture(t *testing.T, want sidecar, qf, df []byte) {
	t.Helper()
	if sum(qf) != want.QFHash || sum(df) != want.DFHash {
		t.Fatal("the fixture itself is damaged")
	}
	c, err := parseControl(qf, 1000)
	switch filepath.Base(want.ControlFile)[:2] {
	case "hf":
		if !errors.Is(err, queue.ErrForeign) {
			t.Fatalf("quarantined in the MTA: %v", err)
		}
		return
	case "Qf":
		if !errors.Is(err, queue.ErrDamaged) {
			t.Fatalf("lost: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.bytes(), qf) {
		t.Error("written back, it is another file")
	}
	head := c.headerBlock()
	if len(head) != want.HeaderSize || sum(head) != want.HeaderHash {
		t.Errorf("header block of %d bytes, want %d", len(head), want.HeaderSize)
	}
	if got := sum(head, []byte("\n"), df); got != want.MessageHash {
		t.Errorf("message differs (%d bytes, want %d)", len(head)+1+len(df), want.MessageSize)
	}
	env := c.envelope()
	if sender := strings.Trim(want.Sender, "<>"); env.Sender != sender && !(sender == "MAILER-DAEMON" && env.Sender == "") {
		t.Errorf("sender %q, want %q", env.Sender, want.Sender)
	}
	if len(env.Recipients) != len(want.Recipients) {
		t.Fatalf("%d recipients, want %d", len(env.Recipients), len(want.Recipients))
	}
	for i, r := range env.Recipients {
		w := want.Recipients[i]
		if r.Address != strings.Trim(w.Address, "<>") || r.ORcpt != w.Orcpt || (r.Notify != "") != strings.Contains(w.Flags, "N") {
			t.Errorf("recipient %+v, want %+v", r, w)
		}
	}
	checkFields(t, c, want)
}

// checkFields compares every line that is not a header field.
func checkFields(t *testing.T, c *control, want sidecar) {
	t.Helper()
	var fields [][]string
	if err := json.Unmarshal(want.Fields, &fields); err != nil {
		return // "omitted (many)": the hash of the file says the same
	}
	var got [][]string
	for _, l := range c.lines {
		if l.code != 'H' {
			got = append(got, []string{string(l.code), string(l.value())})
		}
	}
	if len(got) != len(fields) {
		t.Fatalf("%d lines, want %d", len(got), len(fields))
	}
	for i, f := range fields {
		if got[i][0] != f[0] {
			t.Errorf("line %d begins with %q, want %q", i, got[i][0], f[0])
		}
		if plain := !strings.Contains(f[1], `\`); plain && got[i][1] != f[1] {
			t.Errorf("line %d is %q, want %q", i, got[i][1], f[1])
		}
	}
}

const small = "V8\nT1795438128\nK0\nN0\nP30000\nFbs\n$_localhost [127.0.0.1]\n$rESMTP\n$sclient.example.com\n" +
	"${unknown_thing}kept\nS<a@example.com>\nMfirst says\nQrfc822;b@example.net\nrRFC822; b@example.net\nRPNSF:<b@example.net>\n" +
	"rRFC822; c@example.net\nRPFD:<c@example.net>\nCd:8:0:alias\nRPN:<d@example.net>\n" +
	"H?P?Return-Path: <\x81g>\nH??Received: from x\n\tby y\nH??Subject: one\nH??X-A: 1\nH??X-A: 2\nHNaked: yes\n.\n"

func parse(t testing.TB, s string) *control {
	t.Helper()
	c, err := parseControl([]byte(s), 1000)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTheEnvelopeIsComplete(t *testing.T) {
	env := parse(t, small).envelope()
	if env.Sender != "a@example.com" || env.ClientName != "localhost" || env.ClientAddr != "127.0.0.1" || env.Helo != "client.example.com" || env.Protocol != "ESMTP" {
		t.Errorf("%+v", env)
	}
	want := []queue.Recipient{
		{Address: "b@example.net", ORcpt: "rfc822;b@example.net", Notify: "SUCCESS,FAILURE"},
		{Address: "c@example.net"},
		{Address: "d@example.net", Notify: "NEVER"},
	}
	if !slices.Equal(env.Recipients, want) {
		t.Errorf("%+v", env.Recipients)
	}
	for line, check := range map[string]func(queue.Envelope) bool{
		"Fbsd":           func(e queue.Envelope) bool { return e.Ret == "FULL" },
		"Fbsdn":          func(e queue.Envelope) bool { return e.Ret == "HDRS" },
		"Fbs\nZid+2B":    func(e queue.Envelope) bool { return e.EnvID == "id+2B" },
		"Fbs\nB8BITMIME": func(e queue.Envelope) bool { return e.Body8Bit },
		"Fbs\n$_u@h [IPv6:2001:db8::1] (may be forged)": func(e queue.Envelope) bool { return e.ClientName != "" },
	} {
		if env := parse(t, strings.Replace(small, "Fbs", line, 1)).envelope(); !check(env) {
			t.Errorf("%q: %+v", line, env)
		}
	}
	v6 := parse(t, strings.Replace(small, "localhost [127.0.0.1]", "u@h [IPv6:2001:db8::1] (may be forged)", 1)).envelope()
	if v6.ClientAddr != "2001:db8::1" || v6.ClientName != "u@h" {
		t.Errorf("%q [%q]", v6.ClientName, v6.ClientAddr)
	}
	if env := parse(t, strings.Replace(strings.Replace(small, "Fbs", "Fbrs", 1), "S<a@example.com>", "SMAILER-DAEMON", 1)).envelope(); env.Sender != "" {
		t.Errorf("a bounce has the sender %q", env.Sender)
	}
}

func TestTruncatedAtAnyByteItIsNeverComplete(t *testing.T) {
	for n := range len(small) {
		_, err := parseControl([]byte(small[:n]), 1000)
		if err == nil {
			t.Fatalf("the first %d of %d bytes pass as complete", n, len(small))
		}
		if !errors.Is(err, queue.ErrIncomplete) {
			t.Fatalf("%d bytes: %v, want incomplete", n, err)
		}
	}
}

func TestWhatARunnerWouldRefuseOrLoseIsDamaged(t *testing.T) {
	for name, edit := range map[string][2]string{
		"no version":             {"V8\n", ""},
		"version 0":              {"V8\n", "V0\n"},
		"version 9":              {"V8\n", "V9\n"},
		"unknown letter":         {"Fbs\n", "Fbs\nXyes\n"},
		"no sender":              {"S<a@example.com>\n", ""},
		"recipient without flag": {"RPFD:<c@example.net>", "R<c@example.net>"},
		"body type":              {"Fbs\n", "Fbs\nBBINARYMIME\n"},
		"mailbox line":           {"Fbs\n", "Fbs\nFrom x\n"},
		"data after the dot":     {".\n", ".\nRP:<evil@example.com>\n"},
		"recipient first":        {"Fbs\n", "Fbs\nRPFD:<x@example.com>\n"},
		"empty line":             {"Fbs\n", "Fbs\n\n"},
	} {
		text := strings.Replace(small, edit[0], edit[1], 1)
		if edit[0] == ".\n" {
			text = strings.TrimSuffix(small, ".\n") + edit[1]
		}
		if _, err := parseControl([]byte(text), 1000); !errors.Is(err, queue.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	none := "V8\nT1\nS<a@example.com>\nH??A: b\n.\n"
	if _, err := parseControl([]byte(none), 1000); !errors.Is(err, queue.ErrDamaged) {
		t.Errorf("no recipient: %v", err)
	}
	if _, err := parseControl([]byte(small), 2); !errors.Is(err, queue.ErrDamaged) || !strings.Contains(err.Error(), "limits.recipients") {
		t.Errorf("too many recipients: %v", err)
	}
	held := strings.Replace(small, "Fbs\n", "qby the administrator\nFbs\n", 1)
	if _, err := parseControl([]byte(held), 1000); !errors.Is(err, queue.ErrForeign) {
		t.Errorf("held: %v", err)
	}
}

func TestHeaderEdits(t *testing.T) {
	cases := []struct {
		name string
		edit queue.HeaderEdit
		want string // the H lines after Return-Path and Received
	}{
		{"add", queue.HeaderEdit{Op: queue.HeaderAdd, Name: "X-New", Value: "v"}, "H??Subject: one\nH??X-A: 1\nH??X-A: 2\nHNaked: yes\nH??X-New: v\n"},
		{"remove all of a name", queue.HeaderEdit{Op: queue.HeaderRemove, Name: "x-a"}, "H??Subject: one\nHNaked: yes\n"},
		{"replace", queue.HeaderEdit{Op: queue.HeaderReplace, Name: "X-A", Value: "3"}, "H??Subject: one\nH??X-A: 3\nHNaked: yes\n"},
		{"replace what is not there", queue.HeaderEdit{Op: queue.HeaderReplace, Name: "X-B", Value: "3"}, "H??Subject: one\nH??X-A: 1\nH??X-A: 2\nHNaked: yes\nH??X-B: 3\n"},
		{"8 bit is quoted", queue.HeaderEdit{Op: queue.HeaderReplace, Name: "Subject", Value: "\u00c0\xff"}, "H??Subject: \xc3\xff\x80\xff\xff\nH??X-A: 1\nH??X-A: 2\nHNaked: yes\n"},
		{"no line of its own", queue.HeaderEdit{Op: queue.HeaderReplace, Name: "Subject", Value: "s\nRPFD:<evil@example.com>\r\n\nS<x>\x00"}, "H??Subject: s\n\tRPFD:<evil@example.com>\n\t\n\tS<x>\nH??X-A: 1\nH??X-A: 2\nHNaked: yes\n"},
	}
	for _, c := range cases {
		out, err := parse(t, small).build(change{edits: []queue.HeaderEdit{c.edit}})
		if err != nil {
			t.Fatal(err)
		}
		text := string(out.bytes())
		_, got, _ := strings.Cut(text, "\tby y\n")
		if got != c.want+".\n" {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
		if again := parse(t, text); len(again.envelope().Recipients) != 3 {
			t.Errorf("%s: %d recipients", c.name, len(again.envelope().Recipients))
		}
	}
	top, err := parse(t, small).build(change{edits: []queue.HeaderEdit{{Op: queue.HeaderPrepend, Name: "X-Top", Value: "1"}}})
	if err != nil || !strings.Contains(string(top.bytes()), "<d@example.net>\nH??X-Top: 1\nH?P?") {
		t.Errorf("prepend: %v\n%s", err, top.bytes())
	}
	for _, name := range []string{"", "A B", "A:", "A\nR", "\u00e9"} {
		if _, err := parse(t, small).build(change{edits: []queue.HeaderEdit{{Op: queue.HeaderAdd, Name: name, Value: "v"}}}); err == nil {
			t.Errorf("field name %q accepted", name)
		}
	}
}

func TestAGroupHasItsOwnRecipientsAndTheirLines(t *testing.T) {
	out, err := parse(t, small).build(change{recipients: []int{1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	text := string(out.bytes())
	if strings.Contains(text, "b@example.net") || strings.Contains(text, "Mfirst") {
		t.Errorf("lines of another recipient:\n%s", text)
	}
	for _, want := range []string{"rRFC822; c@example.net\nRPFD:<c@example.net>", "Cd:8:0:alias\nRPN:<d@example.net>", "${unknown_thing}kept"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing:\n%s", want, text)
		}
	}
}

func TestAMarkerRoundTrips(t *testing.T) {
	m := marker{token: "0123456789abcdef", self: 7, orig: 8, df: 9, final: finalPublish, groups: []prepared{
		{do: queue.Release, id: "6ANC000000", qf: 7, df: 9}, {do: queue.Quarantine, item: "20261124-x-1"}, {do: queue.Drop},
	}}
	out, err := parse(t, small).build(change{marker: m.String()})
	if err != nil {
		t.Fatal(err)
	}
	got, ok := parse(t, string(out.bytes())).marker()
	if !ok || got.String() != m.String() || len(got.groups) != 3 {
		t.Fatalf("%v %q", ok, got)
	}
	again, err := parse(t, string(out.bytes())).build(change{})
	if err != nil || strings.Contains(string(again.bytes()), macroName) {
		t.Error("an old marker is carried on")
	}
}

// FuzzControlFile: what parses is written back to the same bytes; a built
// file parses, keeps its recipients, and its values cannot add lines.
func FuzzControlFile(f *testing.F) {
	f.Add([]byte(small), "Subject", "x\nR:evil")
	f.Add([]byte("V8\nT1\nS<>\nRPFD:<b@example.net>\nH??A: \xff\x80\n.\n"), "A", "\xff\x81")
	f.Fuzz(func(t *testing.T, b []byte, name, value string) {
		c, err := parseControl(b, 1000)
		if err != nil {
			return
		}
		if back := c.bytes(); !bytes.Equal(bytes.TrimSuffix(b, []byte("\r\n")), bytes.TrimSuffix(back, []byte("\n"))) && !bytes.Equal(b, back) {
			t.Fatalf("written back as %q", back)
		}
		c.headerBlock()
		n := len(c.envelope().Recipients)
		out, err := c.build(change{edits: []queue.HeaderEdit{{Op: queue.HeaderReplace, Name: name, Value: value}}, marker: "1 token=x", eightBit: true})
		if err != nil {
			return
		}
		again, err := parseControl(out.bytes(), 1000)
		if err != nil {
			t.Fatalf("built file is refused: %v\n%q", err, out.bytes())
		}
		if got := len(again.envelope().Recipients); got != n {
			t.Fatalf("%d recipients became %d", n, got)
		}
	})
}

// FuzzQuoting: quoting round trips, and leaves no byte that means a macro.
func FuzzQuoting(f *testing.F) {
	f.Add([]byte("\xff\x80\x81\x9f\xa0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if !bytes.Equal(unquote(quote(b)), b) {
			t.Fatalf("%q", b)
		}
	})
}
