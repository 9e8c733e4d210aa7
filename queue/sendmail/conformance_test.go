package sendmail

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/quarantine"
	"holdfast/queue/queuetest"
)

// site runs the suite over sendmail's files, looking at them with eyes of
// its own.
type site struct {
	*yard
	q *Queue
	n int
}

func TestConformance(t *testing.T) {
	for _, sub := range []bool{false, true} {
		t.Run(fmt.Sprint("sub-directories ", sub), func(t *testing.T) {
			queuetest.Run(t, func(t *testing.T) queuetest.Site {
				y := newYard(t)
				for _, name := range []string{"qf", "df"} {
					if err := os.Remove(y.in + "/" + name + oneID); err != nil {
						t.Fatal(err)
					}
					if !sub {
						continue
					}
					for _, d := range []string{y.in, y.out} {
						if err := os.Mkdir(d+"/"+name, 0o700); err != nil {
							t.Fatal(err)
						}
					}
				}
				return &site{yard: y, q: y.queue(nil)}
			})
		})
	}
}

func (s *site) Queue() queue.Queue { return s.q }

func (s *site) Put(t *testing.T, m queuetest.Message) string {
	t.Helper()
	s.n++
	id := fmt.Sprintf("6ANC%06d000790", s.n)
	var b strings.Builder
	b.WriteString("V8\nT1795438128\nK0\nN0\nP1\nFbs\nS<a@example.com>\n")
	for _, r := range m.Recipients {
		fmt.Fprintf(&b, "rRFC822; %s\nRPFD:<%s>\n", r, r)
	}
	for line := range strings.Lines(m.Header) {
		if line[0] != '\t' {
			b.WriteString("H??")
		}
		b.WriteString(line)
	}
	b.WriteString(".\n")
	p := at(s.in)
	for path, text := range map[string]string{p.data(id): m.Body, p.control(id): b.String()} {
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

func messageOf(t *testing.T, control, body string) queuetest.Message {
	t.Helper()
	m := queuetest.Message{Body: body}
	inHeader := false
	for line := range strings.Lines(control) {
		switch {
		case strings.HasPrefix(line, "RPFD:<"):
			m.Recipients = append(m.Recipients, strings.TrimSuffix(strings.TrimPrefix(line, "RPFD:<"), ">\n"))
		case strings.HasPrefix(line, "H??"):
			inHeader = true
			m.Header += strings.TrimPrefix(line, "H??")
			if s, ok := strings.CutPrefix(line, "H??Subject: "); ok {
				m.Subject = strings.TrimSpace(s)
			}
		case line[0] == '\t' && inHeader:
			m.Header += line
		}
	}
	return m
}

func (s *site) Out(t *testing.T) (out []queuetest.Message) {
	t.Helper()
	p := at(s.out)
	qfs, err := filepath.Glob(p.qf + "/qf*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range qfs {
		control, err := os.ReadFile(path)
		body, berr := os.ReadFile(p.data(filepath.Base(path)[2:]))
		if err != nil || berr != nil {
			t.Fatal(err, berr)
		}
		out = append(out, messageOf(t, string(control), string(body)))
	}
	return out
}

func (s *site) Kept(t *testing.T) (out []queuetest.Message) {
	t.Helper()
	err := s.store.List(context.Background(), func(m quarantine.Meta, err error) bool {
		control, cerr := os.ReadFile(m.Dir + "/control")
		text, terr := os.ReadFile(m.Dir + "/message")
		if err != nil || cerr != nil || terr != nil {
			t.Fatal(err, cerr, terr)
		}
		got := messageOf(t, string(control), string(text[m.BodyAt:]))
		if string(text[:m.BodyAt]) != got.Header+"\n" {
			t.Errorf("the message begins with %q", text[:m.BodyAt])
		}
		out = append(out, got)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *site) Inbound(t *testing.T) (n int) {
	t.Helper()
	err := filepath.WalkDir(s.in, func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (s *site) Item(t *testing.T) queue.Item {
	t.Helper()
	var meta quarantine.Meta
	if err := s.store.List(t.Context(), func(m quarantine.Meta, _ error) bool { meta = m; return true }); err != nil {
		t.Fatal(err)
	}
	it, err := s.store.Open(meta)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { it.Close() })
	return it
}

// Own implements queuetest.OwnedSite. Foreign owners need root, as the
// program does.
func (s *site) Own(t *testing.T, id string, uid, gid int, mode os.FileMode) {
	t.Helper()
	p := at(s.in)
	for _, path := range []string{p.data(id), p.control(id)} {
		if err := os.Chown(path, uid, gid); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
}

// Owners implements queuetest.OwnedSite.
func (s *site) Owners(t *testing.T) (out []string) {
	t.Helper()
	err := filepath.WalkDir(s.out, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return err
		}
		out = append(out, fmt.Sprintf("%d:%d %04o", st.Uid, st.Gid, st.Mode&0o7777))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
