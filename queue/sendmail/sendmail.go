// Package sendmail serves sendmail's queue directories (8.12 and later):
// control files qf…, data files df…, locked and moved as sendmail itself
// does. Formats and facts: reference queue-formats.md, part A; the order of
// every operation: CUSTODY.
package sendmail

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/inode"
)

// Config describes one queue.
type Config struct {
	Name           string
	In, Out        []string // directories or shell patterns, read again at each listing
	Work           string   // directory for large rendered messages
	Token          string   // this installation's, 32 hexadecimal digits
	RenderInMemory int64    // bytes; a larger message is rendered into Work
	MaxControl     int64    // bytes of a control file
	MaxRecipients  int
	Lock           string   // "flock", or "ofd" for builds that lock with fcntl
	Kick           []string // command to which -qI<id> is appended per message; empty: none
	Store          queue.Store
	FS             *durable.FS
	Report         func(Event)
}

// Event is something about the queue that an operator should know.
type Event struct {
	ID   queue.ID
	What string
	Err  error
}

// Queue is one configured queue. It implements queue.Queue.
type Queue struct {
	Config
	ids   idSource
	kicks kicker
	files inode.Files
	dirs  inode.Dirs // inbound directories, locked for life
}

// New checks the configuration; it does not look at the disk.
func New(c Config) (*Queue, error) {
	switch {
	case c.Name == "" || len(c.In) == 0 || len(c.Out) == 0:
		return nil, errors.New("a sendmail queue needs a name, inbound and outbound directories")
	case len(c.Token) < 16 || strings.ContainsAny(c.Token, " =,\n"):
		return nil, errors.New("a sendmail queue needs the installation's token")
	case c.Lock != "flock" && c.Lock != "ofd":
		return nil, fmt.Errorf("lock %q is neither flock nor ofd", c.Lock)
	}
	if c.MaxControl == 0 {
		c.MaxControl = 16 << 20
	}
	if c.MaxRecipients == 0 {
		c.MaxRecipients = 50_000
	}
	if c.Report == nil {
		c.Report = func(Event) {}
	}
	q := &Queue{Config: c}
	q.kicks.report = c.Report
	q.files = inode.Files{FS: c.FS, Report: func(what string, err error) { c.Report(Event{What: what, Err: err}) }}
	return q, nil
}

// Name is the queue's name in the configuration.
func (q *Queue) Name() string { return q.Config.Name }

// place is one queue directory; sub-directories qf and df, where they
// exist, hold the files of that kind (reference: A1).
type place struct{ base, qf, df string }

func at(base string) place {
	p := place{base: base, qf: base, df: base}
	if st, err := os.Stat(filepath.Join(base, "qf")); err == nil && st.IsDir() {
		p.qf = filepath.Join(base, "qf")
	}
	if st, err := os.Stat(filepath.Join(base, "df")); err == nil && st.IsDir() {
		p.df = filepath.Join(base, "df")
	}
	return p
}

func (p place) control(id string) string { return filepath.Join(p.qf, "qf"+id) }
func (p place) data(id string) string    { return filepath.Join(p.df, "df"+id) }

// Prepared files: names that sendmail's runner ignores.
func (p place) newControl(id string, n int) string {
	return filepath.Join(p.qf, fmt.Sprintf("hc%s.%d", id, n))
}

func (p place) newData(id string, n int) string {
	return filepath.Join(p.df, fmt.Sprintf("hb%s.%d", id, n))
}

// goneControl and goneData are where a file of the queue is put before it is
// removed, so that it can be looked at once nobody else can replace it.
func (p place) goneControl(id string) string { return filepath.Join(p.qf, "hc"+id+".gone") }
func (p place) goneData(id string) string    { return filepath.Join(p.df, "hb"+id+".gone") }

// expand returns the directories that patterns name now.
func expand(patterns []string) ([]string, error) {
	var out []string
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("pattern %s: %w", pattern, err)
		}
		for _, p := range paths {
			if st, err := os.Stat(p); err == nil && st.IsDir() {
				out = append(out, p)
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no directory matches %s: %w", strings.Join(patterns, ", "), fs.ErrNotExist)
	}
	return out, nil
}

// outbound chooses the outbound directory of an id: on the file system of
// its inbound directory, and the same one each time.
func (q *Queue) outbound(in place, id string) (place, error) {
	dirs, err := expand(q.Out)
	if err != nil {
		return place{}, err
	}
	dev, err := device(in.qf)
	if err != nil {
		return place{}, err
	}
	var same []string
	for _, d := range dirs {
		if other, err := device(d); err == nil && other == dev {
			same = append(same, d)
		}
	}
	if len(same) == 0 {
		return place{}, fmt.Errorf("no outbound directory is on the file system of %s", in.base)
	}
	h := fnv.New32a()
	h.Write([]byte(id))
	return at(same[int(h.Sum32()%uint32(len(same)))]), nil
}

func device(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Dev, nil
}

// HoldDirs locks every inbound directory for the life of the process, so
// that two daemons never work on one. It names who holds it.
func (q *Queue) HoldDirs() error {
	dirs, err := expand(q.In)
	if err != nil {
		return err
	}
	return q.dirs.Hold(dirs...)
}

