package postfix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"holdfast/queue/durable"
)

// What tests judge queue files with. None of it is the package's own code: it
// would not see its own mistakes.

// rec is one record.
type rec struct {
	kind byte
	data string
}

// seen is a queue file as a test sees it.
type seen struct {
	size     [6]int64
	env, ext []rec
	content  string // lines end with LF
}

// look reads a queue file that has no pointers, and checks what the queue
// manager checks: the size record's first two fields, and E, which must be the
// last of it.
func look(b []byte) (seen, error) {
	var s seen
	var text strings.Builder
	part, at, content := 0, 0, 0
	for part < 3 {
		start := at
		if at+2 > len(b) {
			return s, fmt.Errorf("no E: it ends at %d", at)
		}
		kind, n := b[at], 0
		at++
		for shift := 0; ; shift += 7 {
			n |= int(b[at]&0x7f) << shift
			at++
			if b[at-1] < 0x80 {
				break
			}
		}
		if at+n > len(b) {
			return s, fmt.Errorf("a record of type %c runs beyond the end", kind)
		}
		r := rec{kind, string(b[at : at+n])}
		at += n
		switch {
		case start == 0:
			if err := s.sizes(r); err != nil {
				return s, err
			}
		case part == 0 && kind == 'M':
			part, content = 1, at
			if s.size[1] != int64(at) {
				return s, fmt.Errorf("the content is at %d, the size record says %d", at, s.size[1])
			}
		case part == 1 && kind == 'X':
			part = 2
			if s.size[0] != int64(start-content) {
				return s, fmt.Errorf("the content is of %d bytes, the size record says %d", start-content, s.size[0])
			}
		case part == 2 && kind == 'E':
			part = 3
		case part == 0:
			s.env = append(s.env, r)
		case part == 1 && kind == 'N':
			text.WriteString(r.data + "\n")
		case part == 1 && kind == 'L':
			text.WriteString(r.data)
		case part == 2:
			s.ext = append(s.ext, r)
		default:
			return s, fmt.Errorf("a record of type %c at %d", kind, start)
		}
	}
	s.content = text.String()
	if at != len(b) {
		return s, fmt.Errorf("%d bytes after E", len(b)-at)
	}
	if n := int64(len(s.recipients())); s.size[2] < n || n == 0 {
		return s, fmt.Errorf("%d recipients, the size record says %d", n, s.size[2])
	}
	return s, nil
}

func (s *seen) sizes(r rec) error {
	f := strings.Fields(r.data)
	if r.kind != 'C' || len(f) != len(s.size) || len(r.data) != 95 {
		return fmt.Errorf("it begins with %c %q", r.kind, r.data)
	}
	for i := range f {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return err
		}
		s.size[i] = n
	}
	return nil
}

// recipients are those still to be delivered to.
func (s *seen) recipients() (out []string) {
	for _, r := range slices.Concat(s.env, s.ext) {
		if r.kind == 'R' {
			out = append(out, r.data)
		}
	}
	return out
}

// putRec writes one record.
func putRec(b *bytes.Buffer, kind byte, data string) {
	b.WriteByte(kind)
	n := len(data)
	for ; n > 0x7f; n >>= 7 {
		b.WriteByte(byte(n) | 0x80)
	}
	b.WriteByte(byte(n))
	b.WriteString(data)
}

// queueFile writes a file as cleanup does.
func queueFile(t int64, content string, rcpts ...string) []byte {
	var env, text, out bytes.Buffer
	putRec(&env, 'T', fmt.Sprintf("%d 93622", t))
	putRec(&env, 'A', fmt.Sprintf("create_time=%d", t))
	putRec(&env, 'A', "rewrite_context=local")
	putRec(&env, 'S', "a@example.com")
	putRec(&env, 'A', "log_client_address=192.0.2.1")
	for _, r := range rcpts {
		putRec(&env, 'A', "notify_flags=4")
		putRec(&env, 'A', "dsn_orig_rcpt=rfc822;"+r)
		putRec(&env, 'O', r)
		putRec(&env, 'R', r)
	}
	putRec(&env, 'M', "")
	for line := range strings.Lines(content) {
		putRec(&text, 'N', strings.TrimSuffix(line, "\n"))
	}
	head := fmt.Sprintf("%15d %15d %15d %15d %15d %15d", text.Len(), 97+env.Len(), len(rcpts), 9, text.Len(), 0)
	putRec(&out, 'C', head)
	out.Write(env.Bytes())
	out.Write(text.Bytes())
	putRec(&out, 'X', "")
	putRec(&out, 'E', "")
	return out.Bytes()
}

// mailUser is the mail system's user in tests: a number is enough.
const mailUser = 4242

// spool is a queue directory made by hand.
type spool struct {
	t     testing.TB
	dir   string
	depth int // of hold and incoming
	long  bool
	n     int
}

func newSpool(t testing.TB, dir string, depth int, long bool) *spool {
	t.Helper()
	s := &spool{t: t, dir: dir, depth: depth, long: long}
	for _, name := range []string{"", "hold", "incoming", "active", "deferred", "defer", "corrupt", "maildrop"} {
		s.mkdir(filepath.Join(dir, name))
	}
	return s
}

