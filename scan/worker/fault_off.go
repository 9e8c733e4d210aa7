//go:build !faults

package worker

import "io"

// fault and faultHere do nothing in a normal build.
func (w *worker) fault(string, io.ReaderAt) {}
func (w *worker) faultHere(string)          {}
