// Package sample writes messages into a sendmail queue directory the way a
// queue-only daemon leaves them, for the demonstration and for tests. It is
// independent of the code that reads queues.
package sample

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A Message is one message to put into a queue.
type Message struct {
	ID     string // queue id
	Header string // lines ended by LF, folds included
	Body   []byte // LF line ends
	From   string
	To     []string
	T      int64 // creation time, unix seconds
}

// quote puts 0xFF before the bytes that a control file quotes
// (reference: queue-formats.md, A4).
func quote(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c >= 0x80 && c <= 0x9F || c == 0xFF {
			b.WriteByte(0xFF)
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Control is the content of the message's control file.
func (m Message) Control() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "V8\nT%d\nK0\nN0\nP%d\nFbs\n", m.T, 30000*len(m.To)+len(m.Body))
	b.WriteString("$_client.example.com [192.0.2.1]\n$rESMTP\n$sclient.example.com\n${daemon_flags}\n")
	fmt.Fprintf(&b, "S<%s>\n", quote(m.From))
	for _, to := range m.To {
		fmt.Fprintf(&b, "rRFC822; %s\nRPFD:<%s>\n", quote(to), quote(to))
	}
	b.WriteString("H?P?Return-Path: <\x81g>\n")
	for _, line := range strings.SplitAfter(m.Header, "\n") {
		switch {
		case line == "":
		case line[0] == ' ' || line[0] == '\t':
			b.WriteString(quote(line))
		default:
			b.WriteString("H??" + quote(line))
		}
	}
	b.WriteString(".\n")
	return b.Bytes()
}

// Write puts the message into dir, data file first.
func (m Message) Write(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "df"+m.ID), m.Body, 0o640); err != nil {
		return fmt.Errorf("write sample message: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "qf"+m.ID), m.Control(), 0o640); err != nil {
		return fmt.Errorf("write sample message: %w", err)
	}
	return nil
}

const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// ID makes the n-th queue id in sendmail's form: date, sequence, process id
// (reference: queue-formats.md, A1).
func ID(n int) string {
	seq := n % 3600
	return fmt.Sprintf("6ANC%c%c%c%c%06d", alphabet[n/3600%60], alphabet[n/216000%60], alphabet[seq/60], alphabet[seq%60], 790+n/12960000)
}

// EICAR is the anti-virus industry's test file, as an attachment in base64;
// it is put together here so that no scanner objects to the program.
func EICAR() []byte {
	text := `X5O!P%@AP[4\PZX54(P^)7CC)7}$` + "EICAR-STANDARD-" + "ANTIVIRUS-TEST-FILE!$H+H*\n"
	return []byte("--b\nContent-Type: text/plain\n\nsee the attachment\n--b\n" +
		"Content-Type: application/octet-stream; name=test.com\nContent-Transfer-Encoding: base64\n" +
		"Content-Disposition: attachment; filename=test.com\n\n" +
		base64.StdEncoding.EncodeToString([]byte(text)) + "\n--b--\n")
}

// Demo makes n messages of several kinds. The one at index eicar carries
// EICAR; the one at index killer asks a faults build to kill its worker.
func Demo(n, eicar, killer int) []Message {
	kinds := []struct{ header, body string }{
		{"Content-Type: text/plain; charset=utf-8\n", "Guten Tag,\n\ndie Rechnung f\xc3\xbcr November liegt bei.\n"},
		{
			"MIME-Version: 1.0\nContent-Type: multipart/alternative; boundary=\"alt\"\n",
			"--alt\nContent-Type: text/plain\n\nhello\n--alt\nContent-Type: text/html\n\n<p>hello</p>\n--alt--\n",
		},
		{
			"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=mix\n",
			"preamble\n--mix\nContent-Type: text/plain\nContent-Transfer-Encoding: quoted-printable\n\na=20long=20line=\n goes on\n--mix\nContent-Type: message/rfc822\n\nSubject: inner\n\ninside\n--mix--\n",
		},
		{"", "a body without any MIME header\n.\n..\n"},
		{"Content-Type: text/plain\n", ""},
	}
	var out []Message
	for i := range n {
		k := kinds[i%len(kinds)]
		m := Message{
			ID: ID(i), T: 1_795_438_128 + int64(i), From: fmt.Sprintf("sender%d@example.com", i),
			To: []string{"bob@example.net"}, Body: []byte(k.body),
			Header: fmt.Sprintf("Received: from client.example.com ([192.0.2.1])\n\tby mx.example.org with ESMTP id %s\n"+
				"From: sender%d@example.com\nTo: bob@example.net\nSubject: sample %d\nMessage-ID: <sample%d@example.com>\n", ID(i), i, i, i) + k.header,
		}
		switch i {
		case eicar:
			m.Header = strings.TrimSuffix(m.Header, k.header) + "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n"
			m.Body = EICAR()
		case killer:
			m.Header += "X-Holdfast-Fault: segv@part\n"
		}
		out = append(out, m)
	}
	return out
}