func (s *spool) mkdir(path string) {
	s.t.Helper()
	err := os.Mkdir(path, 0o700)
	if err == nil {
		err = os.Chown(path, mailUser, mailUser)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		s.t.Fatal(err)
	}
}

// name is the queue id for an inode, by the reference's text.
func (s *spool) name(n int, ino uint64) string {
	if !s.long {
		return fmt.Sprintf("%05X%X", n, ino)
	}
	const digits = "0123456789BCDFGHJKLMNPQRSTVWXYZbcdfghjklmnpqrstvwxyz"
	tail := ""
	for ; ino > 0; ino /= 51 {
		tail = string(digits[ino%51]) + tail
	}
	usec := ""
	for range 4 {
		usec = string(digits[n%52]) + usec
		n /= 52
	}
	return "4jY5D8" + usec + "z" + tail
}

// place is where a file of that id belongs.
func (s *spool) place(queueName string, n int, id string) string {
	dir := filepath.Join(s.dir, queueName)
	for i := range s.depth {
		dir = filepath.Join(dir, fmt.Sprintf("%05X", n)[i:i+1])
	}
	return filepath.Join(dir, id)
}

// put puts a file on hold and returns its queue id.
func (s *spool) put(b []byte) string {
	s.t.Helper()
	s.n++
	dir := filepath.Join(s.dir, "hold")
	for i := range s.depth {
		dir = filepath.Join(dir, fmt.Sprintf("%05X", s.n)[i:i+1])
		s.mkdir(dir)
	}
	temp := filepath.Join(dir, "made.here")
	err := os.WriteFile(temp, b, 0o600)
	if err == nil {
		err = os.Chown(temp, mailUser, mailUser)
	}
	if err == nil {
		err = os.Chmod(temp, 0o700)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	id := s.name(s.n, inodeOf(s.t, temp))
	if err := os.Rename(temp, filepath.Join(dir, id)); err != nil {
		s.t.Fatal(err)
	}
	return id
}

func inodeOf(t testing.TB, path string) uint64 {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Ino
}

// files are the files of one of the queues, at any depth.
func (s *spool) files(queueName string) (out []string) {
	s.t.Helper()
	err := filepath.WalkDir(filepath.Join(s.dir, queueName), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// fit says what is wrong with a file in a queue that the queue manager reads:
// its owner, mode, and the inode in its name.
func (s *spool) fit(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t)
	name := filepath.Base(path)
	tail := fmt.Sprintf("%X", sys.Ino)
	if s.long {
		_, tail, _ = strings.Cut(s.name(0, sys.Ino), "z")
		tail = "z" + tail
	}
	switch {
	case sys.Mode != syscall.S_IFREG|0o700:
		return fmt.Errorf("%s: mode %o", path, sys.Mode)
	case sys.Uid != mailUser || sys.Gid != mailUser:
		return fmt.Errorf("%s: owner %d:%d", path, sys.Uid, sys.Gid)
	case !strings.HasSuffix(name, tail) || strings.Contains(name, "."):
		return fmt.Errorf("%s: its inode is %d (%s)", path, sys.Ino, tail)
	}
	return nil
}

// dirs says what is wrong with the directories that were made: the queue
// manager stops when it cannot read one.
func (s *spool) dirs() (bad []string) {
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		st, err := os.Lstat(path)
		if strings.Contains(d.Name(), ".") {
			return fs.SkipDir // the queue manager does not look at it
		}
		if err == nil && (st.Sys().(*syscall.Stat_t).Uid != mailUser || st.Mode().Perm() != 0o700) {
			bad = append(bad, fmt.Sprintf("%s: %v, owner %d", path, st.Mode(), st.Sys().(*syscall.Stat_t).Uid))
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return bad
}

// fileJournal is a journal on the disk. A Save is one operation that the fault
// harness can stop or fail: whole and durable, or nothing.
type fileJournal struct {
	path string
	hook durable.Hook // may be nil
	late bool         // a refused Save happens all the same, and only its answer is lost
}

const saveOp durable.Kind = "save"

// Rows reads all.
func (j *fileJournal) Rows() (map[string][]byte, error) {
	rows := map[string][]byte{}
	text, err := os.ReadFile(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return rows, nil
	}
	if err != nil {
		return nil, err
	}
	return rows, json.Unmarshal(text, &rows)
}

// Save replaces the file.
func (j *fileJournal) Save(change map[string][]byte) error {
	op := durable.Op{Kind: saveOp, Path: j.path}
	if j.hook != nil {
		if err := j.hook.Before(op); err != nil {
			if j.late {
				err = errors.Join(err, j.save(change))
			}
			return err
		}
	}
	return j.save(change)
}

func (j *fileJournal) save(change map[string][]byte) error {
	rows, err := j.Rows()
	if err != nil {
		return err
	}
	maps.Copy(rows, change)
	maps.DeleteFunc(rows, func(_ string, v []byte) bool { return v == nil })
	text, err := json.Marshal(rows)
	if err != nil {
		return err
	}
	if err := os.WriteFile(j.path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(j.path+".new", j.path)
}
