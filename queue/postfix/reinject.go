package postfix

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"holdfast/queue"
	"holdfast/queue/inode"
	"holdfast/queue/render"
)

// reinjection is the journal's row of a changed message that is handed back by
// SMTP to a listener that holds it again (CUSTODY 2). The copies carry its nonce.
type reinjection struct {
	Nonce  string    `json:"nonce"`
	When   time.Time `json:"when"`
	State  state     `json:"state"`
	ID     string    `json:"id"` // of the original
	T      int64     `json:"t"`
	Ino    uint64    `json:"inode"`
	Groups []regroup `json:"groups"`
}

type regroup struct {
	Do     queue.Disposition `json:"do"`
	Item   string            `json:"item,omitempty"`   // in the quarantine
	Copies []hcopy           `json:"copies,omitempty"` // one per SMTP transaction
}

// hcopy is one copy on hold, once it is chosen.
type hcopy struct {
	From int    `json:"from"` // its recipients, by their place in the group's
	To   int    `json:"to"`
	ID   string `json:"id,omitempty"`
	T    int64  `json:"t,omitempty"`
	Ino  uint64 `json:"inode,omitempty"`
	Out  bool   `json:"out,omitempty"` // the listener did not hold it
}

// state is how far a re-injection is.
type state string

const (
	reOpen    state = "open"    // copies are being made; after a crash: void
	reChosen  state = "chosen"  // decided: these copies instead of the original
	reSettled state = "settled" // the original is gone, by us
	reDone    state = "done"    // and the copies are released: mail like any other
	reVoid    state = "void"    // given up: its copies are never released, the original was not touched
)

const (
	reinjectKey = "reinject "
	reKept      = 24 * time.Hour // a row stays for copies that come late
	// All of a batch's dialogue: the loop waits for it, and must not seem stuck.
	reinjectTime = 45 * time.Second
	heloPrefix   = "hf-"
	heloSuffix   = ".holdfast.invalid"
	nonceLength  = 32
)

// helo is the EHLO name of one copy's transaction; the queue manager keeps it
// in the copy as helo_name, which XFORWARD cannot set.
func (r *reinjection) helo(group, n int) string {
	return fmt.Sprintf("%s%s-%d-%d%s", heloPrefix, r.Nonce, group, n, heloSuffix)
}

// nonceOf is the nonce in a EHLO name, "" if it is not one of ours.
func nonceOf(helo string) string {
	rest, ok := strings.CutPrefix(helo, heloPrefix)
	rest, ok2 := strings.CutSuffix(rest, heloSuffix)
	if !ok || !ok2 || len(rest) < nonceLength {
		return ""
	}
	return rest[:nonceLength]
}

func (f *file) attr(name string) string {
	for _, r := range f.env {
		if v, ok := strings.CutPrefix(r.data, name+"="); ok && r.kind == recAttr {
			return v
		}
	}
	return ""
}

// loses says what a copy made by SMTP would lack, "" if nothing that matters
// for its delivery (reference: B6, 4h).
func loses(e queue.Envelope) string {
	switch {
	case e.Filter != "":
		return "its content filter"
	case e.Redirect != "":
		return "its redirection"
	case e.VERP != "":
		return "its VERP delimiters"
	case e.SASLUser != "" || e.SASLSender != "":
		return "its authenticated sender"
	}
	return ""
}

// openReinjection makes the row of a plan, and its quarantine items.
func (q *Queue) openReinjection(ctx context.Context, j *job) error {
	if what := loses(j.env); what != "" {
		return fmt.Errorf("%w: a copy by SMTP would lose %s (modify)", queue.ErrUnchangeable, what)
	}
	nonce := make([]byte, nonceLength/2)
	if _, err := rand.Read(nonce); err != nil {
		return fmt.Errorf("make a nonce: %w", err)
	}
	r := &reinjection{
		Nonce: hex.EncodeToString(nonce), When: time.Now(), State: reOpen, ID: j.entry.ID.Name, T: j.ident.T, Ino: j.stats.Control.Ino,
		Groups: make([]regroup, len(j.groups)),
	}
	j.re = r
	limit := max(q.RecipientLimit, 1)
	for i, g := range j.groups {
		row := &r.Groups[i]
		row.Do = g.Disposition
		switch g.Disposition {
		case queue.Quarantine:
			var err error
			if row.Item, err = q.prepareItem(ctx, j.claim, g, i); err != nil {
				return err
			}
		case queue.Release:
			n := len(j.rcptsOf(g))
			for at := 0; at < n; at += limit {
				row.Copies = append(row.Copies, hcopy{From: at, To: min(at+limit, n)})
			}
		}
	}
	return nil
}

