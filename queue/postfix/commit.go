package postfix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/inode"
)

type kind int

const (
	plain      kind = iota // released as it came
	kept                   // one item in the quarantine
	dropped                // nobody gets it
	rewritten              // changed, or split, by files that we write
	reinjected             // changed, or split, by SMTP
)

// job is one plan on its way through Commit.
type job struct {
	*claim
	groups  []queue.Group
	kind    kind
	item    string
	plan    plan
	made    []*durable.File // per group; nil where nothing is released
	opened  bool            // its row is in the journal
	re      *reinjection
	resumed bool // after a crash
	decided bool
	unsure  bool // whether it was decided: the journal's row stays
	newIDs  []string
	err     error
}

// Commit carries out the plans of a batch; each phase is shared.
//
//	plain      unlock; rename hold → incoming (decision and publication); fsync
//	           both; note the release.
//	kept       item prepared; rename the queue file aside, compare, unlink
//	           (decision); fsync hold; item visible.
//	dropped    as kept, without an item.
//	rewritten  new files, unnamed, whole, owned and complete, fsynced; journal,
//	           so that nothing has a name that the journal does not know; named
//	           as files in the making; fsync hold; exchange with the
//	           original's name (decision), or, if nobody gets it, rename that
//	           aside; fsync hold; unlock; rename the files of the further
//	           groups to incoming, then the one under the original's name; fsync
//	           both; items visible; remove the original; fsync hold; row closed.
//	reinjected items prepared; row with a nonce; copies by SMTP, which the
//	           listener holds; row chooses them (decision); look at each copy;
//	           set the original aside; fsync hold; row settled; remove what lies
//	           aside; copies to incoming; fsync both; items visible. The row stays
//	           for a day.
//
// A rename to incoming never overwrites: a name there has its own inode in it.
func (q *Queue) Commit(ctx context.Context, plans []queue.Plan) []queue.Outcome {
	q.finishOpen(ctx)
	jobs := make([]*job, len(plans))
	for i, p := range plans {
		jobs[i] = q.newJob(p)
	}
	q.phase(jobs, func(j *job) error { return q.prepare(ctx, j) })
	q.journal(jobs)
	q.phase(jobs, q.nameFiles)
	q.sync(jobs, rewritten, q.holdOf)
	q.reinject(ctx, jobs)
	if q.Release == ByPostsuper {
		q.decidePostsuper(ctx, jobs)
	}
	q.phase(jobs, q.decide)
	q.settleOriginals(ctx, jobs)
	q.sync(jobs, plain, q.incomingOf, q.holdOf)
	for _, k := range []kind{kept, dropped, rewritten} {
		q.sync(jobs, k, q.holdOf)
	}
	q.publish(ctx, jobs)
	for _, j := range jobs {
		if j.kind == reinjected {
			j.claim.Close()
		}
	}
	q.publishCopies(ctx, jobs)
	out := make([]queue.Outcome, len(jobs))
	for i, j := range jobs {
		if j.err != nil && !j.decided && !j.unsure {
			q.takeBack(ctx, j)
		}
		for _, f := range j.made {
			if f != nil {
				f.Close()
			}
		}
		j.claim.Close()
		out[i] = queue.Outcome{ID: j.entry.ID, NewIDs: j.newIDs, Err: j.err}
	}
	return out
}