// KeepsIDs says that a message which leaves unchanged keeps its queue id.
func (q *Queue) KeepsIDs() bool { return true }

// Passable says whether mail could get through: each pattern names a
// directory, and each inbound directory has an outbound one on its file system.
func (q *Queue) Passable() error {
	for _, pattern := range append(append([]string{}, q.In...), q.Out...) {
		if _, err := expand([]string{pattern}); err != nil {
			return err
		}
	}
	dirs, err := expand(q.In)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if _, err := q.outbound(at(dir), ""); err != nil {
			return err
		}
	}
	return nil
}

// Close lets go of the directories.
func (q *Queue) Close() { q.dirs.Close() }

// What a listing leaves alone, and counts.
const (
	skipHeld     = "hf: quarantined in the MTA"
	skipLost     = "Qf: lost, refused by the MTA"
	skipLong     = "name too long for sendmail"
	skipStrange  = "not a regular file"
	skipEmpty    = "control file still empty"
	skipOrphan   = "data file without control file"
	skipPrepared = "prepared file of a commit that a crash ended"
)

const (
	pageSize    = 512
	maxNameLen  = 20            // sendmail skips longer names (reference: A1)
	orphanAfter = 2 * time.Hour // a younger data file may still be received
)

// List yields what is in the inbound directories, with the control file's
// time. Nothing is opened.
func (q *Queue) List(ctx context.Context, yield func(queue.Entry) bool) (queue.Listing, error) {
	res := queue.Listing{Skipped: map[string]int{}}
	dirs, err := expand(q.In)
	if err != nil {
		return res, err
	}
	for _, base := range dirs {
		p := at(base)
		for _, dir := range p.distinct() {
			more, err := q.listDir(ctx, p, dir, &res, yield)
			if err != nil || !more {
				return res, err
			}
		}
	}
	return res, nil
}

func (p place) distinct() []string {
	out := []string{p.qf}
	if p.df != p.qf {
		out = append(out, p.df)
	}
	return out
}

func (q *Queue) listDir(ctx context.Context, p place, dir string, res *queue.Listing, yield func(queue.Entry) bool) (bool, error) {
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
			e, ok := q.listed(p, dir, name, res)
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
func (q *Queue) listed(p place, dir, name string, res *queue.Listing) (queue.Entry, bool) {
	skip := func(why string) (queue.Entry, bool) {
		id := queue.ID{Queue: q.Config.Name, Dir: p.base, Name: idOf(name)}
		res.Skip(queue.Left{ID: id, File: filepath.Join(dir, name), Why: why, Do: advice(why, id)})
		return queue.Entry{}, false
	}
	switch kind := name[:min(2, len(name))]; {
	case kind == "qf" && dir == p.qf:
	case kind == "hf":
		return skip(skipHeld)
	case kind == "Qf":
		return skip(skipLost)
	case kind == "hc" || kind == "hb":
		if q.isOrphan(p, name) {
			return skip(skipPrepared)
		}
		return queue.Entry{}, false
	case kind == "df":
		if q.isOrphan(p, name) {
			return skip(skipOrphan)
		}
		return queue.Entry{}, false
	default:
		return queue.Entry{}, false // tf, xf and what is not sendmail's
	}
	if len(name) > maxNameLen {
		return skip(skipLong)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
		return queue.Entry{}, false // gone meanwhile
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return skip(skipStrange)
	case st.Size == 0:
		return skip(skipEmpty)
	}
	size := st.Size
	var df unix.Stat_t
	if err := unix.Lstat(p.data(name[2:]), &df); err == nil {
		size += df.Size
	}
	return queue.Entry{
		ID: queue.ID{Queue: q.Config.Name, Dir: p.base, Name: name[2:]}, Arrived: time.Unix(st.Mtim.Unix()), Size: size,
	}, true
}

// idOf is the queue id in a file's name; prepared files have a number behind.
func idOf(name string) string {
	if kind := name[:2]; kind == "hc" || kind == "hb" {
		id, _, _ := strings.Cut(name[2:], ".")
		return id
	}
	return name[2:]
}

// advice says what a person can do about a file that is left alone. Without
// -Q, sendmail -qQ would deliver the message unscanned (reference: A6).
func advice(why string, id queue.ID) string {
	switch why {
	case skipHeld:
		return fmt.Sprintf("sendmail -qQ -Q -qI%s -OQueueDirectory=%s ends its quarantine, and Holdfast takes it", id.Name, id.Dir)
	case skipLost:
		return "look at it; renamed to qf" + id.Name + " it is taken again"
	}
	return ""
}

// isOrphan says that a file has had no control file for long.
func (q *Queue) isOrphan(p place, name string) bool {
	if _, err := os.Lstat(p.control(idOf(name))); !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	for _, dir := range p.distinct() {
		if st, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return time.Since(st.ModTime()) > orphanAfter
		}
	}
	return false
}

// validID says that s can be a queue id: no path, short enough for sendmail.
func validID(s string) bool {
	return s != "" && len(s) <= maxNameLen-2 && !strings.ContainsAny(s, "/\x00\n\r ,=")
}