func (j *job) rcptsOf(g queue.Group) []queue.Recipient {
	if g.Recipients == nil {
		return j.env.Recipients
	}
	return withRecipients(j.env, g.Recipients).Recipients
}

// reinject hands the copies of each plan over, and then chooses them in one
// durable step: the decision. A plan of which any copy was refused is void, and
// the others' are not touched by that.
func (q *Queue) reinject(ctx context.Context, jobs []*job) {
	jobs = slices.DeleteFunc(slices.Clone(jobs), func(j *job) bool { return j.kind != reinjected })
	if len(jobs) == 0 {
		return
	}
	var s *session
	var down error // the listener does not answer: the others need not wait for it, too
	until := time.Now().Add(reinjectTime)
	q.phase(jobs, func(j *job) (err error) {
		if s == nil && down == nil {
			s, down = dial(ctx, q.Listener, until)
		}
		if down != nil {
			return down
		}
		if err = q.copies(ctx, s, j); err != nil {
			s.close() // the next plan begins anew, whatever this one left on the line
			s = nil
			if broken(err) {
				down = err
			}
		}
		return err
	})
	if s != nil {
		s.end()
	}
	var chosen []*reinjection
	q.phase(jobs, func(j *job) error { chosen = append(chosen, j.re); return nil })
	err := q.saveReinjections(chosen, reChosen)
	q.phase(jobs, func(j *job) error { return err })
}

