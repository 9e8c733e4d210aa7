// Package quarantine keeps messages that are held back: one directory per
// item, with the message as a file that people and tools can read.
//
//	ROOT/20261124/NAME/item.json   what it is, and why it is here
//	ROOT/20261124/NAME/control     the MTA's control data, for a release
//	ROOT/20261124/NAME/message     the whole message, LF line ends
//	ROOT/.prepared/NAME/           not visible: its message is still queued
//
// The order of every operation is CUSTODY 3's.
package quarantine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
)

// Store is the quarantine below Root. It implements queue.Store.
type Store struct {
	Root string
	FS   *durable.FS
	Now  func() time.Time
}

// Errors of lookups.
var (
	ErrNotFound      = errors.New("no such item in the quarantine")
	ErrBusy          = errors.New("the item is in use by another process")
	ErrNotReleasable = errors.New("somebody else took this message out of the queue: release it only on purpose (--again)")
)

const (
	preparedDir = ".prepared"
	asidePrefix = "deleted-"
	version     = 1
	maxJSON     = 64 << 20 // bytes of an item's description that are read
)

// Meta is an item's description, item.json.
type Meta struct {
	Version   int             `json:"version"`
	Identity  queue.Identity  `json:"identity"`
	Group     int             `json:"group"`
	Envelope  queue.Envelope  `json:"envelope"`
	BodyAt    int64           `json:"body_at"` // offset of the body in the message
	Size      int64           `json:"size"`
	SHA256    string          `json:"sha256"` // of the message
	When      time.Time       `json:"when"`
	Verdict   json.RawMessage `json:"verdict,omitempty"`
	Name      string          `json:"-"`
	Dir       string          `json:"-"`
	Uncertain bool            `json:"-"` // the message was gone when a crash was recovered
}

// New makes the directories of a quarantine.
func New(root string, fsys *durable.FS) (*Store, error) {
	s := &Store{Root: root, FS: fsys, Now: time.Now}
	if err := s.FS.MkdirAll(filepath.Join(root, preparedDir), 0o700); err != nil {
		return nil, fmt.Errorf("make the quarantine: %w", err)
	}
	return s, nil
}

// Name is an item's name: from the identity of its message and the group,
// nothing of it chosen by a sender.
func Name(id queue.Identity, group int) string {
	h := sha256.Sum256([]byte(fmt.Sprintf("%s\x00%d\x00%d", id.ID.Key(), id.T, id.Ino)))
	return fmt.Sprintf("%s-%s-%d", day(id), hex.EncodeToString(h[:6]), group)
}

func day(id queue.Identity) string { return time.Unix(id.T, 0).UTC().Format("20060102") }

var validName = regexp.MustCompile(`^[0-9]{8,12}-[0-9a-f]{12}-[0-9]{1,6}$`)

func (s *Store) prepared(name string) string { return filepath.Join(s.Root, preparedDir, name) }
func (s *Store) visible(name string) string {
	d, _, _ := strings.Cut(name, "-")
	return filepath.Join(s.Root, d, name)
}

// Prepare writes an item that nobody sees yet. Order: what an earlier try
// prepared goes; directory; files, each fsynced; fsync of the directory; fsync
// of its parent. An item of the same name that is visible already is the
// same message: preparing it again is not an error.
func (s *Store) Prepare(ctx context.Context, spec queue.ItemSpec, message io.Reader) (string, error) {
	name := Name(spec.Identity, spec.Group)
	if !validName.MatchString(name) {
		return "", fmt.Errorf("creation time %d gives no name for an item", spec.Identity.T)
	}
	if _, err := os.Lstat(s.visible(name)); err == nil {
		return name, nil
	}
	dir := s.prepared(name)
	if err := s.remove(dir); err != nil {
		return "", fmt.Errorf("prepare quarantine item: %w", err)
	}
	if err := s.FS.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("prepare quarantine item: %w", err)
	}
	meta := Meta{
		Version: version, Identity: spec.Identity, Group: spec.Group, Envelope: spec.Envelope,
		BodyAt: spec.BodyAt, When: s.Now().UTC(), Verdict: spec.Verdict,
	}
	h := sha256.New()
	err := s.FS.WriteFile(filepath.Join(dir, "message"), 0o600, func(w io.Writer) (err error) {
		meta.Size, err = io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(w, h)}, &contextReader{ctx, message}, make([]byte, 64<<10))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("prepare quarantine item: %w", err)
	}
	meta.SHA256 = hex.EncodeToString(h.Sum(nil))
	text, err := json.MarshalIndent(meta, "", " ")
	if err != nil {
		return "", fmt.Errorf("describe quarantine item: %w", err)
	}
	if err := s.write(filepath.Join(dir, "control"), spec.Control); err != nil {
		return "", fmt.Errorf("prepare quarantine item: %w", err)
	}
	if err := s.write(filepath.Join(dir, "item.json"), append(text, '\n')); err != nil {
		return "", fmt.Errorf("prepare quarantine item: %w", err)
	}
	if err := s.FS.FsyncDir(filepath.Dir(dir)); err != nil {
		return "", fmt.Errorf("prepare quarantine item: %w", err)
	}
	return name, nil
}

