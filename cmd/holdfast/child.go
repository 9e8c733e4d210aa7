package main

import (
	"errors"
	"fmt"
	"os"

	"holdfast/poison/ledger"
	"holdfast/scan/sandbox"
	"holdfast/scan/worker"
)

// The names by which the program starts itself.
const (
	childWorker = "worker"
	childGuard  = "ledger-guard"
	childProbe  = "sandbox-probe"
)

// child runs a process of our own, before anything else is set up.
func child(args []string) (code int, ok bool) {
	if len(args) == 0 {
		return 0, false
	}
	switch {
	case args[0] == childWorker && len(args) == 1:
		return worker.Main(version), true
	case args[0] == childGuard && len(args) == 2:
		return walk(args[1]), true
	case args[0] == childProbe && len(args) == 1:
		return probe(), true
	}
	return 0, false
}

// What a guard ends with when it has nothing to say about the file: another
// process has it, or it could not be opened. Any other end but 0 is damage.
const (
	guardInUse  = 75 // EX_TEMPFAIL of sysexits(3)
	guardCannot = 74 // EX_IOERR
)

// walk visits every page and row of a ledger.
func walk(path string) (code int) {
	err := ledger.Walk(path)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ledger.ErrInUse):
		return guardInUse
	case errors.Is(err, ledger.ErrDamaged):
		code = 1
	default:
		code = guardCannot
	}
	fmt.Fprintln(os.Stderr, err)
	return code
}

// probe shuts itself in as a worker does, and says what that did not cover.
func probe() int {
	err := sandbox.Restrict(sandbox.Limits{Memory: 512 << 20})
	for _, open := range sandbox.SelfTest() {
		fmt.Println(open)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}
