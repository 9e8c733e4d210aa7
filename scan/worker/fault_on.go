//go:build faults

package worker

import (
	"bytes"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/scan/wire"
)

// asked is the fault that the message in work asks for: DEATH@STAGE. One
// message at a time is in a worker, so one variable is enough.
var asked string

// fault reads the message's header for a wish, and dies here if it says so.
func (w *worker) fault(stage string, body io.ReaderAt) {
	b := make([]byte, 64<<10)
	n, err := body.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return
	}
	head, _, _ := bytes.Cut(b[:n], []byte("\n\n"))
	asked = ""
	for line := range strings.Lines(string(head)) {
		if v, ok := strings.CutPrefix(line, "X-Holdfast-Fault: "); ok {
			asked = strings.TrimSpace(v)
		}
	}
	w.faultHere(stage)
}

func (w *worker) faultHere(stage string) {
	words := strings.Fields(asked) // DEATH@STAGE, and what an attack needs
	if len(words) == 0 {
		return
	}
	death, at, ok := strings.Cut(words[0], "@")
	if !ok || at != stage {
		return
	}
	if name, ok := strings.CutPrefix(death, "attack-"); ok {
		w.attack(name, words[1:])
		return
	}
	switch death {
	case "segv":
		die(unix.SIGSEGV)
	case "abort":
		die(unix.SIGABRT)
	case "exit":
		os.Exit(3)
	case "panic":
		panic("planted fault in the worker")
	case "hang":
		time.Sleep(time.Hour)
	case "spin":
		for n := 0; n >= 0; n &= 0xFFFF { // never ends
			n++
		}
	case "oom":
		var all [][]byte
		for {
			b := make([]byte, 16<<20)
			for i := range b {
				b[i] = 1
			}
			all = append(all, b)
			_ = all
		}
	case "stack":
		if deep(1) == 0 {
			return
		}
	case "garbage":
		_, _ = unix.Write(ConnFD, []byte("garbage"))
	case "token": // of another message
		w.token[0] ^= 0xFF
	case "sequence":
		w.seq += 7
	case "bye": // with work to do
		_ = w.send(wire.Frame{Kind: wire.Bye})
	case "flood":
		for {
			_ = w.say(wire.Stamp, wire.At{Stage: "flood"})
		}
	}
}

func deep(n int) int {
	if n == 0 {
		return 0
	}
	return deep(n+1) + 1
}

// die ends this process by a real signal, not by Go's handler for it.
func die(sig unix.Signal) {
	signal.Reset(sig)
	restoreDefault(sig)
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), sig)
	time.Sleep(time.Minute)
}
