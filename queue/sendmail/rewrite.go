package sendmail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/inode"
)

// newFile is a prepared file: unnamed until its content is on the disk.
type newFile struct {
	f    *durable.File
	path string // the ignored name that it gets
	ino  uint64
}

func (n newFile) close() {
	if n.f != nil {
		n.f.Close()
	}
}

// lockedNew is a new control file under the MTA's lock.
type lockedNew struct{ f *os.File }

// prepareFiles writes what a rewritten message needs. Order: unnamed files
// (their inodes are the marker's), bodies, control files, fsync of each,
// quarantine items. A crash leaves nothing of it; what has a name later
// (nameFiles) is named by the marker.
func (q *Queue) prepareFiles(ctx context.Context, j *job) error {
	id := j.entry.ID.Name
	m := marker{token: q.Token, orig: j.stats.Control.Ino, df: j.stats.Data.Ino, final: finalRemove}
	changes := make([]change, len(j.plan.Groups))
	files := make([]int, len(j.plan.Groups)) // index of each group's control file in made
	head, err := q.unnamed(j, j.in.qf, j.in.newControl(id, 0))
	if err != nil {
		return err
	}
	m.self = head.ino
	j.marker = m
	for i, g := range j.plan.Groups {
		p := prepared{do: g.Disposition}
		ch := change{recipients: g.Recipients, newBody: j.away}
		switch g.Disposition {
		case queue.Quarantine:
			if p.item, err = q.prepareItem(ctx, j.claim, g, i); err != nil {
				return err
			}
		case queue.Release:
			if g.Edit != nil {
				ch.edits = g.Edit.Header
			}
			if p.df, err = q.prepareBody(j, g, i, &ch); err != nil {
				return err
			}
			n := head
			if m.final == finalPublish { // the original id is taken: a further group
				if n, err = q.unnamed(j, j.in.qf, j.in.newControl(id, i+1)); err != nil {
					return err
				}
				files[i] = len(j.made) - 1
				p.id, err = q.unusedID(j.in, j.out)
			} else {
				m.final, p.id = finalPublish, id
				err = q.free(j.out, id)
			}
			if err != nil {
				return err
			}
			p.qf = n.ino
		}
		m.groups, changes[i] = append(m.groups, p), ch
		j.marker = m
	}
	return q.writeControls(j, m, changes, files)
}

// nameFiles gives prepared files their names: the one with the marker first,
// durable before the others, so that no other is ever there without it.
func (q *Queue) nameFiles(jobs []*job) {
	names := func(j *job) []string {
		if j.kind != rewritten {
			return nil
		}
		return []string{j.in.qf, j.in.df}
	}
	link := func(of func(*job) []newFile) func(*job) error {
		return func(j *job) error {
			if j.kind != rewritten {
				return nil
			}
			for _, n := range of(j) {
				if err := q.files.Link(n.f.OS(), n.path); err != nil {
					return err
				}
			}
			return nil
		}
	}
	q.phase(jobs, link(func(j *job) []newFile { return j.made[:1] }))
	q.sync(jobs, names)
	q.phase(jobs, link(func(j *job) []newFile { return j.made[1:] }))
	q.sync(jobs, names)
}

// free refuses an id that another outbound message has.
func (q *Queue) free(out place, id string) error {
	for _, path := range []string{out.control(id), out.data(id)} {
		if st, err := inode.Lstat(path); err == nil {
			return fmt.Errorf("%s (inode %d): %w", path, st.Ino, queue.ErrCollision)
		}
	}
	return nil
}

// unnamed makes a prepared file with the original's owner and mode.
func (q *Queue) unnamed(j *job, dir, path string) (newFile, error) {
	f, err := q.FS.TmpFile(dir, 0o600)
	if err != nil {
		return newFile{}, err
	}
	n := newFile{f: f, path: path}
	j.made = append(j.made, n)
	var like, st unix.Stat_t
	if err := unix.Fstat(int(j.qf.Fd()), &like); err != nil {
		return n, fmt.Errorf("fstat of the original: %w", err)
	}
	if err := unix.Fstat(int(f.OS().Fd()), &st); err != nil {
		return n, fmt.Errorf("fstat of the new file: %w", err)
	}
	n.ino = st.Ino
	j.made[len(j.made)-1] = n
	return n, f.Own(int(like.Uid), int(like.Gid), fs.FileMode(like.Mode&0o777))
}

