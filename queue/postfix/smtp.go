package postfix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"regexp"
	"strings"
	"time"

	"holdfast/queue"
)

// Deadlines of one exchange with the listener, which is on this machine.
const (
	connectTime = 10 * time.Second
	replyTime   = 20 * time.Second
)

// session is one connection to the listener (RFC 5321).
type session struct {
	conn  net.Conn
	until time.Time // the end of all that is said
	text  *textproto.Conn
	offer map[string]string // extensions of the last EHLO, by name
}

// letter is one message for some recipients.
type letter struct {
	helo    string
	forward map[string]string // XFORWARD (Postfix XFORWARD_README), values not encoded
	env     queue.Envelope
	rcpts   []queue.Recipient
	eight   bool // it has bytes above 127
	text    io.Reader
}

func dial(ctx context.Context, address string, until time.Time) (*session, error) {
	d := net.Dialer{Timeout: connectTime, Deadline: until}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to Postfix's listener for changed mail: %w", err)
	}
	s := &session{conn: conn, until: until, text: textproto.NewConn(conn)}
	if err = s.deadline(replyTime); err == nil {
		_, _, err = s.text.ReadResponse(220)
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("greeting of %s: %w", address, err)
	}
	return s, nil
}

func (s *session) close() { s.text.Close() }

// end says good-bye; nothing depends on it.
func (s *session) end() {
	if s.deadline(time.Second) == nil {
		_, _ = s.text.Cmd("QUIT")
	}
	s.close()
}

func (s *session) deadline(d time.Duration) error {
	at := time.Now().Add(d)
	if at.After(s.until) {
		at = s.until
	}
	return s.conn.SetDeadline(at)
}

// broken says that a failure is the connection's: the next message would fare
// no better.
func broken(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// command sends one line and demands a reply of the given class or code.
func (s *session) command(expect int, format string, args ...any) (string, error) {
	if err := s.deadline(replyTime); err != nil {
		return "", err
	}
	line := fmt.Sprintf(format, args...)
	if strings.ContainsAny(line, "\r\n\x00") {
		return "", fmt.Errorf("%w: a line break or NUL within %.60q", queue.ErrUnchangeable, line)
	}
	if _, err := s.text.Cmd("%s", line); err != nil {
		return "", err
	}
	_, text, err := s.text.ReadResponse(expect)
	if err != nil {
		word, _, _ := strings.Cut(line, " ")
		return "", fmt.Errorf("%s: %w", word, refused(err))
	}
	return text, nil
}

// denied is what Postfix answers to a client that it does not trust: a mistake
// in the listener's set-up, and not the message's fault.
const denied = 554

// refused marks a permanent refusal: trying again would end alike.
func refused(err error) error {
	var reply *textproto.Error
	if errors.As(err, &reply) && reply.Code >= 500 && reply.Code != denied {
		return fmt.Errorf("%w: %w", queue.ErrUnchangeable, err)
	}
	return err
}

func (s *session) hello(name string) error {
	text, err := s.command(250, "EHLO %s", name)
	if err != nil {
		return err
	}
	s.offer = map[string]string{}
	for i, line := range strings.Split(text, "\n") {
		if word, rest, _ := strings.Cut(line, " "); i > 0 {
			s.offer[strings.ToUpper(word)] = rest
		}
	}
	for _, need := range []string{"XFORWARD", "DSN", "8BITMIME", "ENHANCEDSTATUSCODES"} {
		if _, ok := s.offer[need]; !ok {
			return fmt.Errorf("the listener does not offer %s: holdfast setup postfix prints how it must be set up", need)
		}
	}
	return nil
}

var queuedAs = regexp.MustCompile(`queued as ([0-9A-Za-z]+)$`)

// send hands over one letter; the listener answers with the copy's queue id.
// Any refusal ends the transaction, and nothing was accepted.
func (s *session) send(l letter) (id string, err error) {
	if err := s.hello(l.helo); err != nil {
		return "", err
	}
	if err := s.forward(l.forward); err != nil {
		return "", err
	}
	if err := s.envelope(l); err != nil {
		_, rerr := s.command(250, "RSET")
		return "", errors.Join(err, rerr)
	}
	if _, err := s.command(354, "DATA"); err != nil {
		return "", err
	}
	if err := s.deadline(time.Until(s.until)); err != nil { // for the content, and the reply to it
		return "", err
	}
	w := s.text.DotWriter()
	if _, err := io.Copy(w, l.text); err != nil {
		s.close() // without the final dot nothing is accepted
		return "", fmt.Errorf("send the message: %w", err)
	}
	if err := w.Close(); err != nil {
		return "", fmt.Errorf("send the message: %w", err)
	}
	_, text, err := s.text.ReadResponse(250)
	if err != nil {
		return "", fmt.Errorf("reply to the message: %w", refused(err))
	}
	m := queuedAs.FindStringSubmatch(text)
	if m == nil || !validID(m[1]) {
		return "", fmt.Errorf("the listener accepted a message and named no queue id: %.100q", text)
	}
	return m[1], nil
}

// forward tells the listener who the client was.
func (s *session) forward(values map[string]string) error {
	var words []string
	for _, name := range strings.Fields(s.offer["XFORWARD"]) {
		v, ok := values[name]
		if !ok {
			continue
		}
		if v == "" {
			v = "[UNAVAILABLE]"
		}
		words = append(words, name+"="+xtext(v))
	}
	if len(words) == 0 {
		return nil
	}
	_, err := s.command(250, "XFORWARD %s", strings.Join(words, " "))
	return err
}

func (s *session) envelope(l letter) error {
	mail := "MAIL FROM:<" + mailbox(l.env.Sender) + ">"
	if l.eight || l.env.Body8Bit {
		mail += " BODY=8BITMIME"
	}
	if l.env.SMTPUTF8 {
		if _, ok := s.offer["SMTPUTF8"]; !ok {
			return fmt.Errorf("%w: the listener does not offer SMTPUTF8", queue.ErrUnchangeable)
		}
		mail += " SMTPUTF8"
	}
	if l.env.Ret != "" {
		mail += " RET=" + l.env.Ret
	}
	if l.env.EnvID != "" {
		mail += " ENVID=" + xtext(l.env.EnvID)
	}
	if _, err := s.command(250, "%s", mail); err != nil {
		return err
	}
	for _, r := range l.rcpts {
		rcpt := "RCPT TO:<" + mailbox(r.Address) + ">"
		if r.Notify != "" {
			rcpt += " NOTIFY=" + r.Notify
		}
		if kind, address, ok := strings.Cut(r.ORcpt, ";"); ok {
			rcpt += " ORCPT=" + kind + ";" + xtext(address)
		}
		if _, err := s.command(250, "%s", rcpt); err != nil {
			return fmt.Errorf("recipient %.100q: %w", r.Address, err)
		}
	}
	return nil
}

// mailbox writes an address as queue files have it, without quotes, as SMTP
// wants it (RFC 5321, 4.1.2).
func mailbox(address string) string {
	i := strings.LastIndexByte(address, '@')
	local, domain := address, ""
	if i >= 0 {
		local, domain = address[:i], address[i:]
	}
	if local == "" || dotString.MatchString(local) {
		return address
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(local) + `"` + domain
}

var dotString = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+/=?^_`{|}~\u0080-\U0010ffff-]+(\\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~\u0080-\U0010ffff-]+)*$")

// xtext encodes a value (RFC 3461, 4). What is not ASCII stays, as SMTPUTF8
// allows (RFC 6533, 3).
func xtext(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == '+' || c == '=' || c == 0x7F {
			fmt.Fprintf(&b, "+%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
