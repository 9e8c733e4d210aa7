package poison

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// Class is a kind of end.
type Class string

// The classes (CUSTODY 6).
const (
	ClassCrash    Class = "crash"    // a signal of its own making, a fatal error
	ClassHang     Class = "hang"     // CPU time, measured by the supervisor
	ClassMemory   Class = "memory"   // its memory limit
	ClassResource Class = "resource" // a signal that we did not send and it did not make
	ClassFailure  Class = "failure"  // it answered that it failed, or waited too long
	ClassProtocol Class = "protocol" // it broke the protocol
)

func (c Class) strike() bool { return c == ClassCrash || c == ClassHang || c == ClassMemory }

// Death is how a run ended badly.
type Death struct {
	Class     Class  `json:"class"`
	Signature string `json:"signature"` // the same for deaths of one kind
	Stage     string `json:"stage,omitempty"`
	Part      string `json:"part,omitempty"`
}

// String describes it in a few words.
func (d Death) String() string {
	s := fmt.Sprintf("%s (%s)", d.Signature, d.Class)
	if d.Stage != "" {
		s += " at " + d.Stage
	}
	if d.Part != "" {
		s += " of part " + d.Part
	}
	return s
}

// Exit is how a process ended.
type Exit struct {
	Signal syscall.Signal // 0 if it exited
	Code   int
	CPU    time.Duration
	MaxRSS int64 // bytes
	Stderr string
	Crash  string // what the Go runtime wrote when it died
	Killed string // why we killed it, "" if we did not
}

// Reasons for which we kill a process.
const (
	KilledCPU     = "cpu time"
	KilledWall    = "wall time"
	KilledStopped = "stopped"
)

// Classify says what an end means. said is what was wrong with what the
// process told us, "" if nothing, and bye whether it ended its work in order:
// a worker of ours has ended well only after its bye.
func Classify(x Exit, said string, bye bool) *Death {
	switch {
	case x.Killed == KilledCPU:
		return &Death{Class: ClassHang, Signature: "cpu time exceeded"}
	case said != "":
		return &Death{Class: ClassProtocol, Signature: said}
	case x.Killed == KilledWall:
		return &Death{Class: ClassFailure, Signature: "wall time exceeded"}
	case x.Killed != "":
		return &Death{Class: ClassResource, Signature: x.Killed}
	case x.Signal == syscall.SIGXCPU:
		return &Death{Class: ClassHang, Signature: "cpu time exceeded"}
	case x.Signal == syscall.SIGSEGV, x.Signal == syscall.SIGBUS, x.Signal == syscall.SIGILL, x.Signal == syscall.SIGFPE,
		x.Signal == syscall.SIGABRT, x.Signal == syscall.SIGTRAP, x.Signal == syscall.SIGSYS:
		return &Death{Class: ClassCrash, Signature: signalName(x.Signal)}
	case x.Signal != 0:
		return &Death{Class: ClassResource, Signature: signalName(x.Signal)}
	case bye:
		return nil
	case x.Code == 2 && x.Crash != "":
		return fatal(x.Stderr + "\n" + x.Crash)
	}
	return &Death{Class: ClassFailure, Signature: fmt.Sprintf("exit status %d before its bye", x.Code)}
}

func signalName(s syscall.Signal) string {
	names := map[syscall.Signal]string{
		syscall.SIGSEGV: "SIGSEGV", syscall.SIGBUS: "SIGBUS", syscall.SIGILL: "SIGILL", syscall.SIGFPE: "SIGFPE",
		syscall.SIGABRT: "SIGABRT", syscall.SIGTRAP: "SIGTRAP", syscall.SIGSYS: "SIGSYS", syscall.SIGKILL: "SIGKILL",
		syscall.SIGTERM: "SIGTERM", syscall.SIGINT: "SIGINT", syscall.SIGHUP: "SIGHUP", syscall.SIGPIPE: "SIGPIPE",
	}
	if n := names[s]; n != "" {
		return n
	}
	return fmt.Sprintf("signal %d", int(s))
}

var (
	address = regexp.MustCompile(`0x[0-9a-f]+|\b[0-9]+\b`)
	frame   = regexp.MustCompile(`(?m)^([\w./*()\[\]-]+)\(`)
)

const maxFrames = 4

// fatal reads a Go runtime's last words (runtime/panic.go). Its first line goes
// to standard error only, the rest to the crash descriptor as well:
// the line that names the error, without numbers, and the top frames.
func fatal(text string) *Death {
	first := "fatal error"
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "fatal error:") || strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "SIG") {
			first = line
			break
		}
	}
	d := &Death{Class: ClassCrash, Signature: address.ReplaceAllString(first, "N")}
	if strings.Contains(first, "out of memory") || strings.Contains(first, "cannot allocate memory") {
		d.Class, d.Signature = ClassMemory, "out of memory"
		return d
	}
	n := 0
	for _, f := range frame.FindAllStringSubmatch(text, 40) {
		if strings.HasPrefix(f[1], "runtime.") || strings.HasPrefix(f[1], "panic") {
			continue
		}
		d.Signature += " < " + f[1]
		if n++; n == maxFrames {
			break
		}
	}
	if len(d.Signature) > 500 {
		d.Signature = d.Signature[:500]
	}
	return d
}
