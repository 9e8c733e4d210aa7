// Package scan holds what flows when a message is judged: what was found in
// it, what policy says about that, and the verdict.
package scan

import (
	"fmt"
	"slices"
	"time"

	"holdfast/queue"
)

// Report is what one worker found in one message. It comes from a process
// that has touched hostile input: every field is bounded on arrival.
type Report struct {
	Parts      []Part    `json:"parts"`
	Findings   []Finding `json:"findings"`
	MessageID  string    `json:"message_id,omitempty"`
	Subject    string    `json:"subject,omitempty"`
	Incomplete []string  `json:"incomplete,omitempty"` // limits that ended the inspection
}

// Part is one leaf of the message.
type Part struct {
	Path     string `json:"path"` // "1.2": the second part of the first
	Type     string `json:"type"`
	Name     string `json:"name,omitempty"`
	Encoding string `json:"encoding,omitempty"`
	Size     int64  `json:"size"` // decoded, bytes
}

// Finding is one thing found.
type Finding struct {
	Rule   string `json:"rule"` // stable: "signature/eicar", "mime/…"
	Part   string `json:"part,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// Rules of findings that policy knows.
const (
	RuleEICAR = "signature/eicar"
	RuleGTUBE = "signature/gtube"
)

// Disposition is what is done with a message.
type Disposition string

// The dispositions of a verdict.
const (
	Release    Disposition = "release"
	Quarantine Disposition = "quarantine"
	Hold       Disposition = "hold" // it stays in the inbound queue
)

// Rule is one line of policy.
type Rule struct {
	Do     Disposition
	Source string // file:line of the configuration, "default"
}

// Policy says what happens to mail that is not clean.
type Policy struct {
	Infected, SpamTest, Incomplete, Unscannable, Convicted, Unchangeable Rule

	MaxMessage int64 // bytes; a larger message is unscannable
}

// Verdict is what is done with a message, and why.
type Verdict struct {
	Disposition Disposition `json:"disposition"`
	Reasons     []Reason    `json:"reasons,omitempty"`
}

// Reason is one rule that took part in a verdict.
type Reason struct {
	Rule   string `json:"rule"`
	Text   string `json:"text,omitempty"`
	Part   string `json:"part,omitempty"`
	Source string `json:"source,omitempty"`
}

// Stage is how long one step took.
type Stage struct {
	Name string
	Took time.Duration
}

// Decide turns a report into a verdict. It is pure. The hardest disposition
// of all reasons wins: quarantine, hold, release.
func Decide(p Policy, _ queue.Envelope, r Report) Verdict {
	v := Verdict{Disposition: Release}
	for _, f := range r.Findings {
		switch f.Rule {
		case RuleEICAR:
			v.because(p.Infected, Reason{Rule: f.Rule, Text: "EICAR test file found", Part: f.Part})
		case RuleGTUBE:
			v.because(p.SpamTest, Reason{Rule: f.Rule, Text: "GTUBE test string found", Part: f.Part})
		}
	}
	for _, limit := range r.Incomplete {
		v.because(p.Incomplete, Reason{Rule: "incomplete", Text: "not fully inspected: " + limit})
	}
	return v
}

// DecideDeaths is the verdict on a message that no worker could finish:
// killed says that it kills what parses it, otherwise it cannot be scanned.
func DecideDeaths(p Policy, killed bool, deaths []string) Verdict {
	v := Verdict{Disposition: Release}
	rule, name, text := p.Unscannable, "unscannable", "could not be scanned"
	if killed {
		rule, name, text = p.Convicted, "convicted", "kills what parses it"
	}
	for i, d := range deaths {
		text += fmt.Sprintf("; run %d: %s", i+1, d)
	}
	v.because(rule, Reason{Rule: name, Text: text})
	return v
}

// TooLarge is the verdict on a message over the size limit.
func TooLarge(p Policy, size int64) Verdict {
	v := Verdict{Disposition: Release}
	v.because(p.Unscannable, Reason{Rule: "unscannable", Text: fmt.Sprintf("%d bytes, more than limits.message (%d)", size, p.MaxMessage)})
	return v
}

// Unchangeable is the verdict on a message that would have to be changed, or
// delivered to some recipients only, and cannot without loss: what was wanted,
// and the reason that it is not done.
func Unchangeable(p Policy, wanted Verdict, why string) Verdict {
	v := Verdict{Disposition: Release, Reasons: wanted.Reasons}
	v.because(p.Unchangeable, Reason{Rule: "unchangeable", Text: why})
	if v.Disposition == Release { // never delivered as it is
		v.Disposition = Hold
	}
	return v
}

// because adds a reason. What was found in a part, and again in the message as
// it is, was found once.
func (v *Verdict) because(r Rule, why Reason) {
	why.Source = r.Source
	at := slices.IndexFunc(v.Reasons, func(have Reason) bool {
		same := have.Rule == why.Rule && have.Text == why.Text
		return same && (have.Part == why.Part || have.Part == "" || why.Part == "")
	})
	switch {
	case at < 0:
		v.Reasons = append(v.Reasons, why)
	case v.Reasons[at].Part == "":
		v.Reasons[at].Part = why.Part
	}
	if rank(r.Do) > rank(v.Disposition) {
		v.Disposition = r.Do
	}
}

func rank(d Disposition) int {
	switch d {
	case Release:
		return 0
	case Hold:
		return 1
	}
	return 2 // an unknown word must not mean release
}