// newJob checks a plan and says which way it goes.
func (q *Queue) newJob(p queue.Plan) *job {
	c, ok := p.Claim.(*claim)
	if !ok || c.q != q {
		return &job{claim: &claim{closed: true}, err: fmt.Errorf("the claim of a plan is not of queue %s", q.Name())}
	}
	j := &job{claim: c, groups: p.Groups, newIDs: make([]string, len(p.Groups))}
	if c.file == nil || c.closed {
		j.err = fmt.Errorf("%s was not read before its commit", c.entry.ID)
		return j
	}
	if err := queue.CheckPartition(p.Groups, len(c.env.Recipients)); err != nil {
		j.err = fmt.Errorf("plan of %s: %w", c.entry.ID, err)
		return j
	}
	j.kind = rewritten
	if g := p.Groups[0]; len(p.Groups) == 1 {
		switch {
		case g.Disposition == queue.Quarantine:
			j.kind = kept
		case g.Disposition == queue.Drop:
			j.kind = dropped
		case g.Edit == nil:
			j.kind = plain
		}
	}
	if j.err = q.route(j); j.err != nil {
		j.err = fmt.Errorf("plan of %s: %w", c.entry.ID, j.err)
	}
	return j
}

// route chooses how a plan that is not simple is carried out. One that
// releases nothing needs no new file.
func (q *Queue) route(j *job) error {
	releases := slices.ContainsFunc(j.groups, func(g queue.Group) bool { return g.Disposition == queue.Release })
	switch {
	case j.odd && j.kind != plain:
		return fmt.Errorf("%w: its queue file is not understood", queue.ErrUnchangeable)
	case j.kind != rewritten || !releases:
		return nil
	case q.Modify == ByReinjection && q.unheld.Load():
		return fmt.Errorf("the listener %s does not hold what it accepts; holdfast setup postfix prints how it must be set up", q.Listener)
	case q.Modify == ByReinjection:
		j.kind = reinjected
		return nil
	case q.Modify == ByRewriting:
		return nil
	}
	return fmt.Errorf("%w: modify is none", queue.ErrUnchangeable)
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

func (q *Queue) holdOf(j *job) []string { return []string{q.in(holdDir, j.entry.ID.Name)} }

// incomingOf are the directories that the files of a plan go to.
func (q *Queue) incomingOf(j *job) []string {
	if j.kind == plain {
		return []string{q.in(incomingDir, j.entry.ID.Name)}
	}
	var out []string
	for _, g := range j.plan.Groups {
		if g.New != "" {
			out = append(out, q.in(incomingDir, g.New))
		}
	}
	return out
}

// sync makes names durable for the plans of a kind: each directory once. A
// plan fails with the fsync of a directory that it needs.
func (q *Queue) sync(jobs []*job, k kind, dirs ...func(*job) []string) {
	done := map[string]error{}
	q.phase(jobs, func(j *job) error {
		if j.kind != k {
			return nil
		}
		for _, of := range dirs {
			for _, dir := range of(j) {
				err, ok := done[dir]
				if !ok {
					err = q.FS.FsyncDir(dir)
					done[dir] = err
				}
				if err != nil {
					return fmt.Errorf("fsync %s: %w", dir, err)
				}
			}
		}
		return nil
	})
}

func (q *Queue) prepare(ctx context.Context, j *job) error {
	switch j.kind {
	case kept:
		var err error
		j.item, err = q.prepareItem(ctx, j.claim, j.groups[0], 0)
		return err
	case rewritten:
		return q.prepareFiles(ctx, j)
	case reinjected:
		return q.openReinjection(ctx, j)
	}
	return nil
}

// prepareFiles makes the files and items of a plan of several groups.
func (q *Queue) prepareFiles(ctx context.Context, j *job) error {
	j.plan = plan{ID: j.entry.ID.Name, T: j.ident.T, Orig: j.stats.Control.Ino, Groups: make([]group, len(j.groups))}
	j.made = make([]*durable.File, len(j.groups))
	first := -1 // whose file takes the original's name: made last, since it names the others
	for i, g := range j.groups {
		var err error
		row := &j.plan.Groups[i]
		row.Do = g.Disposition
		switch g.Disposition {
		case queue.Quarantine:
			row.Item, err = q.prepareItem(ctx, j.claim, g, i)
		case queue.Release:
			row.Temp = tempName()
			if first < 0 {
				first = i
				continue
			}
			j.made[i], err = q.prepareFile(ctx, j, g, row, "")
		case queue.Drop:
		default:
			return fmt.Errorf("disposition %q is not known", g.Disposition)
		}
		if err != nil {
			return err
		}
	}
	if first < 0 {
		return nil
	}
	mark, err := q.mark(j.plan)
	if err != nil {
		return err
	}
	row := &j.plan.Groups[first]
	if j.made[first], err = q.prepareFile(ctx, j, j.groups[first], row, mark); err != nil {
		return err
	}
	j.plan.Self = row.Ino
	return nil
}

// prepareFile writes one group's file, without a name.
func (q *Queue) prepareFile(ctx context.Context, j *job, g queue.Group, row *group, mark string) (*durable.File, error) {
	text, err := edited(&contextReader{ctx, j.content()}, g.Edit)
	if err != nil {
		return nil, err
	}
	var k keep
	if g.Recipients != nil {
		k = func(i int) bool { return slices.Contains(g.Recipients, i) }
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(j.f.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "fstat", Path: j.f.Name(), Err: err}
	}
	f, ino, err := q.newFile(j.entry.ID.Name, int(st.Uid), int(st.Gid), func(w io.Writer, overwrite func([]byte) error) error {
		return j.file.build(w, overwrite, text, k, time.Time{}, mark)
	})
	if err != nil {
		return nil, err
	}
	if err := q.proofread(f, j, g); err != nil {
		f.Close()
		return nil, err
	}
	row.Ino, row.New = ino, withInode(j.entry.ID.Name, ino)
	return f, nil
}

// proofread reads what was written, before anybody else can: the queue manager
// moves a file that it does not like to corrupt, where nobody looks.
func (q *Queue) proofread(f *durable.File, j *job, g queue.Group) error {
	x, err := parse(f, f.Size(), q.MaxControl, q.MaxRecipients)
	if err != nil {
		return fmt.Errorf("the rewritten file is not right: %w", err)
	}
	want := j.env
	if g.Recipients != nil {
		want = withRecipients(want, g.Recipients)
	}
	if got := x.envelope(); !reflect.DeepEqual(got, want) {
		return errors.New("the rewritten file has another envelope")
	}
	return nil
}

func withRecipients(e queue.Envelope, keep []int) queue.Envelope {
	all := e.Recipients
	e.Recipients = nil
	for i, r := range all {
		if slices.Contains(keep, i) {
			e.Recipients = append(e.Recipients, r)
		}
	}
	return e
}

// newFile writes a complete queue file without a name: content, owner and
// mode, fsync. Its owner is the mail system's before it has any content: a
// file of root's in incoming would stop the queue manager (reference: B1).
func (q *Queue) newFile(id string, uid, gid int, build func(io.Writer, func([]byte) error) error) (*durable.File, uint64, error) {
	f, err := q.FS.TmpFile(q.in(holdDir, id), 0o600)
	if err != nil {
		return nil, 0, err
	}
	var st unix.Stat_t
	err = f.Own(uid, gid, 0o600)
	if err == nil {
		err = build(f, func(head []byte) error { return f.Overwrite(head, 0) })
	}
	if err == nil {
		err = f.Own(-1, -1, complete)
	}
	if err == nil {
		err = f.Fsync()
	}
	if err == nil {
		err = unix.Fstat(int(f.OS().Fd()), &st)
	}
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("write a queue file: %w", err)
	}
	return f, st.Ino, nil
}

