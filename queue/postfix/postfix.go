// Package postfix serves Postfix's hold queue (2.4 and later): one file per
// message, taken from hold and handed back to incoming. Formats and facts:
// reference queue-formats.md, part B; the order of every operation: CUSTODY.
package postfix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/inode"
)

// Config describes one instance of Postfix.
type Config struct {
	Name           string
	Dir            string         // queue_directory
	Hashed         map[string]int // depth of each hashed queue (hash_queue_names, hash_queue_depth)
	Work           string         // directory for large rendered messages
	Token          string         // this installation's
	RenderInMemory int64          // bytes; a larger message is rendered into Work
	MaxControl     int64          // bytes of the envelope
	MaxRecipients  int
	PostfixConfig  string   // its configuration directory, for its commands
	Trigger        []string // command that wakes the queue manager; nil: the release's own; empty: none
	Release        Release
	Modify         Modify
	Listener       string   // host:port of the listener that holds what it accepts
	RecipientLimit int      // of one transaction with it
	HeldLog        *HeldLog // what milters have put on hold is left there; nil: it is not
	Store          queue.Store
	Journal        Journal
	FS             *durable.FS
	Report         func(Event)
}

// Release is how unchanged mail is taken off hold.
type Release string

// The ways of release.
const (
	ByRename    Release = ""          // to incoming
	ByPostsuper Release = "postsuper" // by Postfix's own command, to deferred
)

// Modify is how changed mail is handed back.
type Modify string

// The ways of handing changed mail back; the zero value has none.
const (
	ByReinjection Modify = "reinject" // by SMTP to a listener that holds it again
	ByRewriting   Modify = "rewrite"  // by queue files that we write: see Parameters.Known
)

// Journal keeps what must survive our death: plans that are decided, and what
// was released. Rows are opaque to it.
type Journal interface {
	// Save writes rows durably, in one step; a nil value removes a row.
	Save(rows map[string][]byte) error
	Rows() (map[string][]byte, error)
}

// Event is something about the queue that an operator should know.
type Event struct {
	ID   queue.ID
	What string
	Err  error
}

// Queue is one instance's hold queue. It implements queue.Queue.
type Queue struct {
	Config
	files inode.Files
	dirs  inode.Dirs

	mu       sync.Mutex
	plans    map[string]plan // open ones, by queue id; nil until read from the journal
	released map[string]release
	// reinjections are those of the last day, by nonce.
	reinjections map[string]*reinjection
	unheld       atomic.Bool       // the listener does not hold what it accepts
	later        map[string][]byte // rows to be written, or with nil removed, with the next Save
	saved        time.Time
	swept        time.Time
	kept         int     // rows of released that the last sweep left
	untidy       []aside // files aside; of Commit only
}

// The queues of an instance that are touched.
const (
	holdDir     = "hold"
	incomingDir = "incoming"
	deferDir    = "defer"
)

// New checks the configuration; it does not look at the disk.
func New(c Config) (*Queue, error) {
	switch {
	case c.Name == "" || !filepath.IsAbs(c.Dir):
		return nil, errors.New("a Postfix queue needs a name and the absolute path of its queue directory")
	case c.Journal == nil:
		return nil, errors.New("a Postfix queue needs a journal")
	}
	if c.MaxControl == 0 {
		c.MaxControl = 16 << 20
	}
	if c.MaxRecipients == 0 {
		c.MaxRecipients = 50_000
	}
	if c.RecipientLimit == 0 {
		c.RecipientLimit = 1000 // smtpd_recipient_limit's default
	}
	if c.Report == nil {
		c.Report = func(Event) {}
	}
	q := &Queue{Config: c}
	q.files = inode.Files{FS: c.FS, Report: func(what string, err error) { c.Report(Event{What: what, Err: err}) }}
	return q, nil
}

// Name is the queue's name in the configuration.
func (q *Queue) Name() string { return q.Config.Name }

// in is the directory of one of the instance's queues that has, or would
// have, the file of an id.
func (q *Queue) in(queueName, id string) string {
	return hashed(filepath.Join(q.Dir, queueName), id, q.Hashed[queueName])
}

