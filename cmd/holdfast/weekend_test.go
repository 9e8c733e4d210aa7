package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"holdfast/cmd/holdfast/internal/sample"
)

// BenchmarkWeekend drains the same mail with no message that kills its worker,
// with 3 of 2,000, and with 3 %, in one run: the figures are to be compared with
// each other. make bench-weekend N=66000 has more mail.
func BenchmarkWeekend(b *testing.B) {
	n, err := strconv.Atoi(os.Getenv("HOLDFAST_WEEKEND"))
	if err != nil || n < 100 {
		n = 2000
	}
	for range b.N {
		var calm time.Duration
		for _, killers := range []int{0, max(1, 3*n/2000), 3 * n / 100} {
			took, out, kept := weekend(b, n, killers)
			if calm == 0 {
				calm = took
			}
			b.Logf("%6d messages, %4d killers: %7.2f s, %6.0f messages/s, %5.2f times the calm; out %d, quarantined %d",
				n, killers, took.Seconds(), float64(n)/took.Seconds(), took.Seconds()/calm.Seconds(), out, kept)
			if kept != killers || out != n-killers {
				b.Errorf("%d killers: an innocent was quarantined, or a message is missing", killers)
			}
		}
	}
}

func weekend(b *testing.B, n, killers int) (took time.Duration, out, kept int) {
	b.Helper()
	dir, err := os.MkdirTemp("", "holdfast-weekend-")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	must(os.Chmod(dir, 0o755))
	for _, d := range []string{"/in", "/out"} {
		must(os.Mkdir(dir+d, 0o700))
	}
	faults := map[int]string{}
	for i := range killers {
		faults[(i*n/killers+7)%n] = "segv@part"
	}
	for i, m := range sample.Demo(n, -1, -1) {
		if f := faults[i]; f != "" {
			m.Header = "X-Holdfast-Fault: " + f + "\n" + m.Header
		}
		must(m.Write(dir + "/in"))
	}
	text := fmt.Sprintf("state: %[1]s/state\nqueues: [{name: mta, type: sendmail, in: %[1]s/in, out: %[1]s/out, kick: none}]\nmin_free: 1MB\nlog: {level: error}\n", dir)
	must(os.WriteFile(dir+"/c.yaml", []byte(text), 0o600))
	start := time.Now()
	if answer, err := exec.Command(faulty, "run", "--drain", "-c", dir+"/c.yaml").CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, answer)
	}
	took = time.Since(start)
	released, err := filepath.Glob(dir + "/out/qf*")
	must(err)
	items, err := filepath.Glob(dir + "/state/quarantine/2*/2*")
	must(err)
	return took, len(released), len(items)
}
