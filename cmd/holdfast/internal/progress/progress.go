// Package progress shows how long work goes: a bar that is redrawn on a
// terminal, a plain line now and then anywhere else.
package progress

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

const (
	redraw    = 100 * time.Millisecond // at most ten times a second
	plainLine = 10 * time.Second
	barWidth  = 30
)

// A Bar counts up to a total that may grow. Its methods may be called from
// any goroutine.
type Bar struct {
	mu       sync.Mutex
	w        io.Writer
	terminal bool
	what     string
	now      func() time.Time
	start    time.Time
	last     time.Time
	done     int
	total    int
	notes    string
}

// New makes a bar that writes to w; what is the unit, in the plural.
func New(w io.Writer, what string) *Bar {
	f, isFile := w.(*os.File)
	b := &Bar{w: w, what: what, now: time.Now}
	b.terminal = isFile && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
	b.start = b.now()
	b.last = b.start
	return b
}

// Set says how far the work is; notes is shown behind the numbers.
func (b *Bar) Set(done, total int, notes string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done, b.total, b.notes = done, max(total, done), notes
	now := b.now()
	every := plainLine
	if b.terminal {
		every = redraw
	}
	if now.Sub(b.last) < every {
		return
	}
	b.last = now
	if b.terminal {
		fmt.Fprintf(b.w, "\r%s\x1b[K", b.line(now))
		return
	}
	fmt.Fprintln(b.w, b.line(now))
}

func (b *Bar) line(now time.Time) string {
	filled := 0
	if b.total > 0 {
		filled = barWidth * b.done / b.total
	}
	took := now.Sub(b.start).Round(time.Second)
	return fmt.Sprintf("[%s%s] %d of %d %s, %s%s", strings.Repeat("#", filled),
		strings.Repeat(".", barWidth-filled), b.done, b.total, b.what, took, b.notes)
}

// Clear removes the bar from a terminal, so that a result can be printed.
func (b *Bar) Clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.terminal {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}
