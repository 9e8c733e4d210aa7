package sendmail

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
)

// requeueNote is what a release from quarantine writes into the item's
// journal before it publishes anything.
type requeueNote struct {
	In  string `json:"in"`
	Out string `json:"out"`
	ID  string `json:"id"`
	QF  uint64 `json:"qf"` // inodes of the prepared files
	DF  uint64 `json:"df"`
}

// Requeue puts a quarantine item on the outbound side, for its recipients.
// Order (CUSTODY 3): unnamed data and control file in the inbound directory,
// content, fsync; names that the MTA ignores; fsync; journal their inodes;
// data file out; fsync; control file out; fsync. A prepared file that is
// missing after the journal was written has been published. A crash between
// the names and the journal leaves files that listings count, and the item.
func (q *Queue) Requeue(ctx context.Context, it queue.Item) (string, error) {
	var note requeueNote
	if text := it.Journal(); text != nil {
		if err := json.Unmarshal(text, &note); err != nil {
			return "", fmt.Errorf("read the item's journal: %w", err)
		}
		if !validID(note.ID) {
			return "", fmt.Errorf("the item's journal names the queue id %.60q", note.ID)
		}
	} else {
		var err error
		if note, err = q.prepareRequeue(ctx, it); err != nil {
			return "", fmt.Errorf("prepare release: %w", err)
		}
	}
	in, out := at(note.In), at(note.Out)
	if err := q.files.Move(in.newData(note.ID, 0), out.data(note.ID), note.DF); err != nil {
		return "", fmt.Errorf("release as %s: %w", note.ID, err)
	}
	if err := q.FS.FsyncDir(out.df); err != nil {
		return "", err
	}
	if err := q.files.Move(in.newControl(note.ID, 0), out.control(note.ID), note.QF); err != nil {
		return "", fmt.Errorf("release as %s: %w", note.ID, err)
	}
	for _, dir := range []string{out.qf, in.qf, in.df} {
		if err := q.FS.FsyncDir(dir); err != nil {
			return "", err
		}
	}
	return note.ID, nil
}

func (q *Queue) prepareRequeue(ctx context.Context, it queue.Item) (requeueNote, error) {
	var note requeueNote
	dirs, err := expand(q.In)
	if err != nil {
		return note, err
	}
	in := at(dirs[0])
	spec := it.Spec()
	old, err := parseControl(spec.Control, q.MaxRecipients)
	if err != nil {
		return note, fmt.Errorf("the item's control data: %w", err)
	}
	// A new life in the queue: with its old age it could bounce at the first delay.
	c, err := old.build(change{newBody: true, created: time.Now().Unix()})
	if err != nil {
		return note, err
	}
	note.In = in.base
	out, err := q.outbound(in, spec.Identity.ID.Name)
	if err != nil {
		return note, err
	}
	note.Out = out.base
	if note.ID, err = q.unusedID(in, out); err != nil {
		return note, err
	}
	message, err := it.Message()
	if err != nil {
		return note, err
	}
	defer message.Close()
	body := &contextReader{ctx, io.NewSectionReader(message, spec.BodyAt, 1<<62)}
	df, err := q.requeueFile(in.df, body)
	if err != nil {
		return note, err
	}
	defer df.close()
	qf, err := q.requeueFile(in.qf, bytes.NewReader(c.bytes()))
	if err != nil {
		return note, err
	}
	defer qf.close()
	note.DF, note.QF = df.ino, qf.ino
	text, err := json.Marshal(note)
	if err != nil {
		return note, err
	}
	return note, q.nameRequeue(in, note, df, qf, func() error { return it.SetJournal(text) })
}

// nameRequeue names the prepared files and journals them.
func (q *Queue) nameRequeue(in place, note requeueNote, df, qf newFile, journal func() error) error {
	err := q.FS.Link(df.f.OS(), in.newData(note.ID, 0))
	if err == nil {
		err = q.FS.Link(qf.f.OS(), in.newControl(note.ID, 0))
	}
	if err == nil {
		err = errors.Join(q.FS.FsyncDir(in.df), q.FS.FsyncDir(in.qf))
	}
	if err != nil {
		q.files.Unlink(in.newControl(note.ID, 0), qf.ino)
		q.files.Unlink(in.newData(note.ID, 0), df.ino)
		return err
	}
	// A journal that could not be written may be there all the same: the
	// names stay, for it takes a missing one for a published one.
	return journal()
}

// requeueFile writes an unnamed file as sendmail would own it: mode 0640,
// the group of a set-group-id directory.
func (q *Queue) requeueFile(dir string, content io.Reader) (newFile, error) {
	f, err := q.FS.TmpFile(dir, 0o640)
	if err != nil {
		return newFile{}, err
	}
	n := newFile{f: f}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.OS().Fd()), &st); err != nil {
		n.close()
		return n, fmt.Errorf("fstat of the new file: %w", err)
	}
	n.ino = st.Ino
	if err := f.Own(-1, -1, 0o640); err != nil {
		n.close()
		return n, err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, content, make([]byte, 64<<10)); err != nil {
		n.close()
		return n, fmt.Errorf("write the new file: %w", err)
	}
	if err := f.Fsync(); err != nil {
		n.close()
		return n, err
	}
	return n, nil
}
