package poison

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"math/bits"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the expected output of transcripts")

// TestTranscripts runs scripts of events and compares what the machine asks
// for. A line is an event; what stands below "----" is its outcome.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/transcripts/*.txt")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d transcripts, %v", len(files), err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got := transcript(t, text)
			if *update {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if !bytes.Equal(got, text) {
				t.Errorf("got\n%s", got)
			}
		})
	}
}

func transcript(t *testing.T, text []byte) []byte {
	t.Helper()
	m := New()
	var out bytes.Buffer
	in := bufio.NewScanner(bytes.NewReader(text))
	skipping := false
	for in.Scan() {
		line := in.Text()
		switch {
		case strings.HasPrefix(line, "#"):
			out.WriteString(line + "\n")
		case line == "":
			out.WriteString("\n")
			skipping = false
		case line == "----":
			skipping = true
		case !skipping:
			out.WriteString(line + "\n----\n")
			for _, a := range m.Step(event(t, line)) {
				fmt.Fprintln(&out, describe(a))
			}
		}
	}
	return out.Bytes()
}

// event reads "arrived fresh a b c", "ended 1 passed=a,b stamp=c crash:SEGV",
// "canary 2 pass", "canary 2 fail", "waited 3", "gone a".
func event(t *testing.T, line string) Event {
	t.Helper()
	f := strings.Fields(line)
	id := func(s string) RunID {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		return RunID(n)
	}
	switch f[0] {
	case "arrived":
		e := Arrived{From: map[string]Origin{"fresh": Fresh, "dead": DeadHere, "alone": AloneFirst, "supervisor": SupervisorDied}[f[1]]}
		for _, k := range f[2:] {
			e.Keys = append(e.Keys, Key(k))
		}
		return e
	case "ended":
		e := Ended{Run: id(f[1])}
		for _, w := range f[2:] {
			if v, ok := strings.CutPrefix(w, "passed="); ok {
				for _, k := range strings.Split(v, ",") {
					e.Passed = append(e.Passed, Key(k))
				}
			} else if v, ok := strings.CutPrefix(w, "stamp="); ok {
				e.Stamp = Key(v)
			} else {
				class, sig, _ := strings.Cut(w, ":")
				e.Death = &Death{Class: Class(class), Signature: sig}
			}
		}
		return e
	case "canary":
		e := CanaryEnded{Run: id(f[1]), Passed: f[2] == "pass", Version: "1"}
		if len(f) > 3 {
			e.Version = f[3]
		}
		return e
	case "waited":
		return Waited{ID: id(f[1])}
	case "gone":
		return Gone{Key: Key(f[1])}
	}
	t.Fatalf("unknown event %q", line)
	return nil
}

func describe(a Action) string {
	switch a := a.(type) {
	case Run:
		s := fmt.Sprintf("run %d %s %v", a.ID, []string{"main", "isolation"}[a.Lane], a.Keys)
		if a.Exclusive {
			s += " exclusive"
		}
		if a.More {
			s += " more memory"
		}
		return s
	case RunCanary:
		return fmt.Sprintf("canary %d like %q", a.ID, a.Like)
	case Convict:
		return fmt.Sprintf("convict %s %v", a.Key, a.Deaths)
	case Unscannable:
		return fmt.Sprintf("unscannable %s %v", a.Key, a.Deaths)
	case Unexplained:
		return fmt.Sprintf("unexplained %v %v", a.Keys, a.Deaths)
	case Breaker:
		return fmt.Sprintf("breaker open=%v %s", a.Open, a.Why)
	case Wait:
		return fmt.Sprintf("wait %d %v", a.ID, a.For)
	}
	return fmt.Sprintf("%#v", a)
}

// weekend drives a machine with a simulated world and checks what must hold
// at every step.
type weekend struct {
	t         *testing.T
	r         *rand.Rand
	m         *Machine
	killers   map[Key]float64 // chance to kill
	stampGood float64         // chance that a stamp is right
	noStamp   bool
	ambient   float64 // chance of a resource end of any run
	broken    int     // canaries that still fail
	queue     []Action
	running   map[Key]bool
	deaths    int
	convicted []Key
	settled   map[Key]string
}

