package postfix

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"time"

	"holdfast/queue"
	"holdfast/queue/inode"
)

// plan is a rewritten message's row in the journal: durable before the
// decision, and enough to finish after it, or to undo before it.
type plan struct {
	ID     string  `json:"id"`   // on hold
	T      int64   `json:"t"`    // of the message: its id and inodes come back
	Orig   uint64  `json:"orig"` // inode that was read
	Self   uint64  `json:"self"` // inode that takes its name at the decision; 0: the name goes
	Groups []group `json:"groups"`

	decided bool // in this life; after a crash the directory tells
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
	for _, r := range q.reinjections {
		q.untidy = append(q.untidy, q.copiesAside(r)...)
	}
	q.plans, q.released, q.later = plans, released, map[string][]byte{}
	return nil
}

// release is a message that we have released. If it is on hold again, a person
// put it there. Ids of the short kind come back with their inode; the time does
// not.
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

// noteRelease remembers a release.
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

// markDecided remembers that an open plan was decided in this life.
func (q *Queue) markDecided(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if p, ok := q.plans[id]; ok {
		p.decided = true
		q.plans[id] = p
	}
}

// planOf finds the open plan that a file on hold may belong to: by its name,
// or by the name that `postfix start` gives to it to match its inode.
func (q *Queue) planOf(id string) (plan, bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.load(); err != nil {
		return plan{}, false, err
	}
	if p, ok := q.plans[id]; ok {
		return p, true, nil
	}
	for _, p := range q.plans {
		if first := p.first(); first >= 0 && p.Groups[first].New == id {
			return p, true, nil
		}
	}
	return plan{}, false, nil
}

// recognise reads our own traces: a decided plan is returned; one that was
// not decided is undone, and its message is as it was. Names and inodes come
// back, so that the time must be the plan's as well.
func (q *Queue) recognise(ctx context.Context, who queue.Identity) (*plan, error) {
	p, ok, err := q.planOf(who.ID.Name)
	switch {
	case err != nil || !ok || p.T != who.T:
		return nil, err
	case p.Self == who.Ino && q.foreign(p):
		// The crash came between an exchange with another's file and its way back.
		if err := q.FS.Exchange(q.tempOf(p), q.path(holdDir, p.ID)); err != nil {
			return nil, inode.Gone(err)
		}
		if err := q.undo(ctx, p); err != nil {
			return nil, err
		}
		q.settled(p.ID)
		return nil, fmt.Errorf("%s: %w: replaced by another file", who.ID, queue.ErrGone)
	case p.Self == who.Ino:
		return &p, nil
	case p.Orig != who.Ino || p.ID != who.ID.Name:
		return nil, nil // the name is another message's by now; see finishOpen
	}
	if err := q.undo(ctx, p); err != nil {
		return nil, err
	}
	q.settled(p.ID)
	return nil, nil
}

// mark is a plan as the file that takes the original's name carries it, should
// the journal be lost between the decision and its end: the other groups' files
// have names that nobody else knows. The file's own inode is not in it.
func (q *Queue) mark(p plan) (string, error) {
	if q.Token == "" {
		return "", nil
	}
	text, err := json.Marshal(p)
	if err != nil {
		return "", fmt.Errorf("encode a plan: %w", err)
	}
	return q.Token + " " + string(text), nil
}

// marked reads the plan that a file carries. It counts only while the original
// lies under the prepared name: once all is done the mark means nothing, whoever
// puts the file on hold again. No client can make one: it is no header field.
func (q *Queue) marked(c *claim) *plan {
	text, ok := strings.CutPrefix(c.file.attr(strings.TrimSuffix(markAttr, "=")), q.Token+" ")
	if !ok || q.Token == "" {
		return nil
	}
	var p plan
	if err := json.Unmarshal([]byte(text), &p); err != nil || !validID(p.ID) {
		return nil
	}
	p.Self = c.stats.Control.Ino
	for i := range p.Groups {
		g := &p.Groups[i]
		if filepath.Base(g.Temp) != g.Temp && g.Temp != "" {
			return nil
		}
		if g.Do == queue.Release && g.Ino == 0 {
			g.Ino, g.New = p.Self, withInode(p.ID, p.Self)
		}
	}
	if p.first() < 0 || p.ID != c.entry.ID.Name && p.Groups[p.first()].New != c.entry.ID.Name {
		return nil
	}
	if st, err := inode.Lstat(q.tempOf(p)); err != nil || st.Ino != p.Orig {
		return nil
	}
	return &p
}

// tempOf is the prepared name whose file takes the original's name.
func (q *Queue) tempOf(p plan) string {
	return filepath.Join(q.in(holdDir, p.ID), p.Groups[p.first()].Temp)
}

// foreign says that what was swapped out is neither the original nor ours.
func (q *Queue) foreign(p plan) bool {
	st, err := inode.Lstat(q.tempOf(p))
	return err == nil && st.Ino != p.Orig && st.Ino != p.Self
}

// undo removes what was prepared for a plan that was not decided.
func (q *Queue) undo(ctx context.Context, p plan) error {
	dir := q.in(holdDir, p.ID)
	for _, g := range p.Groups {
		switch {
		case g.Temp != "":
			q.files.Unlink(filepath.Join(dir, g.Temp), g.Ino)
		case g.Item != "":
			if err := q.Store.Abort(ctx, g.Item); err != nil {
				return err
			}
		}
	}
	return nil
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