// tempName is a name of the kind that Postfix uses for files in the making,
// which all of its programs ignore.
func tempName() string { return fmt.Sprintf("%d.%d", rand.IntN(1_000_000), os.Getpid()) }

// nameFiles gives the new files of a plan the names that the journal has.
func (q *Queue) nameFiles(j *job) error {
	for i, f := range j.made {
		if f == nil {
			continue
		}
		if err := q.FS.Link(f.OS(), filepath.Join(q.in(holdDir, j.plan.ID), j.plan.Groups[i].Temp)); err != nil {
			return err
		}
	}
	return nil
}

// prepareItem has the quarantine write one group's item, invisible yet. Its
// control data is a queue file of that group without content.
func (q *Queue) prepareItem(ctx context.Context, c *claim, g queue.Group, index int) (string, error) {
	if q.Store == nil {
		return "", errors.New("there is no quarantine")
	}
	control, err := c.file.control(g.Recipients)
	if err != nil {
		return "", err
	}
	message, err := c.Render(ctx)
	if err != nil {
		return "", err
	}
	defer message.Close()
	bodyAt, err := bodyOffset(message)
	if err != nil {
		return "", err
	}
	env := c.env
	if g.Recipients != nil {
		env = withRecipients(env, g.Recipients)
	}
	if _, err := message.Seek(0, io.SeekStart); err != nil {
		return "", fmt.Errorf("read the rendered message: %w", err)
	}
	return q.Store.Prepare(ctx, queue.ItemSpec{
		Identity: c.ident, Group: index, Envelope: env, Control: control, BodyAt: bodyAt, Verdict: g.Item,
	}, message)
}

