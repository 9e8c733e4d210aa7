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
}

// Requeue puts a quarantine item back for delivery, for its recipients.
// Order (CUSTODY 3): unnamed file in hold, whole, fsync; a name of the kind
// that files in the making have; fsync; journal its inode; rename to incoming;
// fsync both. A prepared file that is missing after the journal was written
// has been published.
func (q *Queue) Requeue(ctx context.Context, it queue.Item) (string, error) {
	var note requeueNote
	if text := it.Journal(); text != nil {
		if err := json.Unmarshal(text, &note); err != nil {
			return "", fmt.Errorf("read the item's journal: %w", err)
		}
		if !validID(note.ID) || note.Temp == "" || filepath.Base(note.Temp) != note.Temp {
			return "", fmt.Errorf("the item's journal names the queue id %.60q", note.ID)
		}
	} else {
		var err error
		if note, err = q.prepareRequeue(ctx, it); err != nil {
			return "", fmt.Errorf("prepare release: %w", err)
		}
	}
	if err := q.toIncoming(filepath.Join(note.Dir, note.Temp), group{New: note.ID, Ino: note.Ino}); err != nil {
		return "", fmt.Errorf("release as %s: %w", note.ID, err)
	}
	for _, dir := range []string{q.in(incomingDir, note.ID), note.Dir} {
		if err := q.FS.FsyncDir(dir); err != nil {
			return "", err
		}
	}
	return note.ID, nil
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
	f, ino, err := q.newFile(id, uid, gid, func(w io.Writer, overwrite func([]byte) error) error {
		return old.build(w, overwrite, text, nil, time.Now())
	})
	if err != nil {
		return note, err
	}
	defer f.Close()
	if note.Temp, err = q.nameFile(f, id); err != nil {
		return note, err
	}
	note.Ino, note.ID = ino, withInode(id, ino)
	if err := q.FS.FsyncDir(note.Dir); err != nil {
		q.files.Unlink(filepath.Join(note.Dir, note.Temp), ino)
		return note, err
	}
	journal, err := json.Marshal(note)
	if err != nil {
		return note, err
	}
	// A journal that could not be written may be there all the same: the name
	// stays, for it takes a missing one for a published one.
	return note, it.SetJournal(journal)
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
	err := f.build(&out, func(head []byte) error { copy(out.Bytes(), head); return nil }, bytes.NewReader(nil), k, time.Time{})
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
