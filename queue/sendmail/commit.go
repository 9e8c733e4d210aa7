package sendmail

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/inode"
)

// job is one plan on its way through the phases of a commit.
type job struct {
	*claim
	plan queue.Plan
	out  place
	err  error

	kind    kind
	marker  marker    // rewritten
	made    []newFile // rewritten: prepared files
	item    string    // quarantined: its item
	linked  bool      // plain: out/df is a name that we made
	decided bool      // the decision is on the disk: no way back
	newIDs  []string
	fresh   *lockedNew // rewritten: the new control file, locked
}

type kind int

const (
	plain     kind = iota // released as it is
	kept                  // quarantined as a whole
	dropped               // removed as a whole
	rewritten             // changed, or split into groups
)

// Commit carries out the plans of a batch. Order (CUSTODY 2); each phase
// ends for all plans before the next begins, and the plans share its fsyncs:
//
//  1. prepare: plain: link df into out. kept: prepare the item. rewritten:
//     unnamed files, content, fsync, items
//  2. fsync the directories with new names. rewritten: name the file with
//     the marker; fsync; name the others; fsync
//  3. decide: plain: rename qf into out. kept, dropped: unlink qf.
//     rewritten: exchange the marked control file with qf
//  4. fsync out, then in
//  5. publish (rewritten): data files into out; fsync; control files of the
//     further groups into out; fsync; items; the original id last; fsync
//  6. kept: commit the item
//  7. remove what is left: df, the original control file; unlock
//
// A crash before 3 leaves the message in `in`; after 3 a plain one is out,
// and a rewritten one carries a marker from which Resume goes on at 5.
func (q *Queue) Commit(ctx context.Context, plans []queue.Plan) []queue.Outcome {
	jobs := make([]*job, len(plans))
	for i, p := range plans {
		jobs[i] = q.newJob(p)
	}
	q.plantedDecide(jobs)
	q.phase(jobs, func(j *job) error { return q.prepare(ctx, j) })
	q.sync(jobs, func(j *job) []string {
		if j.kind == plain {
			return []string{j.out.df}
		}
		return nil
	})
	q.nameFiles(jobs)
	q.phase(jobs, q.decide)
	q.sync(jobs, func(j *job) []string {
		if j.kind == plain {
			return []string{j.out.qf, j.in.qf}
		}
		return []string{j.in.qf}
	})
	q.publish(ctx, jobs)
	q.phase(jobs, func(j *job) error {
		if j.kind == kept {
			return q.Store.Commit(ctx, j.item)
		}
		return nil
	})
	q.phase(jobs, q.cleanUp)
	out := make([]queue.Outcome, len(jobs))
	for i, j := range jobs {
		if j.err != nil && !j.decided {
			q.undo(ctx, j)
		}
		j.close()
		out[i] = queue.Outcome{ID: j.entry.ID, NewIDs: j.newIDs, Err: j.err}
	}
	return out
}

func (j *job) close() {
	if j.fresh != nil {
		j.fresh.f.Close()
	}
	for _, n := range j.made {
		n.close()
	}
	j.claim.Close()
}

// newJob checks a plan and says which way it goes.
func (q *Queue) newJob(p queue.Plan) *job {
	c, ok := p.Claim.(*claim)
	if !ok || c.q != q {
		return &job{claim: &claim{closed: true}, err: fmt.Errorf("the claim of a plan is not of queue %s", q.Name())}
	}
	j := &job{claim: c, plan: p}
	if c.control == nil || c.df == nil || c.closed {
		j.err = fmt.Errorf("%s was not read before its commit", c.entry.ID)
		return j
	}
	if j.err = queue.CheckPartition(p.Groups, len(c.env.Recipients)); j.err != nil {
		j.err = fmt.Errorf("plan of %s: %w", c.entry.ID, j.err)
		return j
	}
	j.kind = rewritten
	if g := p.Groups[0]; len(p.Groups) == 1 {
		switch {
		case g.Disposition == queue.Quarantine:
			j.kind = kept
		case g.Disposition == queue.Drop:
			j.kind = dropped
		case g.Edit == nil && !c.away:
			j.kind = plain
		}
	}
	if j.out, j.err = q.outbound(c.in, c.entry.ID.Name); j.err == nil && j.kind == plain {
		if st, err := inode.Lstat(j.out.control(c.entry.ID.Name)); err == nil {
			j.err = fmt.Errorf("%s (inode %d): %w", j.out.control(c.entry.ID.Name), st.Ino, queue.ErrCollision)
		}
	}
	return j
}

