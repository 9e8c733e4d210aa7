//go:build faults

package worker

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// restoreDefault sets SIG_DFL below the Go runtime, which keeps handlers of
// its own for faults (rt_sigaction(2), kernel layout).
func restoreDefault(sig unix.Signal) {
	var act [4]uintptr
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&act[0])), 0, 8, 0, 0)
}