// journal makes durable, in one step, what is about to be rewritten.
func (q *Queue) journal(jobs []*job) {
	var plans []plan
	var res []*reinjection
	q.phase(jobs, func(j *job) error {
		switch j.kind {
		case rewritten:
			plans = append(plans, j.plan)
		case reinjected:
			res = append(res, j.re)
		}
		return nil
	})
	err := q.open(plans)
	if err == nil {
		err = q.saveReinjections(res, reOpen)
	}
	q.phase(jobs, func(j *job) error {
		j.opened = err == nil && (j.kind == rewritten || j.kind == reinjected)
		return err
	})
}

// decide is the one atomic step of each plan.
func (q *Queue) decide(j *job) error {
	if j.kind == reinjected || j.decided {
		return nil // see settleOriginals, decidePostsuper
	}
	id := j.entry.ID.Name
	path := q.path(holdDir, id)
	st, err := inode.Lstat(path)
	if err != nil {
		return err
	}
	if st.Ino != j.stats.Control.Ino {
		return fmt.Errorf("%s: %w: another file has its name", path, queue.ErrGone)
	}
	switch j.kind {
	case plain:
		return q.decidePlain(j, path)
	case rewritten:
		if j.plan.Self != 0 {
			return q.exchange(j, path)
		}
	}
	err = q.files.Remove(path, asideOf(path), j.stats.Control.Ino)
	q.tidyLater(path, j.stats.Control.Ino)
	if err != nil {
		return err
	}
	j.decided = true
	q.markDecided(id)
	if j.kind == kept {
		j.newIDs[0] = j.item
	}
	return nil
}

// decidePlain renames the queue file, unlocked: the queue manager would wait a
// minute for our lock (reference: B5).
func (q *Queue) decidePlain(j *job, path string) error {
	j.claim.Close()
	to := q.path(incomingDir, j.entry.ID.Name)
	if err := q.makeDir(incomingDir, filepath.Dir(to)); err != nil {
		return err
	}
	err := q.FS.Rename(path, to)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", to, queue.ErrCollision)
	}
	if err != nil {
		return inode.Gone(err)
	}
	// Between the look and the rename another file may have got the name. If
	// the queue manager has taken it, then it was complete and is delivered.
	if st, err := inode.Lstat(to); err == nil && st.Ino != j.stats.Control.Ino {
		if err := q.FS.Rename(to, path); err != nil {
			j.decided = true
			return fmt.Errorf("a foreign file was renamed to %s and cannot go back: %w", to, err)
		}
		return fmt.Errorf("%s: %w: replaced by another file", path, queue.ErrGone)
	}
	j.decided = true
	j.newIDs[0] = j.entry.ID.Name
	q.noteRelease(j.entry.ID.Name, j.stats.Control.Ino, j.ident.T)
	return nil
}