func (s *Store) write(path string, content []byte) error {
	return s.FS.WriteFile(path, 0o600, func(w io.Writer) error {
		_, err := w.Write(content)
		return err
	})
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// Commit makes a prepared item visible, after its message has left the
// queue. Order: day directory; rename; fsync of both parents. Repeating it
// is not an error.
func (s *Store) Commit(_ context.Context, name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%.60q is no item's name", name)
	}
	to := s.visible(name)
	if err := s.FS.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return fmt.Errorf("commit quarantine item %s: %w", name, err)
	}
	err := s.FS.Rename(s.prepared(name), to)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
		if _, lerr := os.Lstat(to); lerr == nil {
			err = nil // an earlier try
		}
	}
	if err != nil {
		return fmt.Errorf("commit quarantine item %s: %w", name, err)
	}
	for _, dir := range []string{filepath.Dir(to), filepath.Join(s.Root, preparedDir)} {
		if err := s.FS.FsyncDir(dir); err != nil {
			return fmt.Errorf("commit quarantine item %s: %w", name, err)
		}
	}
	return nil
}

// CommitUncertain makes a prepared item visible whose message was gone after
// a crash: we removed it, or somebody else took it. The flag is written
// before the item is visible.
func (s *Store) CommitUncertain(ctx context.Context, name string) error {
	if err := s.write(filepath.Join(s.prepared(name), "uncertain"), []byte("the message was gone after a crash\n")); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("flag quarantine item %s: %w", name, err)
	}
	return s.Commit(ctx, name)
}

// Abort removes a prepared item. One that is visible stays.
func (s *Store) Abort(_ context.Context, name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%.60q is no item's name", name)
	}
	if err := s.remove(s.prepared(name)); err != nil {
		return fmt.Errorf("abort quarantine item %s: %w", name, err)
	}
	return nil
}