// phase does one step for each plan that has not failed.
func (q *Queue) phase(jobs []*job, step func(*job) error) {
	for _, j := range jobs {
		if j.err == nil {
			if err := step(j); err != nil {
				j.err = fmt.Errorf("commit %s: %w", j.entry.ID, err)
			}
		}
	}
}

// sync makes names durable: each directory once for all plans. A plan fails
// with the fsync of a directory that it needs.
func (q *Queue) sync(jobs []*job, dirs func(*job) []string) {
	done := map[string]error{}
	q.phase(jobs, func(j *job) error {
		for _, dir := range dirs(j) {
			err, ok := done[dir]
			if !ok {
				err = q.FS.FsyncDir(dir)
				done[dir] = err
			}
			if err != nil {
				return fmt.Errorf("fsync %s: %w", dir, err)
			}
		}
		return nil
	})
}

func (q *Queue) prepare(ctx context.Context, j *job) error {
	switch j.kind {
	case plain:
		return q.linkData(j.claim, j.out, j.entry.ID.Name, &j.linked)
	case kept:
		var err error
		j.item, err = q.prepareItem(ctx, j.claim, j.plan.Groups[0], 0)
		return err
	case rewritten:
		return q.prepareFiles(ctx, j)
	}
	return nil
}

// linkData gives the scanned data file its outbound name. EEXIST: the same
// inode is from an earlier try; another one belongs to somebody else, and
// stays, whether a message goes with it or not.
func (q *Queue) linkData(c *claim, out place, id string, linked *bool) error {
	path := out.data(id)
	err := q.FS.Link(c.df, path)
	if err == nil {
		*linked = true
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, serr := inode.Lstat(path)
	switch {
	case serr != nil:
		return serr
	case st.Ino == c.stats.Data.Ino && st.Dev == c.stats.Data.Dev:
		return nil
	}
	return fmt.Errorf("%s (inode %d): %w", path, st.Ino, queue.ErrCollision)
}

// decide is the one atomic step of each plan.
func (q *Queue) decide(j *job) error {
	if j.decided {
		return nil
	}
	path := j.in.control(j.entry.ID.Name)
	if err := j.still(path); err != nil {
		return err
	}
	switch j.kind {
	case plain:
		return q.decidePlain(j, path)
	case kept, dropped:
		if err := q.files.Remove(path, j.in.goneControl(j.entry.ID.Name), j.stats.Control.Ino); err != nil {
			return err
		}
		j.decided = true
		j.newIDs = []string{j.item}
		return nil
	}
	return q.exchange(j, path)
}

// still says that the name is the inode that we hold the lock on: an
// administrator may have moved the message, or put another one there.
func (c *claim) still(path string) error {
	st, err := inode.Lstat(path)
	if err != nil {
		return err
	}
	if st.Ino != c.stats.Control.Ino || st.Dev != c.stats.Control.Dev {
		return fmt.Errorf("%s: %w: another control file has its name", path, queue.ErrGone)
	}
	return nil
}

func (q *Queue) decidePlain(j *job, path string) error {
	to := j.out.control(j.entry.ID.Name)
	err := q.FS.Rename(path, to)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", to, queue.ErrCollision)
	}
	if err != nil {
		return inode.Gone(err)
	}
	// Between the check and the rename somebody may have put another control
	// file under the name: it goes back.
	if st, err := inode.Lstat(to); err == nil && st.Ino != j.stats.Control.Ino {
		if err := q.FS.Rename(to, path); err != nil {
			j.decided = true
			return fmt.Errorf("a foreign control file was renamed to %s and cannot go back: %w", to, err)
		}
		return fmt.Errorf("%s: %w: replaced by another control file", path, queue.ErrGone)
	}
	j.decided = true
	j.newIDs = []string{j.entry.ID.Name}
	return nil
}

