package postfix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"holdfast/queue"
	"holdfast/queue/inode"
)

// What a death, or an error, leaves: plans that are open in the journal, and
// files that were renamed aside to be removed.

// asideOf is the name that a file on hold gets when it leaves the queue: it is
// looked at there, removed, or put back if it is another's. The MTA ignores
// it; a crash leaves it to Sweep.
func asideOf(path string) string { return path + ".gone" }

// aside is a file that lies aside.
type aside struct {
	path string // on hold
	ino  uint64 // that was meant
}

// tidyLater remembers a file aside that could not be removed, or put back.
func (q *Queue) tidyLater(path string, ino uint64) {
	if _, err := inode.Lstat(asideOf(path)); err == nil {
		q.untidy = append(q.untidy, aside{path, ino})
	}
}

// tidyAside removes a file aside if it is the one that was meant, and puts
// another's back.
func (q *Queue) tidyAside(path string, ino uint64) error {
	st, err := inode.Lstat(asideOf(path))
	switch {
	case errors.Is(err, queue.ErrGone):
		return nil
	case err != nil:
		return err
	case st.Ino == ino:
		return q.FS.Unlink(asideOf(path))
	}
	err = q.FS.Rename(asideOf(path), path)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s lies aside, and its name is another's: %w", asideOf(path), queue.ErrCollision)
	}
	return err
}

// Sweep finishes, or undoes, what a crash left of a message that is no longer
// on hold under its name: the journal says what was planned, the directory
// whether it was decided.
func (q *Queue) Sweep(ctx context.Context, id queue.ID, st queue.Stats) error {
	if !validID(id.Name) {
		return fmt.Errorf("%w: %.60q is no queue id", queue.ErrForeign, id.Name)
	}
	p, ok, err := q.planOf(id.Name)
	if err == nil && ok {
		err = q.sweep(ctx, p)
	} else if err == nil {
		err = q.sweepReinjection(ctx, id)
	}
	if err != nil {
		return err
	}
	return q.tidyAside(q.path(holdDir, id.Name), st.Control.Ino)
}

func (q *Queue) sweepReinjection(ctx context.Context, id queue.ID) error {
	r := q.chosenFor(queue.Identity{ID: id})
	if r == nil {
		return nil
	}
	gone := &claim{q: q, entry: queue.Entry{ID: id}, closed: true}
	if err := q.resumeReinjection(ctx, gone, r).err; !errors.Is(err, queue.ErrGone) {
		return err
	}
	return nil
}

// sweep settles an open plan that no claim will meet.
func (q *Queue) sweep(ctx context.Context, p plan) error {
	if q.willBeClaimed(p) {
		return nil
	}
	decided, err := q.wasDecided(p)
	if err != nil {
		return err
	}
	if decided {
		gone := &claim{q: q, entry: queue.Entry{ID: queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: p.ID}}, closed: true}
		return q.resume(ctx, gone, p).err
	}
	if p.first() >= 0 { // otherwise whoever sweeps its items shows them, as uncertain
		if err := q.undo(ctx, p); err != nil {
			return err
		}
		if q.foreign(p) {
			if err := q.FS.Rename(q.tempOf(p), q.path(holdDir, p.ID)); err != nil {
				return err
			}
		}
	}
	q.settled(p.ID)
	return nil
}

// willBeClaimed says that the message is still on hold, before the decision or
// after it, under its name or the one that matches its inode.
func (q *Queue) willBeClaimed(p plan) bool {
	st, err := inode.Lstat(q.path(holdDir, p.ID))
	if err == nil && (st.Ino == p.Orig || st.Ino == p.Self) {
		return true
	}
	if first := p.first(); first >= 0 {
		for _, name := range []string{p.Groups[first].New, p.Groups[first].New + "#"} {
			st, err := inode.Lstat(filepath.Join(q.in(holdDir, p.ID), name))
			if err == nil && st.Ino == p.Self {
				return true
			}
		}
	}
	return false
}

// wasDecided says whether a plan was decided whose message is not on hold any
// more. The original lies under the prepared name from the exchange until all
// is done; later there is nothing left to do. Where no file takes the
// original's name, only this life can know.
func (q *Queue) wasDecided(p plan) (bool, error) {
	if p.decided || p.first() < 0 {
		return p.decided, nil
	}
	st, err := inode.Lstat(q.tempOf(p))
	if errors.Is(err, queue.ErrGone) {
		return false, nil
	}
	return err == nil && st.Ino == p.Orig, err
}

// finishOpen takes up again what an error left undone in this life, or a crash
// in an earlier one. What fails again is met again.
func (q *Queue) finishOpen(ctx context.Context) {
	q.mu.Lock()
	err := q.load()
	open := make([]plan, 0, len(q.plans))
	for _, p := range q.plans {
		open = append(open, p)
	}
	q.mu.Unlock()
	q.note(queue.ID{Queue: q.Config.Name, Dir: q.Dir}, "read open plans", err)
	for _, p := range open {
		q.note(queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: p.ID}, "finish an open plan", q.sweep(ctx, p))
	}
	untidy := q.untidy
	q.untidy = nil
	for _, a := range untidy {
		q.note(queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: filepath.Base(a.path)}, "remove what lies aside", q.tidyAside(a.path, a.ino))
		q.tidyLater(a.path, a.ino)
	}
}