// remove deletes an item's directory: the description first, so that what a
// crash leaves is not taken for an item. A missing one is not an error.
func (s *Store) remove(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name() == "item.json" && entries[j].Name() != "item.json" })
	for _, e := range entries {
		if err := s.FS.Unlink(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := s.FS.FsyncDir(dir); err != nil {
		return err
	}
	if err := s.FS.Rmdir(dir); err != nil {
		return err
	}
	return s.FS.FsyncDir(filepath.Dir(dir))
}

// Prepared lists items that a crash left prepared. One without a complete
// description was never decided upon, and is removed.
func (s *Store) Prepared(ctx context.Context) ([]Meta, error) {
	entries, err := os.ReadDir(filepath.Join(s.Root, preparedDir))
	if err != nil {
		return nil, fmt.Errorf("list prepared quarantine items: %w", err)
	}
	var out []Meta
	for _, e := range entries {
		dir := s.prepared(e.Name())
		m, err := readMeta(dir)
		if err == nil && complete(dir, m) {
			out = append(out, m)
			continue
		}
		if strings.HasPrefix(e.Name(), asidePrefix) {
			if err := s.remove(dir); err != nil {
				return out, fmt.Errorf("finish a deletion: %w", err)
			}
		}
		if validName.MatchString(e.Name()) {
			if err := s.Abort(ctx, e.Name()); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

// complete says that every file of an item is there in full.
func complete(dir string, m Meta) bool {
	st, err := os.Lstat(filepath.Join(dir, "message"))
	_, cerr := os.Lstat(filepath.Join(dir, "control"))
	return err == nil && cerr == nil && st.Size() == m.Size
}

func readMeta(dir string) (Meta, error) {
	var m Meta
	f, err := os.Open(filepath.Join(dir, "item.json"))
	if err != nil {
		return m, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxJSON))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if m.Version != version {
		return m, fmt.Errorf("%s: version %d is not known", f.Name(), m.Version)
	}
	m.Name, m.Dir = filepath.Base(dir), dir
	if _, err := os.Lstat(filepath.Join(dir, "uncertain")); err == nil {
		m.Uncertain = true
	}
	return m, nil
}

// IsName says that a text is an item's name.
func IsName(s string) bool { return validName.MatchString(s) }

// List yields every item, the newest first; a damaged one with an error.
// Days are by the age of the messages, as the names say.
func (s *Store) List(ctx context.Context, yield func(Meta, error) bool) error {
	days, err := os.ReadDir(s.Root)
	if err != nil {
		return fmt.Errorf("list the quarantine: %w", err)
	}
	for i := len(days) - 1; i >= 0; i-- {
		if !days[i].IsDir() || days[i].Name() == preparedDir {
			continue
		}
		items, err := s.listDay(ctx, filepath.Join(s.Root, days[i].Name()))
		if err != nil {
			return err
		}
		for _, it := range items {
			if !yield(it.Meta, it.err) {
				return nil
			}
		}
	}
	return nil
}

type listed struct {
	Meta
	err error
}

func (s *Store) listDay(ctx context.Context, dir string) ([]listed, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the quarantine: %w", err)
	}
	var items []listed
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !validName.MatchString(e.Name()) {
			continue // being deleted, or not ours
		}
		m, err := readMeta(filepath.Join(dir, e.Name()))
		m.Name, m.Dir = e.Name(), filepath.Join(dir, e.Name())
		items = append(items, listed{m, err})
	}
	sort.SliceStable(items, func(i, j int) bool { return items[i].When.After(items[j].When) })
	return items, nil
}

// Find returns the one item that a name, the beginning of one, a queue id or
// a Message-ID means.
func (s *Store) Find(ctx context.Context, what string) (Meta, error) {
	var found []Meta
	err := s.List(ctx, func(m Meta, _ error) bool {
		if m.Name == what || strings.HasPrefix(m.Name, what) && len(what) >= 10 || m.Identity.ID.Name == what ||
			strings.Contains(what, "@") && m.messageID() == strings.Trim(what, "<>") {
			found = append(found, m)
		}
		return true
	})
	switch {
	case err != nil:
		return Meta{}, err
	case len(found) == 0:
		return Meta{}, fmt.Errorf("%.100q: %w", what, ErrNotFound)
	case len(found) > 1:
		names := []string{}
		for _, m := range found[:min(len(found), maxNamed)] {
			names = append(names, m.Name)
		}
		return Meta{}, fmt.Errorf("ambiguous: %.100q means %d items: %s", what, len(found), strings.Join(names, ", "))
	}
	return found[0], nil
}

const (
	maxNamed  = 5        // items that the error for an ambiguous name lists
	maxHeader = 64 << 10 // bytes of a message in which its Message-ID is looked for
)

// messageID is the first Message-ID of an item's message, without angle
// brackets, "" if it has none.
func (m Meta) messageID() string {
	f, err := os.Open(filepath.Join(m.Dir, "message"))
	if err != nil {
		return ""
	}
	defer f.Close()
	head, err := io.ReadAll(io.LimitReader(f, maxHeader))
	if err != nil {
		return ""
	}
	text, _, _ := strings.Cut(string(head), "\n\n")
	unfolded := strings.NewReplacer("\n ", " ", "\n\t", " ").Replace(text)
	for line := range strings.Lines(unfolded) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.EqualFold(strings.TrimSpace(name), "Message-ID") {
			return strings.Trim(strings.TrimSpace(value), "<>")
		}
	}
	return ""
}

// Item is a visible item, locked against other releases and deletions.
type Item struct {
	Meta
	store *Store
	lock  *os.File
}

// Open locks an item.
func (s *Store) Open(m Meta) (*Item, error) {
	f, err := os.Open(m.Dir)
	if err != nil {
		return nil, fmt.Errorf("open quarantine item: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", m.Name, ErrBusy)
	}
	now, err := readMeta(m.Dir) // it may have changed, or gone, before the lock
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open quarantine item %s: %w", m.Name, err)
	}
	return &Item{Meta: now, store: s, lock: f}, nil
}

