package check

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/conf"
)

// postfix checks one instance: its directories, what holds its mail, the ways
// around that, and the listener for changed mail.
func (k *checker) postfix(ctx context.Context, q *conf.Queue) {
	topic := "queue " + q.Name
	k.postfixDirs(topic, q)
	set, err := k.postconf(ctx, q.Config, "-x", "mail_version", "queue_directory", "header_checks", "smtpd_data_restrictions",
		"smtpd_recipient_restrictions", "smtpd_client_restrictions", "internal_mail_filter_classes", "receive_override_options")
	if err != nil {
		k.say(Failure, topic, "install Postfix, or correct config", "%v", err)
		return
	}
	if dir := filepath.Clean(set["queue_directory"]); dir != q.Dir {
		k.say(Failure, topic, "set dir to it, or config to the instance that you mean", "dir is %s, and Postfix (config: %s) has its queues in %s", q.Dir, q.Config, dir)
		return
	}
	if _, err := os.Lstat(filepath.Join(q.Dir, "public", "qmgr")); err != nil {
		k.say(Warning, topic, "postfix -c "+q.Config+" start", "Postfix does not seem to run: %v", err)
	}
	if q.Modify == conf.ModifyRewrite && !knownPostfix.MatchString(set["mail_version"]) {
		k.say(Failure, topic, "set modify: reinject", "modify: rewrite is refused for Postfix %s, whose queue files are not known", set["mail_version"])
	}
	k.postfixHolds(ctx, topic, q, set)
	if q.Modify == conf.ModifyReinject {
		k.postfixListener(ctx, topic, q)
	}
	if k.SendTest {
		k.postfixLive(ctx, topic, q)
	}
}

var knownPostfix = regexp.MustCompile(`^3\.(\d|10)(\.|$)`)

func (k *checker) postconf(ctx context.Context, config string, args ...string) (map[string]string, error) {
	lines, err := k.Postconf(ctx, config, args...)
	if err != nil {
		return nil, err
	}
	set := map[string]string{}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, "=")
		set[strings.TrimSpace(name)] = strings.TrimSpace(value)
	}
	return set, nil
}

// postfixDirs: hold and incoming on one file system, and ours to act on.
func (k *checker) postfixDirs(topic string, q *conf.Queue) {
	var devs []uint64
	var owner uint32
	for _, name := range []string{"hold", "incoming", "active", "deferred"} {
		path := filepath.Join(q.Dir, name)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			k.say(Failure, topic, "correct dir: it is what postconf queue_directory says", "%s: %v", path, err)
			return
		}
		devs, owner = append(devs, st.Dev), st.Uid
		if devs[0] != st.Dev {
			k.say(Failure, topic, "move it: mail is released by renaming it, which never copies", "%s is on another file system than hold", path)
			return
		}
	}
	before := len(k.out)
	k.fileSystem(topic, filepath.Join(q.Dir, "hold"), Failure, mailLost, false)
	switch {
	case k.UID != 0 && k.UID != int(owner):
		k.say(Failure, topic, "start Holdfast as root, or as the owner of Postfix's queues", "runs as uid %d, and the queues in %s belong to uid %d", k.UID, q.Dir, owner)
	case k.UID != 0 && q.Release == conf.ReleasePostsuper:
		k.say(Failure, topic, "set release: rename, or start Holdfast as root", "release: postsuper works for root only")
	case k.UID != 0:
		k.say(OK, "rights", "", "runs as the owner of Postfix's queues: enough for release: rename, modify: rewrite and modify: reinject; workers get the same user, so that only the sandbox keeps them from the queues")
	}
	if len(k.out) == before {
		k.say(OK, topic, "", "hold and incoming are there, on one file system, and ours to use")
	}
}

// smtpd is one of Postfix's SMTP services with what is set for it alone.
type smtpd struct {
	name string // name/type
	set  map[string]string
}

func (k *checker) smtpds(ctx context.Context, q *conf.Queue) ([]smtpd, error) {
	lines, err := k.Postconf(ctx, q.Config, "-M")
	if err != nil {
		return nil, err
	}
	options, err := k.postconf(ctx, q.Config, "-Px")
	if err != nil {
		return nil, err
	}
	var out []smtpd
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) < 8 || f[7] != "smtpd" || f[0] == q.Reinject {
			continue
		}
		s := smtpd{name: f[0] + "/" + f[1], set: map[string]string{}}
		for name, value := range options {
			if rest, ok := strings.CutPrefix(name, s.name+"/"); ok {
				s.set[rest] = value
			}
		}
		out = append(out, s)
	}
	return out, nil
}