func (q *Queue) path(queueName, id string) string { return filepath.Join(q.in(queueName, id), id) }

// HoldDirs locks the hold directory for the life of the process, so that two
// daemons never work on it. It names who holds it.
func (q *Queue) HoldDirs() error { return q.dirs.Hold(filepath.Join(q.Dir, holdDir)) }

// Passable says why no mail could get through: a directory that is missing, or
// on another file system than hold, since mail is released by renaming it.
func (q *Queue) Passable() error {
	var dev uint64
	for _, name := range []string{holdDir, incomingDir, "active", "deferred"} {
		var st unix.Stat_t
		path := filepath.Join(q.Dir, name)
		if err := unix.Stat(path, &st); err != nil {
			return &os.PathError{Op: "stat", Path: path, Err: err}
		}
		if name == holdDir {
			dev = st.Dev
		}
		if st.Dev != dev {
			return fmt.Errorf("%s is on another file system than hold", path)
		}
	}
	return nil
}

// Close lets go of it, and forgets in the journal what is settled.
func (q *Queue) Close() {
	if err := q.save(nil); err != nil {
		q.Report(Event{What: "close journal rows", Err: err})
	}
	q.dirs.Close()
}

// What a listing leaves alone, and counts.
const (
	skipWriting   = "still being written"
	skipCorrupt   = "marked as corrupt by the MTA"
	skipStrange   = "not a regular file"
	skipMisplaced = "not where the MTA would look for it"
	skipForeign   = "not a queue file by its name"
	skipPrepared  = "prepared file of a commit that a crash ended"
)

const (
	pageSize  = 512
	maxHash   = 5 // levels of sub-directories, at most as many as Postfix allows
	complete  = 0o700
	corrupted = 0o400

	orphanAfter = 2 * time.Hour // a younger one may be of a commit that goes on
)

// List yields what is on hold. Nothing is opened.
func (q *Queue) List(ctx context.Context, yield func(queue.Entry) bool) (queue.Listing, error) {
	res := queue.Listing{Skipped: map[string]int{}}
	if _, err := q.listDir(ctx, filepath.Join(q.Dir, holdDir), 0, &res, yield); err != nil {
		return res, err
	}
	return res, nil
}

func (q *Queue) listDir(ctx context.Context, dir string, depth int, res *queue.Listing, yield func(queue.Entry) bool) (bool, error) {
	d, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(pageSize)
		for _, name := range names {
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			if len(name) == 1 && depth < maxHash { // a sub-directory of a hashed queue
				if more, err := q.listDir(ctx, filepath.Join(dir, name), depth+1, res, yield); err != nil || !more {
					return more, err
				}
				continue
			}
			e, ok := q.listed(dir, name, res)
			if !ok {
				continue
			}
			res.Messages++
			if !yield(e) {
				return false, nil
			}
		}
		if errors.Is(err, io.EOF) {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("read directory %s: %w", dir, err)
		}
	}
}

// listed judges one directory entry by its name and lstat.
func (q *Queue) listed(dir, name string, res *queue.Listing) (queue.Entry, bool) {
	skip := func(why string) (queue.Entry, bool) {
		res.Skip(queue.Left{ID: queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: name}, File: filepath.Join(dir, name), Why: why})
		return queue.Entry{}, false
	}
	if !validID(name) {
		if !slices.Contains([]byte(name), '.') {
			return skip(skipForeign)
		}
		if st, err := os.Lstat(filepath.Join(dir, name)); err == nil && time.Since(st.ModTime()) > orphanAfter {
			return skip(skipPrepared)
		}
		return queue.Entry{}, false // in the making
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
		return queue.Entry{}, false // gone meanwhile
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return skip(skipStrange)
	case st.Mode&complete == corrupted:
		return skip(skipCorrupt)
	case st.Mode&complete != complete:
		return skip(skipWriting)
	case dir != q.in(holdDir, name):
		return skip(skipMisplaced)
	}
	return queue.Entry{
		ID: queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: name}, Arrived: time.Unix(st.Mtim.Unix()), Size: st.Size,
	}, true
}