// prepareBody returns the inode of a group's data file: the original one if
// the body is unchanged and at its place.
func (q *Queue) prepareBody(j *job, g queue.Group, i int, ch *change) (uint64, error) {
	var body io.Reader
	switch {
	case g.Edit != nil && g.Edit.Body != nil:
		body = g.Edit.Body
		ch.newBody = true
	case j.away:
		body = io.NewSectionReader(j.df, 0, 1<<62)
	default:
		return j.stats.Data.Ino, nil
	}
	n, err := q.unnamed(j, j.in.df, j.in.newData(j.entry.ID.Name, i+1))
	if err != nil {
		return 0, err
	}
	w := &eightBitWriter{w: n.f}
	if _, err := io.CopyBuffer(struct{ io.Writer }{w}, body, make([]byte, 64<<10)); err != nil {
		return 0, fmt.Errorf("write the new body: %w", err)
	}
	ch.eightBit = w.seen
	return n.ino, n.f.Fsync()
}

// eightBitWriter notices bytes above 127.
type eightBitWriter struct {
	w    io.Writer
	seen bool
}

func (e *eightBitWriter) Write(p []byte) (int, error) {
	for _, c := range p {
		if c >= 0x80 {
			e.seen = true
			break
		}
	}
	return e.w.Write(p)
}

// writeControls writes and fsyncs the control files. The head carries the
// marker; without a release group it is the original with all recipients.
func (q *Queue) writeControls(j *job, m marker, changes []change, files []int) error {
	write := func(n newFile, ch change) error {
		c, err := j.control.build(ch)
		if err != nil {
			return err
		}
		b := c.bytes()
		if _, err := parseControl(b, q.MaxRecipients); err != nil {
			return fmt.Errorf("the new control file would be refused: %w", err)
		}
		if _, err := n.f.Write(b); err != nil {
			return fmt.Errorf("write the new control file: %w", err)
		}
		return n.f.Fsync()
	}
	if m.final == finalRemove {
		if err := write(j.made[0], change{marker: m.String()}); err != nil {
			return err
		}
	}
	for i, g := range m.groups {
		if g.do != queue.Release {
			continue
		}
		if g.qf == m.self {
			changes[i].marker = m.String()
		}
		if err := write(j.made[files[i]], changes[i]); err != nil {
			return err
		}
	}
	return nil
}

