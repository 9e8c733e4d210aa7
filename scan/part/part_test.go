package part

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"holdfast/scan"
	"holdfast/scan/signature"
)

var wide = Limits{Depth: 30, Parts: 1000, Header: 1 << 20, Decoded: 1 << 28}

// seen collects the leaves.
type seen struct {
	parts []scan.Part
	texts []bytes.Buffer
}

func (s *seen) Begin(scan.Part) io.Writer {
	s.texts = append(s.texts, bytes.Buffer{})
	return &s.texts[len(s.texts)-1]
}

func (s *seen) End(p scan.Part) { s.parts = append(s.parts, p) }

func (s *seen) String() string {
	var b strings.Builder
	for i, p := range s.parts {
		fmt.Fprintf(&b, "%s %s %q\n", p.Path, p.Type, s.texts[i].String())
	}
	return b.String()
}

func walk(t *testing.T, message string, lim Limits) (*seen, Summary) {
	t.Helper()
	s := &seen{}
	sum, err := Walk(strings.NewReader(message), lim, s)
	if err != nil {
		t.Fatal(err)
	}
	return s, sum
}

const multi = "Content-Type: multipart/mixed; boundary=b\n\n"

func TestWhatAClientWouldShowIsVisited(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"plain":                {"Subject: x\n\nhello\n", `1 text/plain "hello\n"`},
		"no header":            {"\nhello\n", `1 text/plain "hello\n"`},
		"header only":          {"Subject: x\n", `1 text/plain ""`},
		"two parts":            {multi + "--b\n\none\n--b\nContent-Type: text/html\n\ntwo\n--b--\n", "1 text/plain \"one\\n\"\n2 text/html \"two\\n\"\n3 text/plain \"\""},
		"preamble, epilogue":   {multi + "before\n--b\n\none\n--b--\nafter\n", "1 text/plain \"before\\n\"\n1 text/plain \"one\\n\"\n2 text/plain \"after\\n\""},
		"no final boundary":    {multi + "--b\n\none\n", `1 text/plain "one\n"`},
		"quoted boundary":      {"Content-Type: multipart/mixed; boundary=\"a b\"\n\n--a b\n\none\n--a b--", "1 text/plain \"one\\n\"\n2 text/plain \"\""},
		"broken content type":  {"Content-Type: multipart/mixed; boundary=b; boundary=c; x=(\n\n--b\n\none\n--c\n\ntwo\n", "1 text/plain \"one\\n\"\n2 text/plain \"two\\n\""},
		"two content types":    {"Content-Type: multipart/mixed; boundary=b\nContent-Type: multipart/mixed; boundary=c\n\n--b\n\none\n--c\n\ntwo\n", "1 text/plain \"one\\n\"\n2 text/plain \"two\\n\""},
		"line without colon":   {"Subject: x\nthis is no field\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\none\n", `1 text/plain "one\n"`},
		"CRLF":                 {"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\none\r\n--b--\r\n", "1 text/plain \"one\\r\\n\"\n2 text/plain \"\""},
		"message in a message": {multi + "--b\nContent-Type: message/rfc822\n\nSubject: in\nContent-Type: multipart/mixed; boundary=c\n\n--c\n\ndeep\n--c--\n--b--\n", "1.1.1 text/plain \"deep\\n\"\n1.1.2 text/plain \"\"\n2 text/plain \"\""},
		"outer ends inner":     {multi + "--b\nContent-Type: multipart/mixed; boundary=c\n\n--c\n\ninner\n--b\n\nouter\n--b--\n", "1.1 text/plain \"inner\\n\"\n2 text/plain \"outer\\n\"\n3 text/plain \"\""},
		"base64":               {"Content-Transfer-Encoding: base64\n\naGVs\nbG8=\n", `1 text/plain "hello"`},
		"base64, damaged":      {"Content-Transfer-Encoding: base64\n\na!G Vs=\n\x00bG8\n", ""},
		"base64, twice padded": {"Content-Transfer-Encoding: BASE64; x\n\naGk=aGk=\n", `1 text/plain "hihi"`},
		"quoted-printable":     {"Content-Transfer-Encoding: quoted-printable\n\na=\nb=41=zz=3D==41\n", `1 text/plain "abA=zz==A\n"`},
	} {
		got, _ := walk(t, c.in, wide)
		if c.want != "" && strings.TrimSuffix(got.String(), "\n") != c.want {
			t.Errorf("%s:\n%swant\n%s", name, got, c.want)
		}
	}
}

