// Package ledger remembers durably what is in work: which item, since when,
// by whom. It holds suspicion only: losing it costs work, never an item.
package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"

	"holdfast/poison/proc"
)

// Owner is one life of one process.
type Owner struct {
	Machine string `json:"machine"`
	Boot    string `json:"boot"`
	PID     int    `json:"pid"`
	Start   uint64 `json:"start"` // ticks since boot
}

// Self is this process.
func Self() (Owner, error) {
	o := Owner{PID: os.Getpid()}
	for path, into := range map[string]*string{"/etc/machine-id": &o.Machine, "/proc/sys/kernel/random/boot_id": &o.Boot} {
		text, err := os.ReadFile(path)
		if err != nil && path != "/etc/machine-id" { // a machine without an id is one without failover
			return o, fmt.Errorf("who am I: %w", err)
		}
		*into = strings.TrimSpace(string(text))
	}
	var ok bool
	if o.Start, ok = proc.StartTime(o.PID); !ok {
		return o, errors.New("who am I: /proc has no start time of this process")
	}
	return o, nil
}

// Alive says that the owner still runs; it can only be asked about a process
// of this machine and boot.
func (o Owner) Alive() bool {
	start, ok := proc.StartTime(o.PID)
	return ok && start == o.Start
}

// Row is one item in work.
type Row struct {
	Key   string          `json:"-"`
	Stat  json.RawMessage `json:"stat"` // what the caller knows it by; opaque
	Began time.Time       `json:"began"`
	Owner Owner           `json:"owner"`
}

// Recovery is what a row that was found means for its item.
type Recovery string

// The kinds of recovery (DESIGN 4).
const (
	None      Recovery = ""              // no row, or one of our own life
	Alive     Recovery = "owner alive"   // leave it alone
	DeadHere  Recovery = "owner dead"    // suspect, in a small group, no strike
	OtherBoot Recovery = "other boot"    // the machine went down: no evidence
	Young     Recovery = "other machine" // leave it alone
	Old       Recovery = "abandoned by another machine"
)

// Judge says what a row means. It is pure.
func Judge(row, self Owner, began, now time.Time, age time.Duration, alive func(Owner) bool) Recovery {
	switch {
	case row == self:
		return None
	case row.Machine != self.Machine:
		if began.After(now) || now.Sub(began) >= age { // a future time stamp counts as old
			return Old
		}
		return Young
	case row.Boot != self.Boot:
		return OtherBoot
	case alive(row):
		return Alive
	}
	return DeadHere
}

// Found is a row that an earlier life left for a claimed item.
type Found struct {
	Row      Row
	Recovery Recovery
}

// Decision is what was decided for an item; Data is opaque.
type Decision struct {
	Key  string
	Data []byte
}

// Aside is an item that is left alone until somebody decides: convicted and
// held, held by policy, or deadly to the supervisor.
type Aside struct {
	Key  string          `json:"-"`
	Stat json.RawMessage `json:"stat"`
	Why  string          `json:"why"`
	When time.Time       `json:"when"`
}

// Conviction is a guilty item.
type Conviction struct {
	Key    string          `json:"key"`
	When   time.Time       `json:"when"`
	Deaths json.RawMessage `json:"deaths"`
}

var tables = struct{ inflight, aside, convicted, journal, notes, meta []byte }{
	[]byte("inflight"), []byte("aside"), []byte("convicted"), []byte("journal"), []byte("notes"), []byte("meta"),
}

// Bounds of the tables, in rows. The in-progress table is bounded by its
// caller: children times batch.
const (
	maxConvictions = 100_000
	maxAside       = 100_000
)

const schema = "1"

// ErrFull says that a table has reached its bound.
var ErrFull = errors.New("the table is full")

// Ledger is an open ledger.
type Ledger struct {
	db   *bbolt.DB
	self Owner
	Age  time.Duration
	Now  func() time.Time
	Txs  int // transactions that were written
}

const lockWait = 5 * time.Second

// What a guard says of a ledger. Only damage is a reason to move it aside:
// another process that has it locked, or a guard that could not do its work,
// says nothing about the file.
var (
	ErrDamaged = errors.New("damaged")
	ErrInUse   = errors.New("in use by another process")
)

// Event tells what opening a ledger had to do.
type Event struct {
	Moved string // where a damaged one was put
	Err   error  // what was wrong with it
}

