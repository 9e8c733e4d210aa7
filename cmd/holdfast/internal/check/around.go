package check

import (
	"bufio"
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// waysAround looks for ways by which mail would leave the inbound queue
// without having been scanned.
func (k *checker) waysAround(ctx context.Context) {
	before := len(k.out)
	k.runners()
	k.daemonParms()
	k.etrn(ctx)
	if len(k.out) == before {
		k.say(OK, "bypass", "", "no queue runner on an inbound directory, and no ETRN, was found")
	}
}

// runners looks for processes that run an inbound queue. sendmail shows the
// directory in its process title: "running queue: DIR", "Queue runner@… for DIR".
func (k *checker) runners() {
	inbound := map[string]bool{}
	for _, q := range k.conf.Queues {
		for _, pattern := range q.In {
			paths, err := filepath.Glob(pattern)
			if err != nil {
				continue // reported with the queue
			}
			for _, p := range paths {
				inbound[p] = true
			}
		}
	}
	entries, err := os.ReadDir(k.Proc)
	if err != nil {
		k.say(Warning, "bypass", "mount /proc", "running processes cannot be listed: %v", err)
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join(k.Proc, e.Name(), "cmdline"))
		if err != nil {
			continue // it ended meanwhile
		}
		for dir := range inbound {
			if runsQueue(line, dir) {
				k.say(Failure, "bypass", "stop it, and remove -q from the daemon that writes this directory",
					"process %d runs the inbound queue %s, and so delivers mail unscanned", pid, dir)
			}
		}
	}
}

var runnerOption = regexp.MustCompile(`^-q(p?[0-9]+[smhdw]?.*|[GIRSLQ!].*|f?|p)$`)

// runsQueue reads a command line, or the process title that replaced it.
func runsQueue(cmdline []byte, dir string) bool {
	words := strings.Split(strings.TrimRight(string(cmdline), "\x00 "), "\x00")
	title := strings.Join(words, " ")
	if !strings.Contains(words[0], "sendmail") && !strings.Contains(title, "sendmail") {
		return false
	}
	if strings.Contains(title, "running queue: "+dir) || strings.Contains(title, "ueue runner") && endsWithDir(title, dir) {
		return true
	}
	if !strings.Contains(title, "QueueDirectory="+dir) {
		return false
	}
	for _, w := range words {
		if runnerOption.MatchString(w) {
			return true
		}
	}
	return false
}

func endsWithDir(title, dir string) bool {
	_, rest, ok := strings.Cut(title, " for ")
	return ok && strings.TrimSpace(rest) == dir
}

// daemonParms reads Debian's /etc/mail/sendmail.conf, where the listener's
// options stand (reference: queue-formats.md, C1).
func (k *checker) daemonParms() {
	path := filepath.Join(k.MailDir, "sendmail.conf")
	text, err := os.ReadFile(path)
	if err != nil {
		return // another system, or sendmail is set up in another way
	}
	var parms string
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "DAEMON_PARMS="); ok {
			parms = v
		}
	}
	switch {
	case !strings.Contains(parms, "queueonly"):
		k.say(Failure, "bypass", `add -ODeliveryMode=queueonly to DAEMON_PARMS, then sendmailconfig and restart`,
			"%s: the listener delivers at once instead of queueing for Holdfast", path)
	case !strings.Contains(parms, "noetrn"):
		k.say(Failure, "bypass", `add -OPrivacyOptions=noetrn to DAEMON_PARMS, then sendmailconfig and restart`,
			"%s: any client may send ETRN, which delivers mail of the inbound queue unscanned", path)
	}
}

const smtpTimeout = 5 * time.Second

// etrn asks the listener whether it offers ETRN (RFC 1985).
func (k *checker) etrn(ctx context.Context) {
	if k.SMTP == "" {
		return
	}
	d := net.Dialer{Timeout: smtpTimeout}
	c, err := d.DialContext(ctx, "tcp", k.SMTP)
	if err != nil {
		return // nobody listens there: nothing to bypass
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(smtpTimeout)); err != nil {
		return
	}
	r := bufio.NewReaderSize(c, 4096)
	if _, ok := reply(r); !ok {
		return
	}
	if _, err := c.Write([]byte("EHLO localhost\r\n")); err != nil {
		return
	}
	features, _ := reply(r)
	if _, err := c.Write([]byte("QUIT\r\n")); err != nil {
		return
	}
	if bytes.Contains(features, []byte("ETRN")) {
		k.say(Failure, "bypass", "start the queue-only listener with -OPrivacyOptions=noetrn",
			"the listener at %s offers ETRN: any client may have the inbound queue delivered unscanned", k.SMTP)
	}
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
