package conf

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFilesMerge(t *testing.T) {
	c := mustParse(t, least+"limits: {cpu: 10s}\npolicy:\n  infected: hold\n",
		"queues: [{name: second, type: sendmail, in: ['/b/in*', /c/in], out: /b/out, kick: [/usr/sbin/sendmail, -C, /etc/x], lock: ofd}]\nlimits: {parts: 7}\n",
		"limits:\n  #depth: 9\npolicy:\nstate: /srv/holdfast/\nnewest_share: 0.5\npaths: {quarantine: /srv/quarantine}\n")
	if c.Limits.CPU != 10*time.Second || c.Limits.Parts != 7 || c.Limits.Depth != 30 {
		t.Errorf("limits %+v: not what two files and the default say", c.Limits)
	}
	if c.Policy.Infected != Hold || c.Policy.Convicted != Quarantine {
		t.Errorf("policy %+v", c.Policy)
	}
	want := []Queue{
		{Name: "mta", Type: Sendmail, In: List{"/var/spool/mqueue.in"}, Out: List{"/var/spool/mqueue"}, Lock: Flock, Kick: Command{Auto: true}},
		{Name: "second", Type: Sendmail, In: List{"/b/in*", "/c/in"}, Out: List{"/b/out"}, Lock: OFD, Kick: Command{Words: []string{"/usr/sbin/sendmail", "-C", "/etc/x"}}},
	}
	if !reflect.DeepEqual(c.Queues, want) {
		t.Errorf("queues %+v", c.Queues)
	}
	if c.State != "/srv/holdfast" || c.Paths.Ledger != "/srv/holdfast/ledger.db" || c.Paths.Quarantine != "/srv/quarantine" {
		t.Errorf("state %s, paths %+v: what is not set apart must be below the state", c.State, c.Paths)
	}
	for key, pos := range map[string]string{
		"policy.infected":   "holdfast.yaml:4",
		"policy.convicted":  "default",
		"limits.parts":      "conf.d/1.yaml:2",
		"queues.mta.in":     "holdfast.yaml:1",
		"queues.second.out": "conf.d/1.yaml:1",
		"paths.quarantine":  "conf.d/2.yaml:6",
		"paths.ledger":      "default",
		"no.such.key":       "default",
	} {
		if got := c.Pos(key); got != pos {
			t.Errorf("Pos(%s) = %s, want %s", key, got, pos)
		}
	}
}

func TestForms(t *testing.T) {
	c := mustParse(t, "\xef\xbb\xbf"+strings.ReplaceAll(`%YAML 1.1
---
queues:
  - kick: none
    out: /q/out
    in: [/q/in]
    name: A-b_9
    type: 'sendmail'
workers: 7
monitor: on
user: 65534
shutdown: 1m30s
min_free: 0
newest_share: 0%
batch: {bytes: 512k}
limits: {message: 10 MiB, header: 1Mi, decoded: "3 gb", wall: 90s}
keep: {history: 7d}
policy: {convicted: release, deliver_unscanned: yes}
...
`, "\n", "\r\n"))
	switch {
	case c.Queues[0].Name != "A-b_9", c.Queues[0].Kick.Auto, c.Queues[0].Kick.Words != nil,
		c.Workers.Or(3) != 7, !c.Monitor, c.User != "65534", c.Shutdown != 90*time.Second,
		c.MinFree != 0, c.NewestShare != 0, c.Batch.Bytes != 512000,
		c.Limits.Message != 10<<20, c.Limits.Header != 1<<20, c.Limits.Decoded != 3e9,
		c.Limits.Wall != 90*time.Second, c.Keep.History != 7*24*time.Hour,
		c.Policy.Convicted != Release, !c.Policy.DeliverUnscanned:
		t.Errorf("read as\n%s", c.YAML())
	}
	if n := mustParse(t, least).Workers.Or(3); n != 3 {
		t.Errorf("workers by default: %d of 3 CPUs", n)
	}
}

func TestValuesSurviveWriting(t *testing.T) {
	for _, n := range []Size{0, 1, 999, 1000, 1024, 1536, 50e6, 10 << 20, 1<<63 - 1} {
		if got, err := ParseSize(n.String()); got != n || err != nil {
			t.Errorf("size %d is written %s and read %d, %v", n, n, got, err)
		}
	}
	for _, d := range []time.Duration{0, time.Millisecond, 90 * time.Second, 26*time.Hour + 61*time.Second, (1 << 62) / 1000000 * 1000000} {
		if got, err := ParseDuration(FormatDuration(d)); got != d || err != nil {
			t.Errorf("duration %d is written %s and read %d, %v", d, FormatDuration(d), got, err)
		}
	}
	for text, want := range map[string]string{"5000000B": "5MB", "10240KiB": "10MiB", "1000KiB": "1024kB"} {
		if n, _ := ParseSize(text); n.String() != want {
			t.Errorf("%s is written %s, want %s", text, n, want)
		}
	}
}

// Any YAML reader must take what we write for the text it is.
func TestAwkwardTextIsQuoted(t *testing.T) {
	c := mustParse(t, least)
	c.User = "yes"
	c.State = "/a: b #c"
	c.Queues[0].Kick = Command{Words: []string{"/x", "no", "12", "- y", "~", "null", "a\u202eb", "", "=", "<<", "*a", "1:30"}}
	text := string(c.YAML())
	for _, want := range []string{
		`user: "yes"`, `state: "/a: b #c"`,
		`kick: [/x, "no", "12", "- y", "~", "null", "a\u202eb", "", "=", "<<", "*a", "1:30"]`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("%s is not in\n%s", want, text)
		}
	}
	if again := mustParse(t, text); !reflect.DeepEqual(values(again), values(c)) {
		t.Errorf("read as\n%s", again.YAML())
	}
}

