// Package holds keeps what a person has put on hold: one small file for each
// message, so that losing the ledger loses none.
package holds

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/queue"
	"holdfast/queue/durable"
)

// Hold is one message that stays in its queue until the hold is ended.
type Hold struct {
	Queue string    `json:"queue"`
	Dir   string    `json:"dir"`
	ID    string    `json:"id"`
	Ino   uint64    `json:"inode,omitempty"` // see Inode: a later message of that id is not meant; 0: any is
	By    string    `json:"by"`
	At    time.Time `json:"at"`
	Why   string    `json:"why,omitempty"`
}

// Text says who holds the message.
func (h Hold) Text() string {
	text := "held by " + h.By + " since " + h.At.Local().Format(time.DateTime)
	if h.Why != "" {
		text += ": " + h.Why
	}
	return text
}

// Means says that the hold is about the message with these files.
func (h Hold) Means(st queue.Stats) bool { return h.Ino == 0 || h.Ino == Inode(st) }

// Key is the message's, as queue.ID has it.
func (h Hold) Key() string { return queue.ID{Queue: h.Queue, Dir: h.Dir, Name: h.ID}.Key() }

// Inode tells a message from a later one of its queue id: that of its data
// file, or of its only file.
func Inode(st queue.Stats) uint64 {
	if st.Data.Ino != 0 {
		return st.Data.Ino
	}
	return st.Control.Ino
}

// Dir is the directory of the files. It need not exist.
type Dir struct{ Path string }

// maxSize bounds one file.
const maxSize = 64 << 10

func (d Dir) path(h Hold) string {
	sum := fnv.New32a()
	sum.Write([]byte(h.Dir))
	return filepath.Join(d.Path, fmt.Sprintf("%s.%s.%08x", h.Queue, url.QueryEscape(h.ID), sum.Sum32()))
}

// Put holds a message, durably.
func (d Dir) Put(h Hold) error {
	text, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("encode a hold: %w", err)
	}
	var disk *durable.FS
	if err := disk.MkdirAll(d.Path, 0o700); err != nil {
		return fmt.Errorf("make the directory of holds: %w", err)
	}
	return disk.ReplaceFile(d.path(h), 0o600, func(w io.Writer) error {
		_, err := w.Write(append(text, '\n'))
		return err
	})
}

// End ends the holds of a queue id; an empty queue name is any. It returns how
// many there were.
func (d Dir) End(inQueue, id string) (n int, err error) {
	all, err := d.All()
	if err != nil {
		return 0, err
	}
	var disk *durable.FS
	for _, h := range all {
		if h.ID != id || inQueue != "" && h.Queue != inQueue {
			continue
		}
		if err := disk.Unlink(d.path(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return n, err
		}
		n++
	}
	if n > 0 {
		return n, disk.FsyncDir(d.Path)
	}
	return 0, nil
}

// All lists the holds. A file that cannot be read is an error: it may hold
// something.
func (d Dir) All() ([]Hold, error) {
	entries, err := os.ReadDir(d.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the holds: %w", err)
	}
	var out []Hold
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".new") {
			continue // a replacement that a crash ended
		}
		h, err := read(filepath.Join(d.Path, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, h)
	}
	return out, nil
}

func read(path string) (h Hold, err error) {
	f, err := os.Open(path)
	if err != nil {
		return h, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSize))
	if err == nil {
		err = json.Unmarshal(text, &h)
	}
	if err != nil {
		return h, fmt.Errorf("read the hold %s: %w", path, err)
	}
	return h, nil
}
