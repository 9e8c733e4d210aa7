package postfix

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// HeldLog follows Postfix's log for what milters have put on hold: a queue
// file does not tell why it is there.
type HeldLog struct {
	path   string
	mu     sync.Mutex
	f      *os.File
	ino    uint64
	rest   string          // a line whose end is not there yet
	recent map[string]bool // by queue id: put on hold by a milter
	older  map[string]bool // what was recent before
}

// Bounds of what is remembered: two generations of ids, and one line.
const (
	maxLogIDs  = 500_000
	maxLogLine = 64 << 10
	// A milter's line is written before the message is complete, but the logger
	// may take its time.
	logDelay = 5 * time.Second
)

// NewHeldLog follows the log at path, and knows what its predecessor, path.1,
// says. It opens them at the first question.
func NewHeldLog(path string) *HeldLog { return &HeldLog{path: path, recent: map[string]bool{}} }

// Ask says whether the log tells of a message, and whether a milter has put it
// on hold.
func (l *HeldLog) Ask(id string) (known, held bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.follow(); err != nil {
		return false, false, fmt.Errorf("read Postfix's log (milter_held: leave): %w", err)
	}
	if held, known = l.recent[id]; !known {
		held, known = l.older[id]
	}
	return known, held, nil
}

// follow reads what is new, over a rotation too.
func (l *HeldLog) follow() error {
	if l.f == nil {
		if old, err := os.Open(l.path + ".1"); err == nil {
			err = l.read(old)
			old.Close()
			if err != nil {
				return err
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for range 2 {
		if l.f != nil {
			if err := l.read(l.f); err != nil {
				return err
			}
		}
		st, err := os.Stat(l.path)
		if err != nil {
			return err
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok {
			return errors.New("no inode")
		}
		if l.f != nil && sys.Ino == l.ino {
			return l.truncated(st.Size())
		}
		if l.f != nil {
			l.f.Close()
		}
		if l.f, err = os.Open(l.path); err != nil {
			l.f = nil
			return err
		}
		l.ino, l.rest = sys.Ino, ""
	}
	return nil
}

// truncated begins anew with a log that was copied and cut.
func (l *HeldLog) truncated(size int64) error {
	at, err := l.f.Seek(0, io.SeekCurrent)
	if err != nil || at <= size {
		return err
	}
	if _, err := l.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	l.rest = ""
	return l.read(l.f)
}

func (l *HeldLog) read(f *os.File) error {
	in := bufio.NewReaderSize(f, maxLogLine)
	for {
		piece, err := in.ReadSlice('\n')
		switch {
		case err == nil:
			l.line(l.rest + string(piece))
			l.rest = ""
		case errors.Is(err, bufio.ErrBufferFull):
			l.rest = "" // no line of Postfix's
		case errors.Is(err, io.EOF):
			l.rest = (l.rest + string(piece))
			if len(l.rest) > maxLogLine {
				l.rest = ""
			}
			return nil
		default:
			return err
		}
	}
}

// line reads "… postfix/cleanup[123]: ID: milter-hold: …".
func (l *HeldLog) line(s string) {
	_, text, ok := strings.Cut(s, "]: ")
	if !ok {
		return
	}
	id, text, ok := strings.Cut(text, ": ")
	if !ok || !validID(id) {
		return
	}
	if len(l.recent) >= maxLogIDs {
		l.recent, l.older = map[string]bool{}, l.recent
	}
	l.recent[id] = l.recent[id] || l.older[id] || strings.HasPrefix(text, "milter-hold: ")
}
