package main

import (
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
		if err := ledger.Walk(args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1, true
		}
		return 0, true
	case args[0] == childProbe && len(args) == 1:
		return probe(), true
	}
	return 0, false
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