var staticHold = regexp.MustCompile(`static:\{?\s*HOLD`)

// postfixHolds finds what puts mail on hold, and who passes by it.
func (k *checker) postfixHolds(ctx context.Context, topic string, q *conf.Queue, set map[string]string) {
	byHeader := k.headerHolds(ctx, q.Config, set["header_checks"])
	restrictions := []string{"smtpd_data_restrictions", "smtpd_recipient_restrictions", "smtpd_client_restrictions"}
	services, err := k.smtpds(ctx, q)
	if err != nil {
		k.say(Warning, topic, "see the error", "%v", err)
	}
	bad := false
	for _, s := range services {
		held := false
		for _, r := range restrictions {
			value, own := s.set[r]
			if !own {
				value = set[r]
			}
			held = held || staticHold.MatchString(value)
		}
		options, own := s.set["receive_override_options"]
		if !own {
			options = set["receive_override_options"]
		}
		if !held && (!byHeader || strings.Contains(options, "no_header_body_checks")) {
			bad = true
			k.say(Failure, "bypass", "holdfast setup postfix --print tells how", "the mail of Postfix's service %s is not put on hold, and so is delivered unscanned", s.name)
		}
	}
	if !byHeader {
		k.say(Warning, "bypass", "hold by header_checks: holdfast setup postfix --print tells how", "mail that programs of this machine hand to sendmail(1) is not put on hold")
	}
	if classes := set["internal_mail_filter_classes"]; !strings.Contains(classes, "bounce") || !strings.Contains(classes, "notify") || !byHeader {
		k.say(Warning, "bypass", "postconf -e 'internal_mail_filter_classes = bounce, notify', with header_checks that hold; or accept it", "bounces, and mail that local aliases or .forward files send on, are not put on hold")
	}
	if !bad && len(services) > 0 {
		k.say(OK, topic, "", "the mail of %d SMTP services is put on hold", len(services))
	}
}

// headerHolds asks Postfix's own tables what they do with a Received field.
func (k *checker) headerHolds(ctx context.Context, config, tables string) bool {
	const field = "Received: from client.example.com (client.example.com [192.0.2.1])"
	for _, table := range strings.FieldsFunc(tables, func(r rune) bool { return r == ',' || r == ' ' }) {
		answer, err := k.Postmap(ctx, config, field, table)
		if err == nil && answer != "" {
			return strings.HasPrefix(strings.ToUpper(answer), "HOLD")
		}
	}
	return false
}

// postfixListener asks the listener for changed mail what it offers.
func (k *checker) postfixListener(ctx context.Context, topic string, q *conf.Queue) {
	do := "holdfast setup postfix --print prints its lines; or set modify: none"
	s, err := talk(ctx, q.Reinject)
	if err != nil {
		k.say(Failure, topic, do, "no listener for changed mail at %s: %v", q.Reinject, err)
		return
	}
	defer s.close()
	text, err := s.command(250, "EHLO check.holdfast.invalid")
	if err != nil {
		k.say(Failure, topic, do, "the listener at %s: %v", q.Reinject, err)
		return
	}
	for _, need := range []string{"XFORWARD", "DSN", "8BITMIME"} {
		if !strings.Contains(text, need) {
			k.say(Failure, topic, do, "the listener for changed mail at %s does not offer %s", q.Reinject, need)
			return
		}
	}
	k.say(OK, topic, "", "the listener for changed mail answers at %s", q.Reinject)
}

// postfixLive sends a message of our own through each route, looks where it
// is, and takes it away.
func (k *checker) postfixLive(ctx context.Context, topic string, q *conf.Queue) {
	for _, route := range []struct{ what, address string }{{"SMTP", k.SMTP}, {"the listener for changed mail", q.Reinject}} {
		if route.address == "" || route.address == q.Reinject && q.Modify != conf.ModifyReinject {
			continue
		}
		id, err := sendTest(ctx, route.address)
		if err != nil {
			k.say(Warning, topic, "see the error; --smtp names another listener", "no test message could be sent by %s at %s: %v", route.what, route.address, err)
			continue
		}
		k.whereIs(ctx, topic, q, route.what, id)
	}
	id, err := k.Sendmail(ctx, q.Config, testMessage)
	if err != nil {
		k.say(Warning, topic, "see the error", "no test message could be sent by sendmail(1): %v", err)
		return
	}
	if id = k.findTest(q, id); id != "" {
		k.whereIs(ctx, topic, q, "sendmail(1)", id)
		return
	}
	k.say(Warning, "bypass", "hold by header_checks: holdfast setup postfix --print tells how", "a test message by sendmail(1) was not put on hold")
}

