package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/cmd/holdfast/internal/sample"
)

// The calls that change what is on the disk, as `strace -f -c` counts them
// in a drain and in a release from quarantine.
var changing = []string{"renameat2", "linkat", "unlinkat", "fsync", "fdatasync", "pwrite64"}

// killAt runs the real program under strace, which kills the process at the
// n-th such call of one of its threads. strace counts per thread, and Go
// moves work between threads, so the points are not the same each time; that
// each of them is met is queue/sendmail's torture's business, and this is the
// proof that the real program dies no other way. It reports whether a kill
// happened.
func (s *site) killAt(call string, n int, argv ...string) bool {
	s.t.Helper()
	log := filepath.Join(s.dir, "strace")
	args := append([]string{"-f", "-q", "-o", log, "-e", "trace=" + call, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n)}, argv...)
	cmd := exec.Command("strace", append(args, "-c", s.config)...)
	out, err := cmd.CombinedOutput()
	text, rerr := os.ReadFile(log)
	if rerr != nil {
		s.t.Fatalf("strace: %v, %v\n%s", err, rerr, out)
	}
	return bytes.Contains(text, []byte("+++ killed by SIGKILL +++"))
}

// enough tries without a kill say that no thread makes as many such calls.
const enough = 3

// TestKilledAtSystemCalls: the real program is killed at its n-th renameat2,
// linkat, unlinkat, fsync, fdatasync, pwrite64, n = 1, 2, … until several n in a
// row end without a kill. On its way are a message that is released as it is,
// one that is rewritten (its body is in another directory), and one that is
// quarantined, and of which somebody is told.
func TestKilledAtSystemCalls(t *testing.T) {
	for _, call := range changing {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			kills := 0
			for n, quiet := 1, 0; quiet < enough; n++ {
				s, far := strayed(t)
				told := s.tellsFile()
				quiet++
				if s.killAt(call, n, normal, superviseName, "--drain") {
					kills++
					quiet = 0
				}
				code, sum, errs := s.run(normal, "run", "--drain")
				if code != 0 {
					t.Fatalf("killed at %s %d: then exit %d\n%s%s", call, n, code, sum, errs)
				}
				s.account(map[int]bool{1: true}, nil)
				s.arrived(far)
				if text, terr := os.ReadFile(told); terr != nil || !strings.Contains(string(text), s.messages[1].ID) {
					t.Errorf("killed at %s %d: nobody was told of the quarantined message: %q", call, n, text)
				}
				s.nothingWaits(fmt.Sprintf("killed at %s %d", call, n), s.in, s.dir+"/far")
				if t.Failed() {
					return
				}
			}
			if kills == 0 {
				t.Errorf("no process was killed at %s: the program does not use it any more", call)
			}
			t.Logf("killed %d times at %s, lost 0, doubled 0", kills, call)
		})
	}
}

// strayed is a site with three messages, the second infected, and one more
// whose data file is in another directory.
func strayed(t *testing.T) (*site, sample.Message) {
	t.Helper()
	s := newSite(t, sample.Demo(3, 1, -1), "log: {level: error}\nbatch: {messages: 3}\nworkers: 1\n")
	far := sample.Demo(5, -1, -1)[4]
	far.Body = []byte("from afar\n")
	if err := os.Mkdir(s.dir+"/far", 0o700); err != nil {
		t.Fatal(err)
	}
	control := bytes.Replace(far.Control(), []byte("Fbs\n"), []byte("d"+s.dir+"/far\nFbs\n"), 1)
	for path, text := range map[string][]byte{s.dir + "/far/df" + far.ID: far.Body, s.in + "/qf" + far.ID: control} {
		if err := os.WriteFile(path, text, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return s, far
}

// arrived checks a rewritten message: control file and body beside each
// other on the outbound side, and nowhere else.
func (s *site) arrived(m sample.Message) {
	s.t.Helper()
	body, err := os.ReadFile(filepath.Join(s.out, "df"+m.ID))
	control, qerr := os.ReadFile(filepath.Join(s.out, "qf"+m.ID))
	if err != nil || qerr != nil || !bytes.Equal(body, m.Body) || bytes.Contains(control, []byte("\nd/")) || !bytes.Contains(control, []byte("RPFD:<"+m.To[0]+">\n")) {
		s.t.Errorf("%s: %v, %v\n%s%s", m.ID, err, qerr, control, body)
	}
	ids, err := filepath.Glob(s.out + "/qf*")
	if err != nil || len(ids) != len(s.messages) {
		s.t.Errorf("%d control files are outbound: %v, %v", len(ids), ids, err)
	}
}

// nothingWaits checks that no directory holds a message. What a death may
// leave where no journal names it is a body without a control file, or a file
// under a name that the MTA ignores: listings count both.
func (s *site) nothingWaits(point string, dirs ...string) {
	s.t.Helper()
	for _, dir := range dirs {
		left, err := filepath.Glob(dir + "/*")
		if err != nil {
			s.t.Fatal(err)
		}
		for _, path := range left {
			switch name := filepath.Base(path); name[:2] {
			case "df", "hb", "hc":
			default:
				s.t.Errorf("%s: left %s", point, path)
			}
		}
	}
}

// TestReleaseKilledAtSystemCalls does the same to holdfast quarantine
// release: the next one finishes it, and the message is out once.
func TestReleaseKilledAtSystemCalls(t *testing.T) {
	for _, call := range []string{"renameat2", "linkat", "unlinkat", "fsync", "pwrite64"} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, sample.Demo(1, 0, -1), "log: {level: error}\n")
			if code, out, errs := s.run(normal, "run", "--drain"); code != 0 {
				t.Fatalf("exit %d\n%s%s", code, out, errs)
			}
			m := s.messages[0]
			kills := 0
			for n, quiet := 1, 0; quiet < enough; n++ {
				quiet++
				if s.killAt(call, n, normal, "quarantine", "release", m.ID) {
					kills++
					quiet = 0
				}
				if code, out, errs := s.run(normal, "quarantine", "release", m.ID); code != 0 {
					t.Fatalf("killed at %s %d: then exit %d\n%s%s", call, n, code, out, errs)
				}
				point := fmt.Sprintf("killed at %s %d", call, n)
				if ids, err := filepath.Glob(s.out + "/*"); err != nil || len(ids) != 2 {
					t.Fatalf("%s: outbound %v, %v", point, ids, err)
				}
				bodies, err := filepath.Glob(s.out + "/df*")
				if err != nil || len(bodies) != 1 {
					t.Fatalf("%s: %v, %v", point, bodies, err)
				}
				if body, err := os.ReadFile(bodies[0]); err != nil || !bytes.Equal(body, m.Body) {
					t.Errorf("%s: %v, body %q", point, err, body)
				}
				s.nothingWaits(point, s.in)
				s.unrelease()
			}
			if kills == 0 {
				t.Errorf("no process was killed at %s: the program does not use it any more", call)
			}
			t.Logf("killed %d times at %s, lost 0, doubled 0", kills, call)
		})
	}
}

// unrelease takes the sample's release back: what is out goes, and the item
// forgets that it was released.
func (s *site) unrelease() {
	s.t.Helper()
	notes, err := filepath.Glob(s.dir + "/state/quarantine/2*/2*/released.json*")
	if err != nil || len(notes) == 0 {
		s.t.Fatalf("no note of the release: %v", err)
	}
	out, err := filepath.Glob(s.out + "/*")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range append(notes, out...) {
		if err := os.Remove(path); err != nil {
			s.t.Fatal(err)
		}
	}
}
