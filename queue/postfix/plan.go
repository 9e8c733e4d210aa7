package postfix

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"holdfast/queue"
	"holdfast/queue/inode"
)

// plan is a rewritten message's row in the journal: durable before the
// decision, and enough to finish after it, or to undo before it.
type plan struct {
	ID     string  `json:"id"`   // on hold
	Orig   uint64  `json:"orig"` // inode that was read
	Self   uint64  `json:"self"` // inode that takes its name at the decision; 0: the name goes
	Groups []group `json:"groups"`
}

// group is one group of recipients in a plan.
type group struct {
	Do   queue.Disposition `json:"do"`
	Temp string            `json:"temp,omitempty"`  // name of the prepared file, in the message's directory
	Ino  uint64            `json:"inode,omitempty"` // and its inode
	New  string            `json:"new,omitempty"`   // queue id on release: its own inode is in it
	Item string            `json:"item,omitempty"`  // in the quarantine
}

// Keys of journal rows.
const (
	planKey     = "plan "
	releasedKey = "released "
)

// load reads the journal once.
func (q *Queue) load() error {
	if q.plans != nil {
		return nil
	}
	rows, err := q.Journal.Rows()
	if err != nil {
		return fmt.Errorf("read the journal of queue %s: %w", q.Config.Name, err)
	}
	plans, released := map[string]plan{}, map[string]release{}
	for k, v := range rows {
		if id, ok := strings.CutPrefix(k, planKey); ok {
			var p plan
			if err := json.Unmarshal(v, &p); err != nil || p.ID != id || !validID(id) {
				return fmt.Errorf("read the journal of queue %s: row %q: %w", q.Config.Name, k, errors.Join(err, queue.ErrDamaged))
			}
			plans[id] = p
		}
		if id, ok := strings.CutPrefix(k, releasedKey); ok {
			var r release
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("read the journal of queue %s: row %q: %w", q.Config.Name, k, err)
			}
			released[id] = r
		}
	}
	if q.reinjections, err = loadReinjections(rows); err != nil {
		return fmt.Errorf("read the journal of queue %s: %w", q.Config.Name, err)
	}
	q.plans, q.released, q.later = plans, released, map[string][]byte{}
	return nil
}

// release is a message that left as it came. If it is on hold again, a person
// put it there.
type release struct {
	Ino uint64 `json:"inode"`
	T   int64  `json:"t"`
}

// Releases are noted after the fact, some together: a crash may forget the
// last ones, which costs a new scan of what a person has put on hold since.
const (
	saveAfter = 5 * time.Second
	saveRows  = 500
	sweepEach = time.Hour
	sweepRows = 100_000 // new ones since the last time
)

// save writes rows, and those that wait.
func (q *Queue) save(rows map[string][]byte) error {
	q.mu.Lock()
	all := maps.Clone(q.later)
	q.mu.Unlock()
	if all == nil {
		all = map[string][]byte{}
	}
	maps.Copy(all, rows)
	if len(all) == 0 {
		return nil
	}
	if err := q.Journal.Save(all); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for k := range all {
		delete(q.later, k)
	}
	q.saved = time.Now()
	return nil
}

// open journals plans, in one transaction, before anything is decided.
func (q *Queue) open(plans []plan) error {
	q.mu.Lock()
	err := q.load()
	due := len(plans) > 0 || len(q.later) > saveRows || time.Since(q.saved) > saveAfter
	q.mu.Unlock()
	if err != nil || !due {
		return err
	}
	q.sweepReleased()
	rows := map[string][]byte{}
	for _, p := range plans {
		text, err := json.Marshal(p)
		if err != nil {
			return err
		}
		rows[planKey+p.ID] = text
	}
	if err := q.save(rows); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range plans {
		q.plans[p.ID] = p
	}
	return nil
}

// noteRelease remembers that a message left as it came.
func (q *Queue) noteRelease(id string, ino uint64, t int64) {
	text, err := json.Marshal(release{ino, t})
	if err != nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.released[id] = release{ino, t}
	q.later[releasedKey+id] = text
}

// sweepReleased forgets releases of messages that have left Postfix's queues.
func (q *Queue) sweepReleased() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if time.Since(q.swept) < sweepEach && len(q.released)-q.kept < sweepRows {
		return
	}
	q.swept = time.Now()
	defer func() { q.kept = len(q.released) }()
	q.forgetReinjections()
	for id, r := range q.released {
		there := false
		for _, name := range []string{incomingDir, "active", "deferred", holdDir} {
			st, err := inode.Lstat(q.path(name, id))
			there = there || err == nil && st.Ino == r.Ino
		}
		if !there {
			delete(q.released, id)
			q.later[releasedKey+id] = nil
		}
	}
}

// settled forgets a plan; its row goes with the next Save. Until then it is
// harmless: nothing that it names exists any more.
func (q *Queue) settled(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.plans, id)
	q.later[planKey+id] = nil
}

func (q *Queue) wasReleased(id queue.Identity) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	r, ok := q.released[id.ID.Name]
	return ok && r == release{id.Ino, id.T}
}

// planOf finds the open plan that a file on hold belongs to: by its name, or
// by its inode, since `postfix start` may have renamed it to match that.
func (q *Queue) planOf(id string, ino uint64) (plan, bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.load(); err != nil {
		return plan{}, false, err
	}
	if p, ok := q.plans[id]; ok {
		return p, true, nil
	}
	for _, p := range q.plans {
		if p.Self == ino && ino != 0 {
			return p, true, nil
		}
	}
	return plan{}, false, nil
}

// recognise reads our own traces: a decided plan is returned; one that was
// not decided is undone, and its message is as it was.
func (q *Queue) recognise(ctx context.Context, id queue.ID, ino uint64) (*plan, error) {
	p, ok, err := q.planOf(id.Name, ino)
	switch {
	case err != nil || !ok:
		return nil, err
	case p.Self == ino:
		return &p, nil
	case p.Orig != ino:
		return nil, nil // the name is another message's by now; see Sweep
	}
	if err := q.undo(ctx, p); err != nil {
		return nil, err
	}
	q.settled(p.ID)
	return nil, nil
}

// undo removes what was prepared for a plan that was not decided.
func (q *Queue) undo(ctx context.Context, p plan) error {
	dir := q.in(holdDir, p.ID)
	for _, g := range p.Groups {
		switch {
		case g.Temp != "":
			q.files.Unlink(dir+"/"+g.Temp, g.Ino)
		case g.Item != "":
			if err := q.Store.Abort(ctx, g.Item); err != nil {
				return err
			}
		}
	}
	return nil
}

// decidedWithout says what became of a plan whose message is no longer on hold
// under its name: whether it was decided.
func (q *Queue) decidedWithout(p plan) (bool, error) {
	dir := q.in(holdDir, p.ID)
	first := p.first()
	if first < 0 {
		// Decided by removing the name; without a crash of ours somebody else
		// may have done it, and the items say that they are uncertain.
		return true, nil
	}
	st, err := inode.Lstat(dir + "/" + p.Groups[first].Temp)
	switch {
	case errors.Is(err, queue.ErrGone):
		return true, nil // exchanged, and the original removed
	case err != nil:
		return false, err
	}
	return st.Ino == p.Orig, nil // exchanged: the original lies under the prepared name
}

// first is the group whose file takes the original's name, -1 if none does.
func (p plan) first() int {
	for i, g := range p.Groups {
		if g.Ino == p.Self && p.Self != 0 {
			return i
		}
	}
	return -1
}