const (
	testMark    = "holdfast-check@holdfast.invalid"
	testMessage = "From: <" + testMark + ">\nTo: <" + testMark + ">\nSubject: a test message of holdfast check\n\nIt is removed again.\n"
	testWait    = 3 * time.Second
)

func (k *checker) whereIs(ctx context.Context, topic string, q *conf.Queue, route, id string) {
	for deadline := time.Now().Add(testWait); ; time.Sleep(50 * time.Millisecond) {
		for _, name := range []string{"hold", "incoming", "active", "deferred"} {
			if !inQueue(filepath.Join(q.Dir, name), id) || name == "incoming" && time.Now().Before(deadline) {
				continue // in incoming it may still be on its way to hold
			}
			if err := k.Postsuper(ctx, q.Config, "-d", id); err != nil {
				k.say(Warning, topic, "postsuper -d "+id, "the test message %s could not be removed: %v", id, err)
			}
			if name == "hold" {
				k.say(OK, topic, "", "a test message by %s was put on hold, and is removed again", route)
			} else {
				k.say(Failure, "bypass", "holdfast setup postfix --print tells how", "a test message by %s was not put on hold, but is in %s", route, name)
			}
			return
		}
		if time.Now().After(deadline) {
			break
		}
	}
	k.say(Warning, topic, "holdfast pause, then check again", "a test message by %s (%s) is no longer in the queue: it was delivered at once, or a running Holdfast was quicker", route, id)
}

// inQueue looks for a queue file, however the queue is hashed.
func inQueue(dir, id string) bool {
	found := false
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil // gone meanwhile
		case d.Name() == id:
			found = true
			return filepath.SkipAll
		case d.IsDir() && len(d.Name()) > 1 && d.Name() != filepath.Base(dir):
			return filepath.SkipDir
		}
		return nil
	})
	return found
}

// findTest finds our message on hold by its sender, since sendmail(1) names no
// queue id. Before is what was there before.
func (k *checker) findTest(q *conf.Queue, mark string) (id string) {
	for deadline := time.Now().Add(testWait); id == "" && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		_ = filepath.WalkDir(filepath.Join(q.Dir, "hold"), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil
			}
			if text, err := head(path); err == nil && strings.Contains(text, mark) {
				id = d.Name()
				return filepath.SkipAll
			}
			return nil
		})
	}
	return id
}

func head(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf := make([]byte, 4096)
	n, err := f.Read(buf)
	return string(buf[:n]), err
}

// dialogue is a few lines of SMTP with a listener of this machine.
type dialogue struct {
	c net.Conn
	r *bufio.Reader
}

func talk(ctx context.Context, address string) (*dialogue, error) {
	d := net.Dialer{Timeout: smtpTimeout}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	s := &dialogue{c, bufio.NewReaderSize(c, 4096)}
	if err = c.SetDeadline(time.Now().Add(2 * smtpTimeout)); err == nil {
		_, err = s.expect(220)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

func (s *dialogue) close() {
	_, _ = s.c.Write([]byte("QUIT\r\n"))
	s.c.Close()
}

func (s *dialogue) command(code int, line string) (string, error) {
	if _, err := s.c.Write([]byte(line + "\r\n")); err != nil {
		return "", err
	}
	return s.expect(code)
}

func (s *dialogue) expect(code int) (string, error) {
	text, ok := reply(s.r)
	if !ok {
		return "", errors.New("no SMTP reply")
	}
	if !strings.HasPrefix(string(text), strconv.Itoa(code)) {
		return "", fmt.Errorf("it says %.200q", text)
	}
	return string(text), nil
}

var queuedAs = regexp.MustCompile(`queued as ([0-9A-Za-z]+)`)

func sendTest(ctx context.Context, address string) (id string, err error) {
	s, err := talk(ctx, address)
	if err != nil {
		return "", err
	}
	defer s.close()
	for _, step := range []struct {
		code int
		line string
	}{
		{250, "EHLO check.holdfast.invalid"}, {250, "MAIL FROM:<>"}, {250, "RCPT TO:<" + testMark + ">"}, {354, "DATA"},
	} {
		if _, err := s.command(step.code, step.line); err != nil {
			return "", fmt.Errorf("%s: %w", step.line, err)
		}
	}
	text, err := s.command(250, strings.ReplaceAll(testMessage, "\n", "\r\n")+".")
	if err != nil {
		return "", err
	}
	m := queuedAs.FindStringSubmatch(text)
	if m == nil {
		return "", fmt.Errorf("it names no queue id: %.200q", text)
	}
	return m[1], nil
}