func TestNoFileIsAnEmptyOne(t *testing.T) {
	if c, err := Parse(nil); c != nil || err == nil || err.Error() != "configuration:1:1: file is empty (remove it, or see the example configuration)" {
		t.Errorf("got %v, %v", c, err)
	}
}

func TestAdjacentDirectoriesAreNotOverlapping(t *testing.T) {
	mustParse(t, `queues:
  - {name: a, type: sendmail, in: [/q/in, /q/in2, "/q/x*"], out: /q/out}
  - {name: b, type: sendmail, in: /q/b/in, out: /q/out}
state: /q/state
`)
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	main := write("holdfast.yaml", least)
	if c, err := Load(main); err != nil || c.Queues[0].Name != "mta" {
		t.Fatalf("without conf.d: %v, %v", c, err)
	}
	second := write("conf.d/20.yaml", "workers: 3\n")
	write("conf.d/10.yaml", "poll: 5s\n")
	write("conf.d/.#20.yaml", "not read: [\n")
	write("conf.d/20.yaml.dpkg-old", "not read: [\n")
	c, err := Load(main)
	if err != nil {
		t.Fatal(err)
	}
	if c.Poll != 5*time.Second || c.Workers != 3 || c.Pos("workers") != second+":1" {
		t.Errorf("conf.d not read: poll %v, workers %v, %s", c.Poll, c.Workers, c.Pos("workers"))
	}

	write("conf.d/30.yaml", "workers: 4\n")
	_, err = Load(main)
	var wrong Errors
	if !errors.As(err, &wrong) || len(wrong) != 1 || !strings.Contains(err.Error(), "30.yaml:1:1") || !strings.Contains(err.Error(), "20.yaml:1") {
		t.Errorf("a key in two files: error %v, want both places", err)
	}
	os.Remove(filepath.Join(dir, "conf.d/30.yaml"))

	if _, err := Load(filepath.Join(dir, "none.yaml")); !errors.Is(err, fs.ErrNotExist) || errors.As(err, &wrong) {
		t.Errorf("missing file: %v", err)
	}
	yml := write("conf.d/40.yml", "workers: 4\n")
	if _, err := Load(main); err == nil || !strings.Contains(err.Error(), "40.yml") {
		t.Errorf("a file that would be left out for its ending: %v", err)
	}
	os.Remove(yml)
	if err := unix.Mkfifo(filepath.Join(dir, "conf.d/50.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(main); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
}

// Text that is made to cost a lot must be refused with few errors. A test
// that hangs is the failure here; no time is measured.
func TestTextIsBounded(t *testing.T) {
	million := func(s string) string { return strings.Repeat(s, maxFile/len(s)-200) }
	for name, c := range map[string]struct{ text, want string }{
		"file":          {strings.Repeat("#", maxFile+1), "more than the 1048576 allowed"},
		"flow depth":    {"a: " + strings.Repeat("[", 60) + strings.Repeat("]", 60), "more than 50 levels"},
		"deep flow":     {"a: " + million("["), "not valid YAML"},
		"deep maps":     {"a: " + million("{a: "), "not valid YAML"},
		"deep block":    {million("- "), "not valid YAML"},
		"indents":       {strings.Join(indents(1300), "\n"), "more than 50 levels"},
		"unknown keys":  {million("a:\n"), "is twice"},
		"different":     {distinct(), "the rest was not checked"},
		"anchors":       {million("- &a\n"), "anchor &a"},
		"quotes":        {million(`"`), "not valid YAML"},
		"empty lines":   {million("\n") + "a: b: c", "not valid YAML"},
		"tabs":          {"a:\n" + million("\tb\n"), "tab in the indentation"},
		"bad bytes":     {million("\xff\n"), "not UTF-8"},
		"one long line": {"a: [" + million("{b: c},") + "]", `unknown key "a"`},
		"long key":      {strings.Repeat("k", 1000) + ": 1", `unknown key "kkk`},
		"queues":        {"queues: [" + million("{},") + "]", "has no key"},
		"directories":   {"queues: [{name: a, type: sendmail, in: [" + million("/x,") + "], out: /y}]", "more than 1024 directories"},
		"overlaps":      {"queues: [{name: a, type: sendmail, in: [" + strings.Repeat("/x*, ", 1000) + "], out: /y}]", "is there twice"},
		"comments":      {million("#\n") + "a: b", "unknown key"},
	} {
		t.Run(name, func(t *testing.T) {
			files := sources(c.text)
			_, err := Parse(files)
			var wrong Errors
			if !errors.As(err, &wrong) || !strings.Contains(wrong.Error(), c.want) {
				t.Fatalf("error %.300v, want %q", err, c.want)
			}
			checkErrors(t, files, wrong)
		})
	}
}

// indents is a section in a section, n deep.
func indents(n int) []string {
	lines := make([]string, n)
	for i := range lines {
		lines[i] = strings.Repeat(" ", i) + "a:"
	}
	return lines
}

// distinct is a file of many different keys.
func distinct() string {
	var b strings.Builder
	for i := range 50000 {
		b.WriteString(strings.ReplaceAll(FormatDuration(time.Duration(i+1)*time.Second), "s", "x") + ": 1\n")
	}
	return b.String()
}