func (w *weekend) step(e Event) {
	for _, a := range w.m.Step(e) {
		switch a := a.(type) {
		case Run:
			for _, k := range a.Keys {
				if w.running[k] || w.settled[k] != "" {
					w.t.Fatalf("%s runs twice, or again after it was %q", k, w.settled[k])
				}
				w.running[k] = true
			}
			w.queue = append(w.queue, a)
		case RunCanary, Wait:
			w.queue = append(w.queue, a)
		case Convict:
			w.convicted = append(w.convicted, a.Key)
			w.settled[a.Key] = "convicted"
			if w.killers[a.Key] == 0 {
				w.t.Fatalf("an innocent is convicted: %s by %v", a.Key, a.Deaths)
			}
		case Unscannable:
			w.settled[a.Key] = "unscannable"
			if w.killers[a.Key] == 0 && w.ambient == 0 {
				w.t.Fatalf("an innocent is unscannable: %s", a.Key)
			}
		}
	}
}

func (w *weekend) run(a Run) {
	e := Ended{Run: a.ID}
	for _, k := range a.Keys {
		delete(w.running, k)
	}
	for i, k := range a.Keys {
		kill := w.r.Float64() < w.killers[k]
		other := w.r.Float64() < w.ambient
		if !kill && !other {
			e.Passed = append(e.Passed, k)
			w.settled[k] = "passed"
			continue
		}
		e.Death = &Death{Class: ClassCrash, Signature: "SIGSEGV"}
		if other && !kill {
			e.Death = &Death{Class: ClassResource, Signature: "SIGKILL"}
		} else {
			w.deaths++
		}
		if !w.noStamp {
			e.Stamp = k
			if w.r.Float64() >= w.stampGood {
				e.Stamp = a.Keys[i+w.r.Intn(len(a.Keys)-i)]
			}
		}
		break
	}
	w.step(e)
}

func (w *weekend) drain() {
	for n := 0; len(w.queue) > 0; n++ {
		if n > 1_000_000 {
			w.t.Fatal("it never ends")
		}
		i := w.r.Intn(len(w.queue))
		a := w.queue[i]
		w.queue = slices.Delete(w.queue, i, i+1)
		switch a := a.(type) {
		case Run:
			w.run(a)
		case RunCanary:
			pass := w.broken == 0
			w.broken = max(0, w.broken-1)
			w.step(CanaryEnded{Run: a.ID, Passed: pass, Version: "1"})
		case Wait:
			w.step(Waited{ID: a.ID})
		}
	}
}

func TestWeekends(t *testing.T) {
	for seed := range int64(3000) {
		r := rand.New(rand.NewSource(seed))
		w := &weekend{t: t, r: r, m: New(), killers: map[Key]float64{}, stampGood: 1, running: map[Key]bool{}, settled: map[Key]string{}}
		n := 30 + r.Intn(300)
		d := 1 + r.Intn(5)
		for range d {
			w.killers[Key(fmt.Sprint("m", r.Intn(n)))] = 1
		}
		switch seed % 5 {
		case 1:
			w.stampGood = 0.9
		case 2:
			w.noStamp = true
		case 3:
			w.broken = r.Intn(4)
			w.ambient = 0.01
		case 4:
			for k := range w.killers {
				w.killers[k] = 0.1 + 0.8*r.Float64()
			}
		}
		for at := 0; at < n; at += 30 {
			var keys []Key
			for i := at; i < min(at+30, n); i++ {
				keys = append(keys, Key(fmt.Sprint("m", i)))
			}
			w.step(Arrived{Keys: keys})
		}
		w.drain()
		if len(w.settled) != n || w.m.Unsettled() != 0 {
			t.Fatalf("seed %d: %d of %d settled, %d in the machine", seed, len(w.settled), n, w.m.Unsettled())
		}
		guilty := len(w.killers)
		switch seed % 5 {
		case 0:
			if len(w.convicted) != guilty || w.deaths > guilty*(1+2) {
				t.Fatalf("seed %d: %d of %d convicted, %d deaths, bound %d", seed, len(w.convicted), guilty, w.deaths, guilty*3)
			}
		case 2:
			if bound := guilty * (bits.Len(29) + 2); len(w.convicted) != guilty || w.deaths > bound {
				t.Fatalf("seed %d: %d of %d convicted, %d deaths, bound %d", seed, len(w.convicted), guilty, w.deaths, bound)
			}
		}
	}
}

