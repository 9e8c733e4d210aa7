//go:build !faults

package sendmail

// faultAtRead does nothing in a normal build.
func faultAtRead([]byte) {}