// Open opens or makes the ledger. Guard opens and walks the file first, in a
// process of its own: a damaged one can kill whoever opens it. If the guard
// says ErrDamaged the file is moved aside, and an empty one made.
func Open(ctx context.Context, path string, guard func(context.Context, string) error, report func(Event)) (*Ledger, error) {
	self, err := Self()
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); err == nil && guard != nil {
		gerr := guard(ctx, path)
		if gerr != nil && !errors.Is(gerr, ErrDamaged) {
			return nil, fmt.Errorf("ledger %s: %w", path, gerr)
		}
		if gerr != nil {
			aside := fmt.Sprintf("%s.damaged-%s", path, time.Now().UTC().Format("20060102T150405.000"))
			if err := os.Rename(path, aside); err != nil {
				return nil, fmt.Errorf("move the damaged ledger aside: %w", err)
			}
			report(Event{Moved: aside, Err: gerr})
		}
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, fmt.Errorf("ledger %s: %w", path, opening(err))
	}
	l := &Ledger{db: db, self: self, Now: time.Now, Age: 10 * time.Minute}
	if err := l.prepare(); err != nil {
		db.Close()
		return nil, err
	}
	return l, nil
}

func (l *Ledger) prepare() error {
	return l.update("prepare", func(tx *bbolt.Tx) error {
		for _, t := range [][]byte{tables.inflight, tables.aside, tables.convicted, tables.journal, tables.notes, tables.meta} {
			if _, err := tx.CreateBucketIfNotExists(t); err != nil {
				return err
			}
		}
		meta := tx.Bucket(tables.meta)
		if v := meta.Get([]byte("schema")); v != nil && string(v) != schema {
			return fmt.Errorf("it was written by another version (schema %.20q)", v)
		}
		return meta.Put([]byte("schema"), []byte(schema))
	})
}

// opening says what bbolt means by an error: the machine's are the machine's,
// and what it does not like in the file is damage.
func opening(err error) error {
	var machine syscall.Errno
	switch {
	case errors.Is(err, bberrors.ErrTimeout):
		return ErrInUse
	case errors.As(err, &machine):
		return err
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

// Walk opens a ledger and visits every page and row: what a guard process
// does. It returns an error, ErrDamaged only for what is wrong with the file
// itself, or dies of it.
func Walk(path string) error {
	if st, err := os.Stat(path); err == nil && st.Size() == 0 {
		return fmt.Errorf("%w: it is empty", ErrDamaged) // its maker died; bbolt would write to it
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, ReadOnly: true})
	if err != nil {
		return opening(err)
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		var errs []error
		for err := range tx.Check() {
			errs = append(errs, err)
		}
		return errors.Join(append(errs, tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(_, _ []byte) error { return nil })
		}))...)
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// OpenReadOnly opens the ledger for looking, while no daemon runs.
func OpenReadOnly(path string) (*Ledger, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("ledger %s: %w", path, opening(err))
	}
	return &Ledger{db: db, Now: time.Now}, nil
}

// Close closes the file.
func (l *Ledger) Close() error { return l.db.Close() }

// SetToken keeps a copy of the installation's token.
func (l *Ledger) SetToken(token string) error {
	return l.update("keep the token", func(tx *bbolt.Tx) error { return tx.Bucket(tables.meta).Put([]byte("token"), []byte(token)) })
}

// Token is the copy of the installation's token, "" if there is none yet.
func (l *Ledger) Token() (token string, err error) {
	err = l.db.View(func(tx *bbolt.Tx) error {
		token = string(tx.Bucket(tables.meta).Get([]byte("token")))
		return nil
	})
	return token, err
}

func (l *Ledger) update(what string, f func(*bbolt.Tx) error) error {
	l.Txs++
	if err := l.db.Update(f); err != nil {
		return fmt.Errorf("ledger: %s: %w", what, err)
	}
	return nil
}

// Begin books items as in work and those of the last batch as finished, in
// one durable transaction. It returns what earlier lives left about them.
func (l *Ledger) Begin(_ context.Context, rows []Row, finished []string) (map[string]Found, error) {
	found := map[string]Found{}
	return found, l.update("begin", func(tx *bbolt.Tx) error {
		clear(found) // should bbolt call this again
		if err := finish(tx, finished); err != nil {
			return err
		}
		b := tx.Bucket(tables.inflight)
		for _, r := range rows {
			if old := b.Get([]byte(r.Key)); old != nil {
				var row Row
				if err := json.Unmarshal(old, &row); err == nil && string(row.Stat) == string(r.Stat) {
					row.Key = r.Key
					rec := Judge(row.Owner, l.self, row.Began, l.Now(), l.Age, Owner.Alive)
					found[r.Key] = Found{row, rec}
					if rec == Alive || rec == Young {
						continue // it stays theirs
					}
				}
			}
			r.Owner = l.self
			text, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if err := b.Put([]byte(r.Key), text); err != nil {
				return err
			}
		}
		return nil
	})
}

