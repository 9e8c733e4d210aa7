package scan

import (
	"fmt"
	"testing"

	"holdfast/queue"
)

// TestOneFindingIsOneReason: what is in a part is in the message as well, and
// is said once, with the part; what is in two parts is said twice.
func TestOneFindingIsOneReason(t *testing.T) {
	p := Policy{SpamTest: Rule{Do: Quarantine, Source: "x.yaml:1"}, Infected: Rule{Do: Hold}}
	for _, c := range []struct {
		found []Finding
		want  string
	}{
		{[]Finding{{Rule: RuleGTUBE, Part: "1"}, {Rule: RuleGTUBE}}, "signature/gtube 1;"},
		{[]Finding{{Rule: RuleGTUBE}, {Rule: RuleGTUBE, Part: "1"}}, "signature/gtube 1;"},
		{[]Finding{{Rule: RuleGTUBE}}, "signature/gtube ;"},
		{[]Finding{{Rule: RuleGTUBE, Part: "1"}, {Rule: RuleGTUBE, Part: "2"}, {Rule: RuleGTUBE}}, "signature/gtube 1;signature/gtube 2;"},
		{[]Finding{{Rule: RuleGTUBE, Part: "1"}, {Rule: RuleEICAR, Part: "1"}}, "signature/gtube 1;signature/eicar 1;"},
	} {
		v := Decide(p, queue.Envelope{}, Report{Findings: c.found})
		got := ""
		for _, r := range v.Reasons {
			got += fmt.Sprintf("%s %s;", r.Rule, r.Part)
		}
		if got != c.want || v.Disposition != Quarantine {
			t.Errorf("%v: %s, %s, want %s", c.found, v.Disposition, got, c.want)
		}
	}
}