func TestASignatureInANestedEncodedPartIsFound(t *testing.T) {
	eicar := `X5O!P%@AP[4\PZX54(P^)7CC)7}$` + "EICAR-STANDARD-" + "ANTIVIRUS-TEST-FILE!$H+H*"
	coded := base64.StdEncoding.EncodeToString([]byte(eicar))
	in := multi + "--b\nContent-Type: message/rfc822\n\nContent-Type: multipart/mixed; boundary=c\n\n--c\nContent-Transfer-Encoding: base64\n\n" +
		coded[:10] + "\n" + coded[10:] + "\n--c--\n--b--\n"
	m := &signature.Matcher{}
	if _, err := Walk(strings.NewReader(in), wide, all{m}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.Found(), []string{scan.RuleEICAR}) {
		t.Errorf("%v", m.Found())
	}
}

type all struct{ w io.Writer }

func (a all) Begin(scan.Part) io.Writer { return a.w }
func (a all) End(scan.Part)             {}

// What clients read in different ways is found, or said to be not fully
// inspected: it is never taken for clean. What they all read alike is.
func TestHiddenPartsAreNeverClean(t *testing.T) {
	eicar := `X5O!P%@AP[4\PZX54(P^)7CC)7}$` + "EICAR-STANDARD-" + "ANTIVIRUS-TEST-FILE!$H+H*"
	coded := base64.StdEncoding.EncodeToString([]byte(eicar))
	part := "Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\n" + coded + "\n"
	in := func(kind, boundary, part string) string {
		return "Subject: x\nContent-Type: " + kind + "\n\n--" + boundary + "\n" + part + "--" + boundary + "--\n"
	}
	inner := in("multipart/mixed; boundary=in", "in", part)
	for name, message := range map[string]string{
		"digest":                   in("multipart/digest; boundary=b", "b", "\n"+inner),
		"message/news":             in("multipart/mixed; boundary=b", "b", "Content-Type: message/news\n\n"+inner),
		"type with a comment":      in("multipart/mixed; boundary=b", "b", "Content-Type: message/rfc822 (x)\n\n"+inner),
		"encoded message":          in("multipart/mixed; boundary=b", "b", "Content-Type: message/global\nContent-Transfer-Encoding: base64\n\n"+base64.StdEncoding.EncodeToString([]byte(inner))+"\n"),
		"fragment":                 "Content-Type: message/partial; number=1; total=1; id=x\n\n" + inner,
		"no blank line":            in("multipart/mixed; boundary=b", "b", strings.Replace(part, "\n\n", "\n", 1)),
		"decoy before boundary":    in("multipart/mixed; xboundary=foo; boundary=bar; q=1; q=2", "bar", part),
		"boundary in pieces":       in("multipart/mixed; boundary*0=ba; boundary*1=r; q=1; q=2", "bar", part),
		"boundary with comment":    in("multipart/mixed; boundary=bar(comment)", "bar", part),
		"comment with boundary":    in("multipart/mixed; (boundary=foo) x=1; boundary=bar", "bar", part),
		"quoted decoy":             in(`multipart/mixed; a="boundary=foo"; boundary=bar; q=1; q=2`, "bar", part),
		"no boundary":              in("multipart/mixed", "b", part),
		"encoded multipart":        "Content-Type: multipart/mixed; boundary=in\nContent-Transfer-Encoding: base64\n\n" + base64.StdEncoding.EncodeToString([]byte("--in\n"+part+"--in--\n")),
		"encoding with a comma":    in("multipart/mixed; boundary=b", "b", strings.Replace(part, ": base64", ": base64,", 1)),
		"encoding after a comment": in("multipart/mixed; boundary=b", "b", strings.Replace(part, ": base64", ": (x) base64", 1)),
		"two encodings":            in("multipart/mixed; boundary=b", "b", "Content-Transfer-Encoding: 7bit\n"+part),
		"uuencode":                 in("multipart/mixed; boundary=b", "b", strings.Replace(part, ": base64", ": x-uuencode", 1)),
		"padding within a group":   in("multipart/mixed; boundary=b", "b", strings.Replace(part, coded, coded[:5]+"="+coded[5:], 1)),
		"bare CR in a header":      in("multipart/mixed; boundary=b", "b", "Content-Type: text/plain\rContent-Transfer-Encoding: base64\n\n"+coded+"\n"),
		"bare CR as line ends":     "Content-Type: multipart/mixed; boundary=b\n\nx" + strings.ReplaceAll("\n--b\n"+part+"--b--\n", "\n", "\r"),
		"spaces in the type":       in("multipart / mixed; boundary=b", "b", part),
		"UTF-16":                   "\n" + strings.Join(strings.Split(eicar, ""), "\x00"),
	} {
		m := &signature.Matcher{}
		sum, err := Walk(strings.NewReader(message), wide, all{m})
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Found())+len(sum.Incomplete) == 0 {
			t.Errorf("%s is clean", name)
		}
	}
	for name, message := range map[string]string{
		"an encoding that nobody knows": "Content-Transfer-Encoding: amazonses.com\n\nhello\n",
		"a line that is no field":       "Subject: x\nthis is no field\nTo: y\n\nhello\n",
		"a bare CR in the text":         multi + "--b\n\na\rb\n--b--\n",
		"a comment":                     "Content-Type: text/plain (really; \\) it is); charset=utf-8\n\nhello\n",
		"a delivery report":             multi + "--b\nContent-Type: message/delivery-status\n\nReporting-MTA: dns; x\n\nFinal-Recipient: rfc822; y\n--b--\n",
		"the same encoding twice":       "Content-Transfer-Encoding: base64\nContent-Transfer-Encoding: BASE64\n\naGVsbG8=\n",
	} {
		if _, sum := walk(t, message, wide); len(sum.Incomplete) > 0 {
			t.Errorf("%s: %q", name, sum.Incomplete)
		}
	}
}