func finish(tx *bbolt.Tx, keys []string) error {
	for _, k := range keys {
		for _, t := range [][]byte{tables.inflight, tables.journal} {
			if err := tx.Bucket(t).Delete([]byte(k)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Decided journals decisions, durable before the first operation on a queue.
func (l *Ledger) Decided(_ context.Context, ds []Decision) error {
	return l.update("decide", func(tx *bbolt.Tx) error {
		for _, d := range ds {
			if err := tx.Bucket(tables.journal).Put([]byte(d.Key), d.Data); err != nil {
				return err
			}
		}
		return nil
	})
}

// Finish books items as finished without beginning others.
func (l *Ledger) Finish(_ context.Context, keys []string) error {
	if len(keys) == 0 {
		return nil
	}
	return l.update("finish", func(tx *bbolt.Tx) error { return finish(tx, keys) })
}

// Inflight lists what is in work, ours and others'.
func (l *Ledger) Inflight() ([]Row, error) {
	var out []Row
	return out, each(l, tables.inflight, func(k string, v []byte) error {
		var r Row
		if err := json.Unmarshal(v, &r); err != nil {
			return fmt.Errorf("row %q: %w", k, err)
		}
		r.Key = k
		out = append(out, r)
		return nil
	})
}

// Mine says whether a row belongs to a dead life of this machine.
func (l *Ledger) Mine(r Row) bool {
	rec := Judge(r.Owner, l.self, r.Began, l.Now(), l.Age, Owner.Alive)
	return rec == DeadHere || rec == OtherBoot
}

// Journal lists decisions that were not finished.
func (l *Ledger) Journal() ([]Decision, error) {
	var out []Decision
	return out, each(l, tables.journal, func(k string, v []byte) error {
		out = append(out, Decision{k, append([]byte(nil), v...)})
		return nil
	})
}

func each(l *Ledger, table []byte, f func(k string, v []byte) error) error {
	return l.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(table)
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error { return f(string(k), v) })
	})
}

// SetAside leaves an item alone until somebody decides.
func (l *Ledger) SetAside(a Aside) error { return l.put(tables.aside, a.Key, a, maxAside) }

// AsideRows lists what is left alone.
func (l *Ledger) AsideRows() ([]Aside, error) {
	var out []Aside
	return out, each(l, tables.aside, func(k string, v []byte) error {
		var a Aside
		if err := json.Unmarshal(v, &a); err != nil {
			return fmt.Errorf("row %q: %w", k, err)
		}
		a.Key = k
		out = append(out, a)
		return nil
	})
}

// Return ends an item's being set aside.
func (l *Ledger) Return(key string) error {
	return l.update("return", func(tx *bbolt.Tx) error { return tx.Bucket(tables.aside).Delete([]byte(key)) })
}

// Convict books a guilty item.
func (l *Ledger) Convict(c Conviction) error {
	return l.put(tables.convicted, c.When.UTC().Format(time.RFC3339Nano)+" "+c.Key, c, maxConvictions)
}

// Convictions lists the guilty, oldest first.
func (l *Ledger) Convictions() ([]Conviction, error) {
	var out []Conviction
	return out, each(l, tables.convicted, func(k string, v []byte) error {
		var c Conviction
		if err := json.Unmarshal(v, &c); err != nil {
			return fmt.Errorf("row %q: %w", k, err)
		}
		out = append(out, c)
		return nil
	})
}

// Notes are opaque rows that a queue keeps of its own: what it has decided and
// must finish, and what it has let go. Their number is bounded by their owner:
// counting them here would read all of them, each time.
type Notes struct {
	l      *Ledger
	prefix string
}

// Notes returns the rows of one owner.
func (l *Ledger) Notes(owner string) Notes { return Notes{l, owner + "\x00"} }

// Save writes rows in one durable transaction; a nil value removes a row.
func (n Notes) Save(rows map[string][]byte) error {
	return n.l.update("save notes", func(tx *bbolt.Tx) error {
		b := tx.Bucket(tables.notes)
		for k, v := range rows {
			key := []byte(n.prefix + k)
			err := b.Put(key, v)
			if v == nil {
				err = b.Delete(key)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Rows returns all rows of the owner.
func (n Notes) Rows() (map[string][]byte, error) {
	out := map[string][]byte{}
	return out, each(n.l, tables.notes, func(k string, v []byte) error {
		if rest, ok := strings.CutPrefix(k, n.prefix); ok {
			out[rest] = append([]byte(nil), v...)
		}
		return nil
	})
}

func (l *Ledger) put(table []byte, key string, v any, bound int) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("ledger: encode row: %w", err)
	}
	return l.update("put", func(tx *bbolt.Tx) error {
		b := tx.Bucket(table)
		if b.Get([]byte(key)) == nil && b.Stats().KeyN >= bound {
			return fmt.Errorf("%s: %w (%d rows)", table, ErrFull, bound)
		}
		return b.Put([]byte(key), text)
	})
}