// copies makes the copies of one plan.
func (q *Queue) copies(ctx context.Context, s *session, j *job) error {
	for i, g := range j.groups {
		if g.Disposition != queue.Release {
			continue
		}
		text, err := q.changed(ctx, j, g)
		if err != nil {
			return err
		}
		err = q.copiesOf(s, j, i, text)
		text.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (q *Queue) copiesOf(s *session, j *job, group int, text *os.File) error {
	rcpts := j.rcptsOf(j.groups[group])
	eight, err := hasEightBit(io.NewSectionReader(text, 0, 1<<62))
	if err != nil {
		return fmt.Errorf("read the changed message: %w", err)
	}
	for n := range j.re.Groups[group].Copies {
		c := &j.re.Groups[group].Copies[n]
		name := j.re.helo(group, n)
		id, err := s.send(letter{
			helo: name, forward: j.client(), env: j.env, rcpts: rcpts[c.From:c.To], eight: eight, text: io.NewSectionReader(text, 0, 1<<62),
		})
		if err != nil {
			return fmt.Errorf("hand it back by SMTP: %w", err)
		}
		if err := q.choose(c, id, name); err != nil {
			return err
		}
	}
	return nil
}

// changed renders a group's content, which several transactions may need.
func (q *Queue) changed(ctx context.Context, j *job, g queue.Group) (*os.File, error) {
	text, err := edited(&contextReader{ctx, j.content()}, g.Edit)
	if err != nil {
		return nil, err
	}
	return render.File(q.Work, q.RenderInMemory, j.stats.Control.Size, func(w io.Writer) error {
		_, err := io.Copy(w, text)
		return err
	})
}

// client is what XFORWARD tells of the original's client.
func (j *job) client() map[string]string {
	v := map[string]string{
		"NAME": j.file.attr("log_client_name"), "ADDR": j.file.attr("log_client_address"), "PORT": j.file.attr("log_client_port"),
		"PROTO": j.file.attr("log_protocol_name"), "HELO": j.file.attr("log_helo_name"), "IDENT": j.entry.ID.Name, "SOURCE": "REMOTE",
	}
	for k, s := range v {
		v[k] = known(s)
	}
	if j.file.attr("rewrite_context") == "local" {
		v["SOURCE"] = "LOCAL"
	}
	return v
}

// choose looks at a copy that was accepted: it must be on hold, and carry its
// nonce. One that is not on hold was delivered by a listener that does not hold.
func (q *Queue) choose(c *hcopy, id, helo string) error {
	path := q.path(holdDir, id)
	st, err := inode.Lstat(path)
	if errors.Is(err, queue.ErrGone) {
		return q.notHeld(c, id)
	}
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return inode.OpenError(path, err)
	}
	defer f.Close()
	x, err := parse(f, st.Size, q.MaxControl, q.MaxRecipients)
	if err != nil {
		return fmt.Errorf("the copy %s: %w", id, err)
	}
	if x.attr("helo_name") != helo {
		return fmt.Errorf("the copy %s does not carry the name that it was sent with", id)
	}
	c.ID, c.T, c.Ino = id, x.envelope().Arrived.Unix(), st.Ino
	return nil
}

// notHeld books a copy that is on its way already, since the listener does not
// hold what it accepts. That ends re-injection in this life.
func (q *Queue) notHeld(c *hcopy, id string) error {
	q.unheld.Store(true)
	for _, name := range []string{incomingDir, "active", "deferred"} {
		if st, err := inode.Lstat(q.path(name, id)); err == nil {
			c.ID, c.Ino, c.Out = id, st.Ino, true
			q.Report(Event{What: fmt.Sprintf("the listener %s does not hold what it accepts: no more mail is handed to it", q.Listener)})
			return nil
		}
	}
	return fmt.Errorf("the listener %s does not hold what it accepts: %s may have been delivered, and will be a second time; holdfast setup postfix prints how the listener must be set up", q.Listener, id)
}

func hasEightBit(r io.Reader) (bool, error) {
	buf := make([]byte, readAhead)
	for {
		n, err := r.Read(buf)
		if slices.ContainsFunc(buf[:n], func(c byte) bool { return c >= 0x80 }) {
			return true, nil
		}
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// settleOriginals removes the originals of chosen copies, looking at each copy
// first. Order: look; set the original aside; fsync hold; row settled; remove
// what lies aside. Then the copies may go. So a crash leaves no doubt who took an
// original away: ours lies aside until the row says so.
func (q *Queue) settleOriginals(ctx context.Context, jobs []*job) {
	jobs = slices.DeleteFunc(slices.Clone(jobs), func(j *job) bool { return j.kind != reinjected })
	q.phase(jobs, func(j *job) error { return q.settleOriginal(ctx, j) })
	q.sync(jobs, reinjected, func(j *job) []string { return []string{q.in(holdDir, j.re.ID)} })
	var rows []*reinjection
	q.phase(jobs, func(j *job) error { rows = append(rows, j.re); return nil })
	err := q.saveReinjections(rows, reSettled)
	q.phase(jobs, func(j *job) error { return err })
	q.phase(jobs, func(j *job) error {
		path := q.path(holdDir, j.re.ID)
		q.files.Unlink(asideOf(path), j.re.Ino)
		q.tidyLater(path, j.re.Ino)
		return nil
	})
}

func (q *Queue) settleOriginal(ctx context.Context, j *job) error {
	r := j.re
	if r.State == reSettled {
		return nil
	}
	path := q.path(holdDir, r.ID)
	st, err := inode.Lstat(path)
	switch {
	case err == nil && st.Ino == r.Ino:
	case err != nil && !errors.Is(err, queue.ErrGone):
		return err
	default:
		return q.originalIsGone(ctx, j, path)
	}
	for _, g := range r.Groups {
		for _, c := range g.Copies {
			if !c.Out && !q.isIn(holdDir, c.ID, c.Ino) && !q.isElsewhere(c.ID, c.Ino) {
				q.abandon(ctx, r)
				return fmt.Errorf("%s: its copy %s is no longer on hold: it will be handed back again", r.ID, c.ID)
			}
		}
	}
	if err := q.removeOriginal(ctx, r, path); err != nil {
		if errors.Is(err, queue.ErrGone) {
			return q.originalIsGone(ctx, j, path)
		}
		return err
	}
	j.decided = true
	return nil
}

func (q *Queue) removeOriginal(ctx context.Context, r *reinjection, path string) error {
	if q.Release != ByPostsuper {
		return q.files.SetAside(path, asideOf(path), r.Ino)
	}
	done, err := q.postsuper(ctx, "-d", []string{r.ID})
	if err == nil && !done[r.ID] {
		err = fmt.Errorf("postsuper did not find %s: %w", r.ID, queue.ErrGone)
	}
	return err
}

// originalIsGone decides about chosen copies whose original has left hold: set
// aside by us before a crash, or taken by somebody else. Of postsuper -d nothing
// remains to tell the two apart.
func (q *Queue) originalIsGone(ctx context.Context, j *job, path string) error {
	r := j.re
	if st, err := inode.Lstat(asideOf(path)); err == nil && st.Ino == r.Ino {
		j.decided = true
		return nil
	}
	if q.isElsewhere(r.ID, r.Ino) {
		q.abandon(ctx, r)
		return fmt.Errorf("%s was taken off hold by somebody else: %w", r.ID, queue.ErrGone)
	}
	if !j.resumed || q.Release != ByPostsuper {
		q.abandon(ctx, r)
		return fmt.Errorf("%s was removed by somebody else: %w", r.ID, queue.ErrGone)
	}
	j.decided = true
	q.Report(Event{ID: j.entry.ID, What: "possible duplicate: the original of changed mail was gone after a crash; its copies are released"})
	return nil
}

// Where a message is that has left hold without us.
var elsewhere = []string{"deferred", incomingDir, "active", "maildrop", "corrupt"}

// isElsewhere says that somebody else has taken a message off hold.
func (q *Queue) isElsewhere(id string, ino uint64) bool {
	return slices.ContainsFunc(elsewhere, func(name string) bool { return q.isIn(name, id, ino) })
}

func (q *Queue) isIn(queueName, id string, ino uint64) bool {
	st, err := inode.Lstat(q.path(queueName, id))
	return err == nil && st.Ino == ino
}

// abandon ends a plan: its copies will never be released. The original stands,
// or somebody else has it.
func (q *Queue) abandon(ctx context.Context, r *reinjection) {
	id := queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: r.ID}
	q.note(id, "give up a re-injection", q.saveReinjections([]*reinjection{r}, reVoid))
	q.dropCopies(r)
	for _, g := range r.Groups {
		if g.Item != "" {
			q.note(id, "abort its quarantine item", q.Store.Abort(ctx, g.Item))
		}
	}
}

// copiesAside are the copies that a death may have left aside, half removed.
func (q *Queue) copiesAside(r *reinjection) (out []aside) {
	if r.State != reVoid {
		return nil
	}
	for _, g := range r.Groups {
		for _, c := range g.Copies {
			if c.ID != "" {
				out = append(out, aside{q.path(holdDir, c.ID), c.Ino})
			}
		}
	}
	return out
}

// dropCopies removes copies that are known and will never be released.
func (q *Queue) dropCopies(r *reinjection) {
	for _, g := range r.Groups {
		for _, c := range g.Copies {
			if c.ID != "" {
				q.dropCopy(c.ID, c.Ino)
			}
		}
	}
}

func (q *Queue) dropCopy(id string, ino uint64) {
	path := q.path(holdDir, id)
	err := q.files.Remove(path, asideOf(path), ino)
	q.tidyLater(path, ino)
	if err != nil && !errors.Is(err, queue.ErrGone) {
		q.Report(Event{ID: queue.ID{Queue: q.Config.Name, Dir: q.Dir, Name: id}, What: "remove a copy that is not needed", Err: err})
	}
}

// releaseCopies renames the chosen copies to incoming; one that is missing
// was released before. Their names are their inodes' already.
func (q *Queue) releaseCopies(j *job) error {
	for i, g := range j.re.Groups {
		if g.Item != "" {
			j.newIDs[i] = g.Item
		}
		for n, c := range g.Copies {
			if err := q.toIncoming(q.path(holdDir, c.ID), group{New: c.ID, Ino: c.Ino}); err != nil {
				return err
			}
			if n == 0 {
				j.newIDs[i] = c.ID
			}
			q.noteRelease(c.ID, c.Ino, c.T)
		}
	}
	return nil
}

func (q *Queue) showItems(ctx context.Context, j *job) error {
	for _, g := range j.re.Groups {
		if g.Item != "" {
			if err := q.Store.Commit(ctx, g.Item); err != nil {
				return err
			}
		}
	}
	return nil
}

// saveReinjections journals rows in a new state, in one step.
func (q *Queue) saveReinjections(rs []*reinjection, s state) error {
	if len(rs) == 0 {
		return nil
	}
	rows := map[string][]byte{}
	for _, r := range rs {
		next := *r
		next.State = s
		text, err := json.Marshal(next)
		if err != nil {
			return fmt.Errorf("encode a journal row: %w", err)
		}
		rows[reinjectKey+r.Nonce] = text
	}
	if err := q.save(rows); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range rs {
		r.State = s
		q.reinjections[r.Nonce] = r
	}
	return nil
}

// loadReinjections takes rows of earlier lives: what was open is void.
func loadReinjections(rows map[string][]byte) (map[string]*reinjection, error) {
	out := map[string]*reinjection{}
	for k, v := range rows {
		nonce, ok := strings.CutPrefix(k, reinjectKey)
		if !ok {
			continue
		}
		r := &reinjection{}
		if err := json.Unmarshal(v, r); err != nil || r.Nonce != nonce || !validID(r.ID) {
			return nil, fmt.Errorf("row %q: %w", k, errors.Join(err, queue.ErrDamaged))
		}
		if r.State == reOpen {
			r.State = reVoid
		}
		out[nonce] = r
	}
	return out, nil
}

// forgetReinjections drops rows of which no copy can come any more.
func (q *Queue) forgetReinjections() {
	for nonce, r := range q.reinjections {
		if r.State != reOpen && r.State != reChosen && time.Since(r.When) > reKept {
			delete(q.reinjections, nonce)
			q.later[reinjectKey+nonce] = nil
		}
	}
}

// chosenFor finds the decided re-injection of an original; of one that is gone
// only the queue id is known.
func (q *Queue) chosenFor(id queue.Identity) *reinjection {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range q.reinjections {
		same := r.Ino == id.Ino && r.T == id.T || id.Ino == 0
		if r.ID == id.ID.Name && same && (r.State == reChosen || r.State == reSettled && id.Ino == 0) {
			return r
		}
	}
	return nil
}

// copyOf says what a file on hold that carries one of our nonces is: part of a
// decided re-injection, which is returned; not to be touched now (an error); or,
// with neither, new mail.
func (q *Queue) copyOf(c *claim) (*reinjection, error) {
	nonce := nonceOf(c.file.attr("helo_name"))
	if nonce == "" {
		return nil, nil
	}
	q.mu.Lock()
	if err := q.load(); err != nil {
		q.mu.Unlock()
		return nil, err
	}
	r := q.reinjections[nonce]
	q.mu.Unlock()
	if r == nil { // anybody may connect to the listener: mail like any other
		q.Report(Event{ID: c.entry.ID, What: "it came by the listener for changed mail with a name that is in no open row of the journal: scanned as new mail; a possible duplicate if the ledger was lost"})
		return nil, nil
	}
	id, ino := c.entry.ID.Name, c.stats.Control.Ino
	chosen := slices.ContainsFunc(r.Groups, func(g regroup) bool {
		return slices.ContainsFunc(g.Copies, func(x hcopy) bool { return x.ID == id && x.Ino == ino })
	})
	switch {
	case r.State == reOpen:
		return nil, fmt.Errorf("%s: %w: a copy of %s that is being made", id, queue.ErrBusy, r.ID)
	case chosen && (r.State == reChosen || r.State == reSettled):
		return r, nil
	case chosen && r.State == reDone:
		return nil, nil // on hold once more: a person's doing
	}
	// Its original was never touched for it: it stands, or is settled in another
	// way, or somebody has removed it.
	q.dropCopy(id, ino)
	return nil, fmt.Errorf("%s: %w: a copy of %s that is not needed, removed", id, queue.ErrGone, r.ID)
}

// resumeReinjection finishes a decided re-injection after a crash.
func (q *Queue) resumeReinjection(ctx context.Context, c *claim, r *reinjection) *job {
	c.Close() // the copies are to be published: no lock of ours on any
	j := &job{claim: c, kind: reinjected, re: r, resumed: true, newIDs: make([]string, len(r.Groups))}
	one := []*job{j}
	q.settleOriginals(ctx, one)
	q.publishCopies(ctx, one)
	return j
}

// publishCopies finishes settled re-injections: copies to incoming; fsync; items.
func (q *Queue) publishCopies(ctx context.Context, jobs []*job) {
	jobs = slices.DeleteFunc(slices.Clone(jobs), func(j *job) bool { return j.kind != reinjected })
	q.phase(jobs, q.releaseCopies)
	dirs := func(queueName string) func(*job) []string {
		return func(j *job) (out []string) {
			for _, g := range j.re.Groups {
				for _, c := range g.Copies {
					out = append(out, q.in(queueName, c.ID))
				}
			}
			return out
		}
	}
	q.sync(jobs, reinjected, dirs(incomingDir), dirs(holdDir))
	q.phase(jobs, func(j *job) error { return q.showItems(ctx, j) })
	q.phase(jobs, func(j *job) error { q.finished(j.re); return nil })
}

// finished notes, with the next Save, that there is nothing left to do.
func (q *Queue) finished(r *reinjection) {
	done := *r
	done.State = reDone
	text, err := json.Marshal(done)
	if err != nil {
		return // it stays settled, which only costs a look
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	r.State = reDone
	q.later[reinjectKey+r.Nonce] = text
}