// decidePostsuper has Postfix's own command take what is unchanged off hold, in
// one call for all. It moves mail to deferred, and makes nothing durable.
func (q *Queue) decidePostsuper(ctx context.Context, jobs []*job) {
	var ids []string
	q.phase(jobs, func(j *job) error {
		if j.kind == plain {
			j.claim.Close()
			ids = append(ids, j.entry.ID.Name)
		}
		return nil
	})
	if len(ids) == 0 {
		return
	}
	done, err := q.postsuper(ctx, "-H", ids)
	synced := map[string]error{}
	q.phase(jobs, func(j *job) error {
		id := j.entry.ID.Name
		switch {
		case j.kind != plain:
			return nil
		case err != nil:
			return err
		case !done[id]:
			return fmt.Errorf("postsuper did not find it on hold: %w", queue.ErrGone)
		}
		j.decided = true
		j.newIDs[0] = id
		q.noteRelease(id, j.stats.Control.Ino, j.ident.T)
		dir := q.in("deferred", id)
		if _, ok := synced[dir]; !ok {
			synced[dir] = q.FS.FsyncDir(dir)
		}
		return synced[dir]
	})
}

// exchange puts the first released group's file in the original's place. A
// rename would bring back mail that an administrator has just taken away.
func (q *Queue) exchange(j *job, path string) error {
	temp := filepath.Join(filepath.Dir(path), j.plan.Groups[j.plan.first()].Temp)
	if err := q.FS.Exchange(temp, path); err != nil {
		return inode.Gone(err)
	}
	j.unsure = true // until it is seen what was swapped out
	st, err := inode.Lstat(temp)
	if err != nil {
		return err
	}
	if st.Ino != j.stats.Control.Ino {
		if err := q.FS.Exchange(temp, path); err != nil {
			return fmt.Errorf("a foreign file was exchanged for %s and cannot go back: %w", path, err)
		}
		j.unsure = false
		return fmt.Errorf("%s: %w: replaced by another file", path, queue.ErrGone)
	}
	j.decided = true
	q.markDecided(j.plan.ID)
	return nil
}

// publish finishes decided plans. Each step may be repeated after a crash.
func (q *Queue) publish(ctx context.Context, jobs []*job) {
	q.phase(jobs, func(j *job) error {
		if j.kind != rewritten {
			return nil
		}
		j.claim.Close()
		return q.moveOut(j)
	})
	q.sync(jobs, rewritten, q.incomingOf, q.holdOf)
	q.phase(jobs, func(j *job) error {
		switch {
		case j.kind == kept:
			return q.Store.Commit(ctx, j.item)
		case j.kind == rewritten:
			return q.finish(ctx, j)
		}
		return nil
	})
	q.sync(jobs, rewritten, q.holdOf)
	q.phase(jobs, func(j *job) error {
		if j.kind == rewritten {
			q.settled(j.plan.ID)
		}
		return nil
	})
}