// FuzzMachine: no sequence of events makes it panic, run an item twice at a
// time, or forget one.
func FuzzMachine(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := New()
		out := map[RunID][]Key{}
		for i := 0; i+2 < len(b); i += 3 {
			id, k := RunID(b[i+1]%32), Key(string(rune('a'+b[i+2]%8)))
			var e Event
			switch b[i] % 6 {
			case 0:
				e = Arrived{Keys: []Key{k, Key(string(rune('a' + b[i+1]%8)))}, From: Origin(b[i+1] % 4)}
			case 1:
				e = Ended{Run: id, Stamp: k, Death: &Death{Class: []Class{ClassCrash, ClassResource, ClassMemory, ClassFailure}[b[i+2]%4], Signature: "x"}}
				delete(out, id)
			case 2:
				e = Ended{Run: id, Passed: []Key{k}}
				delete(out, id)
			case 3:
				e = CanaryEnded{Run: id, Passed: b[i+2]%2 == 0, Version: "1"}
			case 4:
				e = Waited{ID: id}
			case 5:
				e = Gone{Key: k}
				for id := range out {
					out[id] = slices.DeleteFunc(out[id], func(x Key) bool { return x == k })
				}
			}
			for _, a := range m.Step(e) {
				if r, ok := a.(Run); ok {
					for _, k := range r.Keys {
						for _, other := range out {
							if slices.Contains(other, k) {
								t.Fatalf("%s runs twice", k)
							}
						}
					}
					out[r.ID] = slices.Clone(r.Keys)
				}
			}
		}
	})
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		name string
		exit Exit
		said string
		bye  bool
		want string
	}{
		{"well", Exit{}, "", true, ""},
		{"without bye", Exit{}, "", false, "failure"},
		{"signal", Exit{Signal: 11, Code: -1}, "", false, "crash"},
		{"signal after bye", Exit{Signal: 11, Code: -1}, "", true, "crash"},
		{"killed by somebody", Exit{Signal: 9, Code: -1}, "", false, "resource"},
		{"killed by us, CPU", Exit{Signal: 9, Code: -1, Killed: KilledCPU}, "", false, "hang"},
		{"killed by us, wall", Exit{Signal: 9, Code: -1, Killed: KilledWall}, "", false, "failure"},
		{"stopped", Exit{Signal: 9, Code: -1, Killed: KilledStopped}, "", false, "resource"},
		{"lied", Exit{Signal: 9, Code: -1, Killed: KilledStopped}, "protocol error: x", false, "protocol"},
		{"panic", Exit{Code: 2, Stderr: "panic: boom 0x12\n", Crash: "goroutine 1 [running]:\nholdfast/scan/part.walk(0x1)\n"}, "", false, "crash"},
		{"memory", Exit{Code: 2, Stderr: "fatal error: runtime: out of memory\n", Crash: "runtime stack:\n"}, "", false, "memory"},
		{"SIGXCPU", Exit{Signal: 24, Code: -1}, "", false, "hang"},
	} {
		d := Classify(c.exit, c.said, c.bye)
		got := ""
		if d != nil {
			got = string(d.Class)
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	a := Classify(Exit{Code: 2, Stderr: "panic: index 5 out of range [3] 0xc000123\n", Crash: "goroutine 7:\nx.y(0xc1)\n\tfile.go:12\n"}, "", false)
	b := Classify(Exit{Code: 2, Stderr: "panic: index 9 out of range [8] 0xc0ff\n", Crash: "goroutine 9:\nx.y(0xd1)\n\tfile.go:12\n"}, "", false)
	if a.Signature != b.Signature || !strings.Contains(a.Signature, "x.y") {
		t.Errorf("signatures of one defect differ: %q, %q", a.Signature, b.Signature)
	}
}
