//go:build faults

package gateway

import (
	"bytes"
	"fmt"
)

// faultAt panics if the message asks for it: a planted defect of the
// supervisor, for tests of what happens when Holdfast itself dies.
func faultAt(step string, m *message) {
	header, _, _ := bytes.Cut(m.sniff(64<<10), []byte("\n\n"))
	if bytes.Contains(header, []byte("X-Holdfast-Fault: panic@"+step)) {
		panic(fmt.Sprintf("planted fault at %s on %s", step, m.id()))
	}
}