// Close unlocks.
func (it *Item) Close() error { return it.lock.Close() }

// Spec is what the item was made from; the message is apart.
func (it *Item) Spec() queue.ItemSpec {
	control, err := os.ReadFile(filepath.Join(it.Dir, "control"))
	if err != nil {
		control = nil // the queue refuses to release without it, and says so
	}
	return queue.ItemSpec{
		Identity: it.Identity, Group: it.Group, Envelope: it.Envelope, Control: control, BodyAt: it.BodyAt, Verdict: it.Verdict,
	}
}

// Message opens the whole message.
func (it *Item) Message() (*os.File, error) { return os.Open(filepath.Join(it.Dir, "message")) }

// Journal is what a release in progress has prepared, nil if none is.
func (it *Item) Journal() []byte {
	text, err := os.ReadFile(filepath.Join(it.Dir, "journal"))
	if err != nil {
		return nil
	}
	return text
}

// SetJournal stores it durably; nil removes it.
func (it *Item) SetJournal(text []byte) error {
	path := filepath.Join(it.Dir, "journal")
	if text == nil {
		if err := it.store.FS.Unlink(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("end the release's journal: %w", err)
		}
		return it.store.FS.FsyncDir(it.Dir)
	}
	return it.store.FS.ReplaceFile(path, 0o600, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
}

// Release is one release of an item.
type Release struct {
	NewID string    `json:"new_id"`
	By    string    `json:"by"`
	When  time.Time `json:"when"`
}

// Releases lists what was released before.
func (m Meta) Releases() ([]Release, error) {
	text, err := os.ReadFile(filepath.Join(m.Dir, "released.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the releases of %s: %w", m.Name, err)
	}
	var out []Release
	if err := json.Unmarshal(text, &out); err != nil {
		return nil, fmt.Errorf("read the releases of %s: %w", m.Name, err)
	}
	return out, nil
}

// Requeuer puts an item back (queue.Queue).
type Requeuer interface {
	Requeue(ctx context.Context, it queue.Item) (newID string, err error)
}

// Release hands the item to its queue, once: again is needed for a second
// time, and for an item whose message somebody else may have taken. Order:
// the queue prepares, journals in the item, publishes; the release is written
// down; the journal ends. A crash before the last step is finished by the
// next call, which publishes nothing twice.
func (it *Item) Release(ctx context.Context, q Requeuer, by string, again bool) (Release, error) {
	before, err := it.Releases()
	if err != nil {
		return Release{}, err
	}
	unfinished := it.Journal() != nil
	switch {
	case unfinished:
	case len(before) > 0 && !again:
		return before[len(before)-1], nil
	case it.Uncertain && !again:
		return Release{}, fmt.Errorf("%s: %w", it.Name, ErrNotReleasable)
	}
	id, err := q.Requeue(ctx, it)
	if err != nil {
		return Release{}, fmt.Errorf("release %s: %w", it.Name, err)
	}
	r := Release{NewID: id, By: by, When: it.store.Now().UTC()}
	if n := len(before); n == 0 || before[n-1].NewID != id {
		text, err := json.Marshal(append(before, r))
		if err != nil {
			return r, fmt.Errorf("note the release of %s: %w", it.Name, err)
		}
		err = it.store.FS.ReplaceFile(filepath.Join(it.Dir, "released.json"), 0o600, func(w io.Writer) error {
			_, err := w.Write(append(text, '\n'))
			return err
		})
		if err != nil {
			return r, fmt.Errorf("%s was released as %s, but that could not be noted: %w", it.Name, id, err)
		}
	}
	return r, it.SetJournal(nil)
}

// Delete removes the item for good: aside first, so that no listing shows
// half of it, then its files.
func (it *Item) Delete() error {
	aside := it.store.prepared(asidePrefix + it.Name)
	if err := it.store.FS.Rename(it.Dir, aside); err != nil {
		return fmt.Errorf("delete %s: %w", it.Name, err)
	}
	for _, dir := range []string{filepath.Dir(it.Dir), filepath.Dir(aside)} {
		if err := it.store.FS.FsyncDir(dir); err != nil {
			return fmt.Errorf("delete %s: %w", it.Name, err)
		}
	}
	if err := it.store.remove(aside); err != nil {
		return fmt.Errorf("delete %s: %w", it.Name, err)
	}
	return nil
}
