//go:build faults

package sendmail

import "bytes"

// faultAtRead panics on a message that asks for it: a planted defect of the
// control file parser.
func faultAtRead(control []byte) {
	if bytes.Contains(control, []byte("X-Holdfast-Fault: panic@qf")) {
		panic("planted fault in the control file parser")
	}
}
