package layers

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

const root = "../../../.."

func TestTheProjectKeepsItsRules(t *testing.T) {
	files, err := Load(root)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	var broken []string
	for _, b := range [][]string{Imports(files), Disk(files), Shape(files), Top(names)} {
		broken = append(broken, b...)
	}
	for _, b := range broken {
		t.Error(b)
	}
	if len(files) < 50 {
		t.Errorf("only %d files were looked at", len(files))
	}
}

func TestEachRuleFindsWhatItIsFor(t *testing.T) {
	for _, c := range []struct {
		path, src string
		check     func([]File) []string
		bad       bool
	}{
		{"scan/part/x.go", `package part; import "gopkg.in/yaml.v3"`, Imports, true},
		{"conf/x.go", `package conf; import "gopkg.in/yaml.v3"`, Imports, false},
		{"queue/sendmail/x.go", `package sendmail; import "go.etcd.io/bbolt"`, Imports, true},
		{"poison/x.go", `package poison; import "github.com/sirupsen/logrus"`, Imports, true},
		{"scan/part/x.go", `package part; import "os/exec"`, Imports, true},
		{"scan/part/x.go", `package part; import "net"`, Imports, true},
		{"scan/part/x.go", `package part; import "net/mail"`, Imports, false},
		{"scan/x.go", `package scan; import "holdfast/queue/sendmail"`, Imports, true},
		{"scan/x.go", `package scan; import "holdfast/queue"`, Imports, false},
		{"poison/x.go", `package poison; import "holdfast/queue"`, Imports, true},
		{"queue/x.go", `package queue; import "holdfast/scan"`, Imports, true},
		{"conf/x.go", `package conf; import "holdfast/scan"`, Imports, true},
		{"scan/part/x.go", `package part; import "github.com/landlock-lsm/go-landlock/landlock"`, Imports, true},
		{"queue/sendmail/x.go", `package sendmail; import "os"; func f() { os.Rename("a", "b") }`, Disk, true},
		{"queue/durable/x.go", `package durable; import "os"; func f() { os.Rename("a", "b") }`, Disk, false},
		{"queue/sendmail/x_test.go", `package sendmail; import "os"; func f() { os.Rename("a", "b") }`, Disk, false},
		{"queue/x.go", "// Package queue is.\npackage queue\nfunc init() {}", Shape, true},
		{"queue/x.go", "package queue", Shape, true},
		{"queue/x.go", "// Package queue is.\npackage queue\nvar Global int", Shape, true},
		{"queue/x.go", "// Package queue is.\npackage queue\nvar ErrX error", Shape, false},
		{"queue/x.go", "// Package queue is.\npackage queue\nfunc F() {}", Shape, true},
		{"queue/x.go", "// Package queue is.\npackage queue\nfunc f() {" + strings.Repeat("\n", 130) + "}", Shape, true},
		{"queue/x.go", "// Package queue is.\npackage queue\nfunc f() { log.Fatal() }", Shape, true},
	} {
		f, err := Parse(c.path, c.src, c.path)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.check([]File{f}); (len(got) > 0) != c.bad {
			t.Errorf("%s: %s\nfound %q", c.path, c.src, got)
		}
	}
	if len(Top([]string{"util", "cmd", ".ci"})) != 1 {
		t.Error("a foreign name at the top level is not found")
	}
}

// TestANormalBuildHasNoFaults: the code that plants faults is not even
// listed without its tag, and the binary does not know its header.
func TestANormalBuildHasNoFaults(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{.GoFiles}}", root+"/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(out), "fault_on") || !strings.Contains(string(out), "fault_off") {
		t.Errorf("fault code in a normal build:\n%s", out)
	}
	bin := t.TempDir() + "/holdfast"
	for tags, want := range map[string]bool{"": false, "faults": true} {
		build := exec.Command("go", "build", "-tags", tags, "-o", bin, root+"/cmd/holdfast")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		text, err := os.ReadFile(bin)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(text), "X-Holdfast-"+"Fault"); got != want {
			t.Errorf("with tags %q the binary knows the fault header: %v", tags, got)
		}
	}
}