// exchange is the decision for a rewritten message: the marked control file,
// locked, takes the place of the original, which stays beside it complete.
func (q *Queue) exchange(j *job, path string) error {
	beside := j.in.newControl(j.entry.ID.Name, 0)
	f, err := os.OpenFile(beside, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	j.fresh = &lockedNew{f: f}
	if st, err := inode.Lstat(beside); err != nil || st.Ino != j.marker.self {
		return fmt.Errorf("%s: %w: not the control file that was prepared", beside, queue.ErrChanged)
	}
	if err := inode.Lock(f, q.Config.Lock); err != nil {
		return fmt.Errorf("lock %s: %w", beside, err)
	}
	if err := q.FS.Exchange(beside, path); err != nil {
		return inode.Gone(err)
	}
	st, err := inode.Lstat(beside)
	if err == nil && st.Ino != j.stats.Control.Ino {
		if err := q.FS.Exchange(beside, path); err != nil {
			j.decided = true
			return fmt.Errorf("a foreign control file was exchanged and cannot go back: %w", err)
		}
		return fmt.Errorf("%s: %w: replaced by another control file", path, queue.ErrGone)
	}
	j.decided = true
	return nil
}

// publish moves rewritten messages out; each step can be repeated, and a
// prepared file that is missing was published by an earlier try. Order: all
// data files; fsync; control files of further groups; fsync; items; the
// original id last, since it is what remembers the others; fsync.
func (q *Queue) publish(ctx context.Context, jobs []*job) {
	only := func(step func(*job) error) func(*job) error {
		return func(j *job) error {
			if j.kind != rewritten {
				return nil
			}
			return step(j)
		}
	}
	dirs := func(of func(*job) []string) func(*job) []string {
		return func(j *job) []string {
			if j.kind != rewritten {
				return nil
			}
			return of(j)
		}
	}
	q.plantedPublish(jobs)
	q.phase(jobs, only(q.publishData))
	q.sync(jobs, dirs(func(j *job) []string { return []string{j.out.df} }))
	q.phase(jobs, only(func(j *job) error { return q.publishControls(j, false) }))
	q.sync(jobs, dirs(func(j *job) []string { return []string{j.out.qf, j.in.qf} }))
	q.phase(jobs, only(func(j *job) error { return q.commitItems(ctx, j) }))
	q.phase(jobs, only(func(j *job) error { return q.publishControls(j, true) }))
	q.sync(jobs, dirs(func(j *job) []string { return []string{j.out.qf, j.in.qf} }))
	q.phase(jobs, only(func(j *job) error {
		for _, g := range j.marker.groups {
			j.newIDs = append(j.newIDs, g.id+g.item)
		}
		return nil
	}))
}

func (q *Queue) publishData(j *job) error {
	for i, g := range j.marker.groups {
		if g.do != queue.Release {
			continue
		}
		if g.df == j.marker.df {
			if q.published(j, g, i) {
				continue
			}
			if j.df == nil || j.stats.Data.Ino != g.df {
				return fmt.Errorf("%s: %w: the decision names inode %d", j.dfIn, queue.ErrChanged, g.df)
			}
			if err := q.linkData(j.claim, j.out, g.id, &j.linked); err != nil {
				return err
			}
			continue
		}
		if err := q.files.Move(j.in.newData(j.entry.ID.Name, i+1), j.out.data(g.id), g.df); err != nil {
			return err
		}
	}
	return nil
}

// published says that a group's control file has left `in`: its data file
// may be delivered and gone by now, and must not come back.
func (q *Queue) published(j *job, g prepared, i int) bool {
	path := j.in.newControl(j.entry.ID.Name, i+1)
	if g.qf == j.marker.self {
		path = j.in.control(j.entry.ID.Name)
	}
	st, err := inode.Lstat(path)
	return err != nil || st.Ino != g.qf
}

// publishControls renames the control files of the further groups, or, last,
// that of the original id.
func (q *Queue) publishControls(j *job, last bool) error {
	for i, g := range j.marker.groups {
		isLast := g.qf == j.marker.self
		if g.do != queue.Release || isLast != last {
			continue
		}
		from := j.in.newControl(j.entry.ID.Name, i+1)
		if isLast {
			from = j.in.control(j.entry.ID.Name)
		}
		if err := q.files.Move(from, j.out.control(g.id), g.qf); err != nil {
			return err
		}
	}
	if last && j.marker.final == finalRemove {
		id := j.entry.ID.Name
		if err := q.files.Remove(j.in.control(id), j.in.goneControl(id), j.marker.self); err != nil && !errors.Is(err, queue.ErrGone) {
			return err
		}
	}
	return nil
}

func (q *Queue) commitItems(ctx context.Context, j *job) error {
	for _, g := range j.marker.groups {
		if g.do == queue.Quarantine {
			if err := q.Store.Commit(ctx, g.item); err != nil {
				return err
			}
		}
	}
	return nil
}

// Resume finishes a decided plan after a crash, from its marker.
func (q *Queue) Resume(ctx context.Context, qc queue.Claim) queue.Outcome {
	c, ok := qc.(*claim)
	if !ok || c.q != q || c.decided == nil {
		return queue.Outcome{ID: qc.Entry().ID, Err: errors.New("there is nothing to resume")}
	}
	j := &job{claim: c, kind: rewritten, marker: *c.decided, decided: true}
	if j.out, j.err = q.outbound(c.in, c.entry.ID.Name); j.err == nil {
		// The crash may have come between the exchange and its fsync.
		q.sync([]*job{j}, func(j *job) []string { return []string{j.in.qf} })
		q.publish(ctx, []*job{j})
		q.phase([]*job{j}, q.cleanUp)
	}
	j.close()
	return queue.Outcome{ID: c.entry.ID, NewIDs: j.newIDs, Err: j.err}
}

// sweepPrepared removes the prepared files of a plan that was not decided:
// only inodes that the marker, or the caller, names; the file with the
// marker last, since it names the others.
func (q *Queue) sweepPrepared(in place, id string, m marker, made []newFile) error {
	for i, g := range m.groups {
		if g.do != queue.Release {
			continue
		}
		if g.df != m.df {
			q.files.Unlink(in.newData(id, i+1), g.df)
		}
		if g.qf != m.self {
			q.files.Unlink(in.newControl(id, i+1), g.qf)
		}
	}
	for _, n := range made {
		if n.ino != m.self && n.ino != 0 {
			q.files.Unlink(n.path, n.ino)
		}
	}
	if m.self != 0 {
		for _, dir := range in.distinct() {
			if err := q.FS.FsyncDir(dir); err != nil {
				return err
			}
		}
		q.files.Unlink(in.newControl(id, 0), m.self)
	}
	return nil
}