// makeDir makes a missing sub-directory of a hashed queue, as Postfix does:
// mode 0700, its owner's. It gets its name when it has its owner, since the
// queue manager stops at a directory that it cannot read.
func (q *Queue) makeDir(queueName, dir string) error {
	base := filepath.Join(q.Dir, queueName)
	if _, err := os.Lstat(dir); err == nil || dir == base {
		return err
	}
	parent := filepath.Dir(dir)
	if err := q.makeDir(queueName, parent); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(base, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: base, Err: err}
	}
	temp := dir + ".new" // with a dot: ignored, and found again after a crash
	if err := q.FS.Mkdir(temp, complete); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := q.FS.OwnDir(temp, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := q.FS.Rename(temp, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return q.FS.FsyncDir(parent)
}

// moveOut renames the files of the groups to incoming, each under the name
// that its inode gives it; the one under the original's name last.
func (q *Queue) moveOut(j *job) error {
	id := j.plan.ID
	dir, first := q.in(holdDir, id), j.plan.first()
	for i, g := range j.plan.Groups {
		if g.Do != queue.Release || i == first {
			continue
		}
		if err := q.toIncoming(filepath.Join(dir, g.Temp), g); err != nil {
			return err
		}
	}
	if first < 0 {
		return nil
	}
	g := j.plan.Groups[first]
	if err := q.toIncoming(filepath.Join(dir, id), g); err != nil {
		return err
	}
	// `postfix start` may have given it the name that matches its inode, or be
	// about to: its first step is a name with a suffix.
	if st, err := inode.Lstat(q.path(holdDir, g.New) + "#"); err == nil && st.Ino == g.Ino {
		return fmt.Errorf("%s: %w: Postfix is renaming it", g.New, queue.ErrBusy)
	}
	return q.toIncoming(q.path(holdDir, g.New), g)
}

func (q *Queue) toIncoming(from string, g group) error {
	to := q.path(incomingDir, g.New)
	if err := q.makeDir(incomingDir, filepath.Dir(to)); err != nil {
		return err
	}
	return q.files.Move(from, to, g.Ino)
}

// finish shows the items and removes the original. While that is there, the
// plan is known to be decided and not finished.
func (q *Queue) finish(ctx context.Context, j *job) error {
	for i, g := range j.plan.Groups {
		switch g.Do {
		case queue.Release:
			j.newIDs[i] = g.New
			q.noteRelease(g.New, g.Ino, j.plan.T)
		case queue.Quarantine:
			if err := q.Store.Commit(ctx, g.Item); err != nil {
				return err
			}
			j.newIDs[i] = g.Item
		}
	}
	if first := j.plan.first(); first >= 0 {
		q.files.Unlink(filepath.Join(q.in(holdDir, j.plan.ID), j.plan.Groups[first].Temp), j.plan.Orig)
	}
	return nil
}

// takeBack removes what was prepared for a plan that was not decided.
func (q *Queue) takeBack(ctx context.Context, j *job) {
	switch j.kind {
	case kept:
		if j.item != "" {
			q.note(j.entry.ID, "abort its quarantine item", q.Store.Abort(ctx, j.item))
		}
	case rewritten:
		q.note(j.entry.ID, "remove prepared files", q.undo(ctx, j.plan))
		if j.opened {
			q.settled(j.plan.ID)
		}
	case reinjected:
		if j.re != nil && j.re.State != reVoid {
			q.abandon(ctx, j.re)
		}
	}
}

// note reports a failed tidying: nothing is lost by it.
func (q *Queue) note(id queue.ID, what string, err error) {
	if err != nil {
		q.Report(Event{ID: id, What: what, Err: err})
	}
}

// Resume finishes a decided plan after a crash, from the journal.
func (q *Queue) Resume(ctx context.Context, qc queue.Claim) queue.Outcome {
	c, ok := qc.(*claim)
	switch {
	case !ok || c.q != q || !c.Decided():
		return queue.Outcome{ID: qc.Entry().ID, Err: errors.New("there is nothing to resume")}
	case c.re != nil:
		j := q.resumeReinjection(ctx, c, c.re)
		return queue.Outcome{ID: c.entry.ID, NewIDs: j.newIDs, Err: j.err}
	}
	j := q.resume(ctx, c, *c.decided)
	return queue.Outcome{ID: c.entry.ID, NewIDs: j.newIDs, Err: j.err}
}

func (q *Queue) resume(ctx context.Context, c *claim, p plan) *job {
	j := &job{claim: c, kind: rewritten, plan: p, decided: true, newIDs: make([]string, len(p.Groups))}
	// The crash may have come between the exchange and its fsync.
	q.sync([]*job{j}, rewritten, q.holdOf)
	q.publish(ctx, []*job{j})
	return j
}
