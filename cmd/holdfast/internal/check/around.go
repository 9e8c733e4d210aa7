package check

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/conf"
)

// waysAround looks for ways by which mail would leave the inbound queue
// without having been scanned.
func (k *checker) waysAround(ctx context.Context) {
	before := len(k.out)
	a := &around{checker: k, in: k.expanded(func(q *conf.Queue) conf.List { return q.In }), out: k.expanded(func(q *conf.Queue) conf.List { return q.Out })}
	a.readCF()
	a.debian()
	a.running()
	if !a.listener {
		k.say(Warning, "bypass", "see that it has -ODeliveryMode=queueonly and -OPrivacyOptions=noetrn",
			"how the listener is started that queues for Holdfast was not examined: neither %s nor a running process shows it", filepath.Join(k.MailDir, "sendmail.conf"))
	}
	k.etrn(ctx)
	if len(k.out) == before {
		k.say(OK, "bypass", "", "no queue runner on an inbound directory, and no ETRN, was found")
	}
}

// around is what is known of the machine's sendmail.
type around struct {
	*checker
	in, out  []string
	cf       options
	cfErr    error
	listener bool // its options were seen
}

// expanded are the directories that exist of all sendmail queues.
func (k *checker) expanded(of func(*conf.Queue) conf.List) []string {
	var out []string
	for i := range k.conf.Queues {
		for _, pattern := range of(&k.conf.Queues[i]) {
			paths, err := filepath.Glob(pattern)
			if err != nil {
				continue // reported with the queue
			}
			out = append(out, paths...)
		}
	}
	return out
}

func (a *around) readCF() {
	path := filepath.Join(a.MailDir, "sendmail.cf")
	if a.cf, a.cfErr = readCF(path); a.cfErr != nil {
		a.say(Warning, "bypass", "let it be read, or see that no sendmail without -OQueueDirectory runs an inbound queue",
			"sendmail's configuration was not examined: %v", a.cfErr)
	}
}

// running looks at running processes: who runs an inbound queue, and how the
// listener was started. A title shows a runner's directory, and hides a
// listener's options: those stand in its pid file.
func (a *around) running() {
	all, err := processes(a.Proc)
	if err != nil {
		a.say(Warning, "bypass", "mount /proc", "running processes cannot be listed: %v", err)
		return
	}
	patterns := a.PidFiles
	if a.cf.pidFile != "" {
		patterns = append([]string{a.cf.pidFile}, patterns...)
	}
	noted := pidFiles(patterns)
	for _, p := range all {
		if p.words == nil {
			p.words = noted[p.pid]
		}
		switch {
		case slices.ContainsFunc(a.in, p.runs):
			a.runner(p)
		case p.words != nil:
			a.judge(p, readCommand(p.words))
		case standing.MatchString(p.title):
			a.unknown(p)
		}
	}
}

func (a *around) runner(p process) {
	a.say(Failure, "bypass", "stop it, and remove -q from the daemon that writes this directory",
		"process %d (%s) runs an inbound queue, and so delivers mail unscanned", p.pid, p.title)
}

func (a *around) unknown(p process) {
	a.say(Warning, "bypass", "see how it was started: it must not have both -q and an inbound QueueDirectory",
		"not verifiable: process %d (%s) shows its options neither itself nor in a pid file", p.pid, p.title)
}

// judge looks at one process whose command line is known.
func (a *around) judge(p process, o options) {
	if !o.runner && !o.daemon || o.submit {
		return
	}
	cf, err := a.cf, a.cfErr
	if o.cf != "" {
		cf, err = readCF(o.cf)
	}
	if o.dir == "" && err != nil {
		a.unknown(p)
		return
	}
	if o = o.over(cf); o.runner && o.among(a.in) {
		a.runner(p)
	}
	if o.daemon {
		a.judgeListener(fmt.Sprintf("process %d", p.pid), "start it with", "", o)
	}
}

// judgeListener looks at what a listener does with the mail that it takes.
func (a *around) judgeListener(who, do, then string, o options) {
	a.listener = true
	switch {
	case o.among(a.in):
	case o.among(a.out) && o.queueOnly():
		a.say(Failure, "bypass", "exchange in and out, or correct -OQueueDirectory",
			"%s: it queues into %s, an outbound directory: in and out look swapped", who, o.dir)
		return
	default:
		a.say(Failure, "bypass", do+" -OQueueDirectory=, -ODeliveryMode=queueonly and -OPrivacyOptions=noetrn"+then,
			"%s: the mail that it takes goes to %s, past Holdfast, and is delivered unscanned", who, o.dir)
		return
	}
	if !o.queueOnly() {
		a.say(Failure, "bypass", do+" -ODeliveryMode=queueonly"+then, "%s: the listener delivers at once instead of queueing for Holdfast", who)
	}
	if !o.noETRN() {
		a.say(Failure, "bypass", do+" -OPrivacyOptions=noetrn"+then, "%s: any client may send ETRN, which delivers mail of the inbound queue unscanned", who)
	}
}

// debian reads Debian's /etc/mail/sendmail.conf, where the listener's options
// stand (reference: queue-formats.md, C1).
func (a *around) debian() {
	path := filepath.Join(a.MailDir, "sendmail.conf")
	text, err := os.ReadFile(path)
	if err != nil {
		return // another system, or sendmail is set up in another way
	}
	parms, found := "", false
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "DAEMON_PARMS="); ok {
			parms, found = strings.Trim(v, `"'; `), true
		}
	}
	if !found {
		return
	}
	o := readCommand(strings.Fields(parms)).over(a.cf)
	if o.dir == "" {
		return // it stands in the .cf file, which was not examined, and that was said
	}
	a.judgeListener(path, "add to DAEMON_PARMS", ", then sendmailconfig and restart", o)
}

const smtpTimeout = 5 * time.Second

// etrn asks the listener whether it offers ETRN (RFC 1985).
func (k *checker) etrn(ctx context.Context) {
	const name = "name the listener that queues for Holdfast: --smtp HOST:PORT"
	if k.SMTP == "" {
		k.say(Warning, "bypass", name, "ETRN was not checked: no listener is named")
		return
	}
	features, err := ehlo(ctx, k.SMTP)
	switch {
	case err != nil:
		k.say(Warning, "bypass", name, "ETRN was not checked: the listener at %s does not answer: %v", k.SMTP, err)
	case strings.Contains(features, "ETRN"):
		k.say(Failure, "bypass", "start the queue-only listener with -OPrivacyOptions=noetrn",
			"the listener at %s offers ETRN: any client may have the inbound queue delivered unscanned", k.SMTP)
	}
}

func ehlo(ctx context.Context, address string) (string, error) {
	s, err := talk(ctx, address)
	if err != nil {
		return "", err
	}
	defer s.close()
	return s.command(250, "EHLO localhost")
}

// reply reads one SMTP reply of at most 100 lines.
func reply(r *bufio.Reader) (text []byte, ok bool) {
	for range 100 {
		line, err := r.ReadSlice('\n')
		if err != nil || len(line) < 4 {
			return text, false
		}
		text = append(text, line...)
		if line[3] == ' ' {
			return text, true
		}
	}
	return text, false
}