// undo takes back what was prepared for a plan that was not decided.
func (q *Queue) undo(ctx context.Context, j *job) {
	id := j.entry.ID.Name
	switch j.kind {
	case plain:
		if !j.linked {
			return
		}
		// Our link, unless a control file came meanwhile that may mean it.
		if _, err := inode.Lstat(j.out.control(id)); err == nil {
			return
		}
		q.files.Unlink(j.out.data(id), j.stats.Data.Ino)
	case kept:
		if j.item != "" {
			q.note(j.entry.ID, "abort its quarantine item", q.Store.Abort(ctx, j.item))
		}
	case rewritten:
		q.note(j.entry.ID, "remove prepared files", q.sweepPrepared(j.in, id, j.marker, j.made))
		for _, g := range j.marker.groups {
			if g.item != "" {
				q.note(j.entry.ID, "abort its quarantine item", q.Store.Abort(ctx, g.item))
			}
		}
	}
}

// note reports a failed tidying: nothing is lost by it.
func (q *Queue) note(id queue.ID, what string, err error) {
	if err != nil {
		q.Report(Event{ID: id, What: what, Err: err})
	}
}

// cleanUp removes what a settled message leaves in `in`: its data file, and
// of a rewritten one, last, the original control file, by which Tidy would find
// the rest.
func (q *Queue) cleanUp(j *job) error {
	id := j.entry.ID.Name
	if j.stats.Data.Ino != 0 { // a resumed one's body may be elsewhere
		if err := q.files.Remove(j.dfIn, filepath.Join(filepath.Dir(j.dfIn), "hb"+id+".gone"), j.stats.Data.Ino); err != nil && !errors.Is(err, queue.ErrGone) {
			q.note(j.entry.ID, "remove its data file", err)
		}
	}
	if j.kind == rewritten {
		q.files.Unlink(j.in.newControl(id, 0), j.marker.orig)
	}
	return nil
}

// Sweep finishes what a crash after a decision left: if the control file is
// gone, the data file and the original control file that st names go too.
// The caller's journal says that the message was decided.
func (q *Queue) Sweep(_ context.Context, id queue.ID, st queue.Stats) error {
	if !validID(id.Name) {
		return fmt.Errorf("%w: %.60q is no queue id", queue.ErrForeign, id.Name)
	}
	p := at(id.Dir)
	if _, err := inode.Lstat(p.control(id.Name)); !errors.Is(err, queue.ErrGone) {
		return err
	}
	if st.Data.Ino != 0 {
		q.files.Unlink(p.goneData(id.Name), st.Data.Ino)
		if err := q.files.Remove(p.data(id.Name), p.goneData(id.Name), st.Data.Ino); err != nil && !errors.Is(err, queue.ErrGone) {
			return err
		}
	}
	q.files.Unlink(p.newControl(id.Name, 0), st.Control.Ino)
	q.files.Unlink(p.goneControl(id.Name), st.Control.Ino)
	if m, ok := q.readMarker(p.goneControl(id.Name)); ok {
		q.files.Unlink(p.goneControl(id.Name), m.self)
	}
	return nil
}

// prepareItem has the quarantine write one group's item, invisible yet.
func (q *Queue) prepareItem(ctx context.Context, c *claim, g queue.Group, index int) (string, error) {
	if q.Store == nil {
		return "", errors.New("there is no quarantine")
	}
	control, err := c.control.build(change{recipients: g.Recipients})
	if err != nil {
		return "", err
	}
	message, err := c.Render(ctx)
	if err != nil {
		return "", err
	}
	defer message.Close()
	if _, err := message.Seek(0, 0); err != nil {
		return "", fmt.Errorf("read the rendered message: %w", err)
	}
	env := c.env
	if g.Recipients != nil {
		env.Recipients = nil
		for i, r := range c.env.Recipients {
			if slices.Contains(g.Recipients, i) {
				env.Recipients = append(env.Recipients, r)
			}
		}
	}
	return q.Store.Prepare(ctx, queue.ItemSpec{
		Identity: c.ident, Group: index, Envelope: env, Control: control.bytes(),
		BodyAt: int64(len(c.control.headerBlock()) + 1), Verdict: g.Item,
	}, message)
}

// unusedID makes a queue id that neither side has.
func (q *Queue) unusedID(in, out place) (string, error) {
	for range 100 {
		id := q.ids.next(time.Now())
		free := true
		for _, path := range []string{in.control(id), in.data(id), in.newControl(id, 0), in.newData(id, 0), out.control(id), out.data(id)} {
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); !errors.Is(err, unix.ENOENT) {
				free = false
			}
		}
		if free {
			return id, nil
		}
	}
	return "", fmt.Errorf("no unused queue id in %s", filepath.Clean(out.base))
}