func TestEachLimitIsSaidByItsName(t *testing.T) {
	nested := strings.Repeat("Content-Type: message/rfc822\n\n", 50) + "\nx\n"
	many := multi + strings.Repeat("--b\n\nx\n", 50)
	for want, c := range map[string]struct {
		in  string
		lim Limits
	}{
		"limits.depth":   {nested, Limits{Depth: 5, Parts: 100, Header: 1000, Decoded: 9000}},
		"limits.parts":   {many, Limits{Depth: 5, Parts: 10, Header: 1000, Decoded: 1000}},
		"limits.header":  {"Subject: " + strings.Repeat("x", 2000) + "\n\nx\n", Limits{Depth: 5, Parts: 10, Header: 1000, Decoded: 1000}},
		"limits.decoded": {"\n" + strings.Repeat("x", 2000), Limits{Depth: 5, Parts: 10, Header: 1000, Decoded: 1000}},
	} {
		if _, sum := walk(t, c.in, c.lim); !slices.Equal(sum.Incomplete, []string{want}) {
			t.Errorf("%s: %v", want, sum.Incomplete)
		}
		if _, sum := walk(t, c.in, wide); want != "limits.depth" && len(sum.Incomplete) > 0 {
			t.Errorf("%s within wide limits: %v", want, sum.Incomplete)
		}
	}
}

// counting counts the bytes that leaves get.
type counting struct{ parts, bytes int }

func (c *counting) Begin(scan.Part) io.Writer { c.parts++; return c }
func (c *counting) End(scan.Part)             {}
func (c *counting) Write(p []byte) (int, error) {
	c.bytes += len(p)
	return len(p), nil
}

func TestHostileShapesCostNoMoreThanTheirSize(t *testing.T) {
	var deep strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&deep, "Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n", i, i)
	}
	for name, in := range map[string]string{"nested": deep.String(), "many": multi + strings.Repeat("--b\n\n", 1_000_000)} {
		c := &counting{}
		if _, err := Walk(strings.NewReader(in), wide, c); err != nil {
			t.Fatal(err)
		}
		if c.parts > wide.Parts || c.bytes > len(in) {
			t.Errorf("%s: %d parts, %d bytes of %d", name, c.parts, c.bytes, len(in))
		}
	}
}

// FuzzWalk: no input makes it panic, pass a limit, or invent bytes, and how
// the input arrives changes nothing.
func FuzzWalk(f *testing.F) {
	f.Add([]byte(multi + "--b\nContent-Transfer-Encoding: base64\n\naGVsbG8=\n--b\nContent-Type: message/rfc822\n\nSubject: x\n\ny\n--b--\n"))
	f.Add([]byte("Content-Transfer-Encoding: quoted-printable\r\n\r\na=\r\nb=4"))
	lim := Limits{Depth: 4, Parts: 20, Header: 500, Decoded: 5000}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &seen{}
		sum, err := Walk(bytes.NewReader(b), lim, s)
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		for i := range s.texts {
			total += s.texts[i].Len()
		}
		if len(s.parts) > lim.Parts || int64(total) > lim.Decoded || total > len(b) {
			t.Fatalf("%d parts and %d bytes out of %d", len(s.parts), total, len(b))
		}
		again := &seen{}
		sum2, err := Walk(iotest.OneByteReader(bytes.NewReader(b)), lim, again)
		if err != nil || again.String() != s.String() || !slices.Equal(sum.Incomplete, sum2.Incomplete) {
			t.Fatalf("byte by byte it is another message:\n%s\n%s", s, again)
		}
	})
}
