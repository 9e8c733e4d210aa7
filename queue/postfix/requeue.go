package postfix

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
)

// requeueNote is what a release from quarantine writes into the item's
// journal before it publishes anything.
type requeueNote struct {
	Dir  string `json:"dir"` // of the prepared file
	Temp string `json:"temp"`
	Ino  uint64 `json:"inode"`
	ID   string `json:"id"` // queue id on release
	T    int64  `json:"t"`  // its time of arrival
	// Named says that the file has had its name: if that is missing now, the
	// file has been published.
	Named bool `json:"named"`
}

// Requeue puts a quarantine item back for delivery, for its recipients.
// Order (CUSTODY 3): unnamed file in hold, whole, fsync; journal its inode and
// the name that it is to get, of the kind that files in the making have; name;
// fsync; journal that it has it; rename to incoming; fsync both.
func (q *Queue) Requeue(ctx context.Context, it queue.Item) (string, error) {
	note, err := q.noteOf(it)
	if err == nil && !note.Named {
		if note.Temp != "" { // an earlier try, that came to nothing
			q.files.Unlink(filepath.Join(note.Dir, note.Temp), note.Ino)
		}
		note, err = q.prepareRequeue(ctx, it)
	}
	if err != nil {
		return "", fmt.Errorf("prepare release: %w", err)
	}
	if err := q.toIncoming(filepath.Join(note.Dir, note.Temp), group{New: note.ID, Ino: note.Ino}); err != nil {
		return "", fmt.Errorf("release as %s: %w", note.ID, err)
	}
	for _, dir := range []string{q.in(incomingDir, note.ID), note.Dir} {
		if err := q.FS.FsyncDir(dir); err != nil {
			return "", err
		}
	}
	q.noteRelease(note.ID, note.Ino, note.T)
	return note.ID, nil
}

// noteOf reads the item's journal: what an earlier try has prepared.
func (q *Queue) noteOf(it queue.Item) (note requeueNote, err error) {
	q.mu.Lock()
	err = q.load()
	q.mu.Unlock()
	text := it.Journal()
	if err != nil || text == nil {
		return note, err
	}
	if err := json.Unmarshal(text, &note); err != nil {
		return note, fmt.Errorf("read the item's journal: %w", err)
	}
	if !validID(note.ID) || note.Temp == "" || filepath.Base(note.Temp) != note.Temp || note.Dir != q.in(holdDir, note.ID) {
		return note, fmt.Errorf("the item's journal names the queue id %.60q", note.ID)
	}
	return note, nil
}

func (q *Queue) prepareRequeue(ctx context.Context, it queue.Item) (note requeueNote, err error) {
	spec := it.Spec()
	id := spec.Identity.ID.Name
	if !validID(id) {
		return note, fmt.Errorf("the item's queue id is %.60q", id)
	}
	old, err := parse(bytes.NewReader(spec.Control), int64(len(spec.Control)), q.MaxControl, q.MaxRecipients)
	if err != nil {
		return note, fmt.Errorf("the item's control data: %w", err)
	}
	message, err := it.Message()
	if err != nil {
		return note, err
	}
	defer message.Close()
	uid, gid, err := q.mailOwner()
	if err != nil {
		return note, err
	}
	note.Dir = q.in(holdDir, id)
	if err := q.makeDir(holdDir, note.Dir); err != nil {
		return note, err
	}
	text := &contextReader{ctx, io.NewSectionReader(message, 0, 1<<62)}
	// A new life in the queue: with its old age it could bounce at the first delay.
	now := time.Now()
	f, ino, err := q.newFile(id, uid, gid, func(w io.Writer, overwrite func([]byte) error) error {
		return old.build(w, overwrite, text, nil, now, "")
	})
	if err != nil {
		return note, err
	}
	defer f.Close()
	note.Temp, note.Ino, note.ID, note.T = tempName(), ino, withInode(id, ino), now.Unix()
	if err := setNote(it, note); err != nil {
		return note, err
	}
	if err := q.FS.Link(f.OS(), filepath.Join(note.Dir, note.Temp)); err != nil {
		return note, err
	}
	if err := q.FS.FsyncDir(note.Dir); err != nil {
		return note, err
	}
	note.Named = true
	return note, setNote(it, note)
}

func setNote(it queue.Item, note requeueNote) error {
	text, err := json.Marshal(note)
	if err != nil {
		return err
	}
	return it.SetJournal(text)
}

// mailOwner is who owns queue files: the owner of the hold directory, with
// the group of its account.
func (q *Queue) mailOwner() (uid, gid int, err error) {
	var st unix.Stat_t
	dir := filepath.Join(q.Dir, holdDir)
	if err := unix.Stat(dir, &st); err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	uid, gid = int(st.Uid), int(st.Gid)
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		if gid, err = strconv.Atoi(u.Gid); err != nil {
			return 0, 0, fmt.Errorf("group of %s: %w", u.Username, err)
		}
	}
	return uid, gid, nil
}

// control is the file without its content, for the given recipients: what an
// item needs for its release.
func (f *file) control(recipients []int) ([]byte, error) {
	var k keep
	if recipients != nil {
		want := map[int]bool{}
		for _, i := range recipients {
			want[i] = true
		}
		k = func(i int) bool { return want[i] }
	}
	var out bytes.Buffer
	err := f.build(&out, func(head []byte) error { copy(out.Bytes(), head); return nil }, bytes.NewReader(nil), k, time.Time{}, "")
	return out.Bytes(), err
}

// bodyOffset is where the body begins in a rendered message: behind the first
// blank line, or at the end.
func bodyOffset(r io.ReaderAt) (int64, error) {
	buf := make([]byte, readAhead)
	var at int64
	start := true // of a line
	for {
		n, err := r.ReadAt(buf, at)
		for i, c := range buf[:n] {
			if c == '\n' && start {
				return at + int64(i) + 1, nil
			}
			start = c == '\n'
		}
		at += int64(n)
		if errors.Is(err, io.EOF) {
			return at, nil
		}
		if err != nil {
			return 0, fmt.Errorf("read the rendered message: %w", err)
		}
	}
}
