// Package queue holds the types that describe messages at rest: what an MTA
// left for us, what we hold of it, and what is to be done with it.
//
// It holds types only. The implementations (queue/sendmail) know file names
// and formats; nothing else does.
package queue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// ID names one message in one queue directory. Queue ids are reused by MTAs,
// so an ID is a place, not an identity: see Identity.
type ID struct {
	Queue string // name of the queue in the configuration
	Dir   string // absolute path of the queue directory
	Name  string // the MTA's queue id
}

// String returns queue:name, the short form people see.
func (id ID) String() string { return id.Queue + ":" + id.Name }

// Key returns a string that is different for any two messages at one time.
func (id ID) Key() string { return id.Queue + "\x00" + id.Dir + "\x00" + id.Name }

// FileStat is what lstat said of a file before anything in it was read.
type FileStat struct {
	Dev, Ino uint64
	Size     int64
	Mtime    time.Time
}

// Entry is a message as seen by listing a directory: cheap, nothing read.
type Entry struct {
	ID      ID
	Arrived time.Time // modification time of the control file: orders oldest and newest
	Size    int64     // size of the control file plus the data file in bytes, 0 if not yet known
}

// Stats are the lstat values of a message's files, recorded durably before
// the first byte is read. Data is zero where a message is one file.
type Stats struct {
	Control, Data FileStat
}

// Identity tells two messages apart that had the same queue id
// (reference: queue-formats.md, G). The body's inode is part of it because
// the control file's changes whenever a queue runner rewrites it.
type Identity struct {
	ID  ID
	T   int64  // creation time from the control file, unix seconds
	Ino uint64 // inode of the data file (Postfix: of the queue file)
}

// Errors that List, Lock and Read report for one message. None of them is a
// reason to touch the message; each is wrapped with the path and what was seen.
var (
	ErrBusy       = errors.New("locked by another process")
	ErrGone       = errors.New("no longer in the queue")
	ErrIncomplete = errors.New("not complete yet") // being written, or its writer died
	ErrDamaged    = errors.New("damaged")          // will not become valid by waiting
	ErrForeign    = errors.New("not a message of ours to touch")
	ErrCollision  = errors.New("another message has this queue id on the outbound side")
	ErrChanged    = errors.New("changed by somebody else while we held it")
	// ErrUnchangeable: a plan would change the message, and there is no way to do
	// that without loss. Policy decides; it is never released as it is instead.
	ErrUnchangeable = errors.New("cannot be changed without loss")
)

// Recipient is one envelope recipient.
type Recipient struct {
	Address string // as the control file has it, without angle brackets
	Notify  string // RFC 3461 NOTIFY, "" if the client gave none
	ORcpt   string // RFC 3461 ORCPT, as stored: sendmail keeps it in xtext, Postfix decoded
	// Original is the address before aliases were expanded, "" if the MTA
	// does not keep it.
	Original string
}

// Envelope is what the control file says around the message. Every field
// comes from outside and may be hostile.
type Envelope struct {
	Sender     string // without angle brackets; "" is the null sender
	Recipients []Recipient
	EnvID, Ret string // RFC 3461
	Body8Bit   bool   // BODY=8BITMIME
	SMTPUTF8   bool   // RFC 6531
	ClientName string
	ClientAddr string // IP address literal, "" if local or unknown
	Helo       string
	Protocol   string
	Arrived    time.Time // the T line or record
	Attempts   int

	// What only some MTAs keep with a message.
	Filter     string // transport:nexthop of a content filter (Postfix)
	Redirect   string // replaces all recipients on delivery (Postfix)
	VERP       string // delimiters
	SASLUser   string // authenticated sender
	SASLSender string
}

// Claim is one message that we hold the MTA's lock on. It stays locked until
// Close, or until a commit has published it.
//
// Lock reads nothing. Read is called after the ledger knows of the claim.
type Claim interface {
	Entry() Entry
	Stats() Stats
	// Read reads the envelope and checks completeness; bounded. It returns
	// ErrIncomplete, ErrDamaged or ErrForeign wrapped with what was seen.
	Read(ctx context.Context) (Envelope, error)
	// Identity is valid after Read.
	Identity() Identity
	// Decided says that a plan for this message was decided before a crash:
	// the control file carries our marker and what it names exists. Such a
	// claim goes to Resume, not to a worker.
	Decided() bool
	// Render writes the message once (header lines as queued, blank line,
	// body; LF line ends) into a sealed memfd, or an unnamed file of the work
	// area if it is larger than the limit. No queue inode leaves the queue
	// package. The caller closes it.
	Render(ctx context.Context) (*os.File, error)
	// Close unlocks; it never changes the queue. Idempotent.
	Close() error
}

// Disposition is what happens to one group of recipients.
type Disposition string

// The dispositions.
const (
	Release    Disposition = "release"    // to the MTA's outbound side
	Quarantine Disposition = "quarantine" // to an item in the quarantine
	Drop       Disposition = "drop"       // to nobody: the operator's written word
)

// Group is the part of a plan for some of the recipients.
type Group struct {
	Recipients  []int // indexes into Envelope.Recipients; nil means all
	Disposition Disposition
	Edit        *Edit  // nil: byte for byte as it came
	Item        []byte // Quarantine: what to write as the item's verdict, JSON
}

// Edit changes a message on release.
type Edit struct {
	Header []HeaderEdit // applied in order
	Body   io.Reader    // nil: body unchanged. LF line ends. Read once
}

// HeaderOp is what a HeaderEdit does.
type HeaderOp string

// The header operations. Names compare without case. Replace changes the
// first field of that name, removes further ones, and adds the field at the
// end if there was none.
const (
	HeaderAdd     HeaderOp = "add"     // at the end of the header
	HeaderPrepend HeaderOp = "prepend" // above all others
	HeaderRemove  HeaderOp = "remove"  // all fields of that name
	HeaderReplace HeaderOp = "replace"
)

// HeaderEdit changes one field. Value may hold line breaks: they are written
// as folds, so no value can start a new control line or header field.
type HeaderEdit struct {
	Op          HeaderOp
	Name, Value string
}

// Plan is what is to be done with one claimed message: one group or more,
// together naming each recipient exactly once.
type Plan struct {
	Claim  Claim
	Groups []Group
}

// Outcome is what a commit did for one plan. Err nil means done: the message
// is where the plan says. Otherwise the message is still in the queue,
// complete and unlocked, and will be seen again, unless Err is ErrGone.
type Outcome struct {
	ID     ID
	NewIDs []string // per group: the queue id on the outbound side, or the quarantine item's name
	Err    error
}

// Listing says what a directory scan left alone.
type Listing struct {
	Messages int            // yielded
	Skipped  map[string]int // why: count, for example "hf", "Qf", "orphan df"
	Left     []Left         // the first MaxLeft of those that are counted in Skipped
}

// Left is one file that a listing leaves alone.
type Left struct {
	ID   ID
	File string // its path
	Why  string
	Do   string // what a person can do about it, "" if there is no advice
}

// MaxLeft bounds the names that a Listing holds: a directory may be full of
// what is not ours.
const MaxLeft = 1000

// Skip counts a file that is left alone, and names it.
func (l *Listing) Skip(f Left) {
	l.Skipped[f.Why]++
	if len(l.Left) < MaxLeft {
		l.Left = append(l.Left, f)
	}
}

// Queue is one configured queue of an MTA. queuetest.Run is its contract.
type Queue interface {
	Name() string
	// List yields every message of every inbound directory, in directory
	// order, holding at most a page in memory. yield returning false ends it.
	List(ctx context.Context, yield func(Entry) bool) (Listing, error)
	// Lock takes the MTA's lock without waiting and records lstat values.
	Lock(ctx context.Context, e Entry) (Claim, error)
	// Commit carries out the plans of a batch. The plans of a batch share
	// the fsyncs of each phase. Claims are closed as they are settled.
	Commit(ctx context.Context, plans []Plan) []Outcome
	// Resume finishes a decided plan after a crash.
	Resume(ctx context.Context, c Claim) Outcome
	// Sweep removes what a crash after a decision left of a message whose
	// control file is gone. The caller's journal names the decision and st.
	Sweep(ctx context.Context, id ID, st Stats) error
	// Kick asks the MTA to deliver the given messages (outbound ids) now.
	Kick(ctx context.Context, names []string) error
	// Requeue puts a quarantine item back on the outbound side, for its
	// recipients. See Item.
	Requeue(ctx context.Context, it Item) (newID string, err error)
}

// Store keeps what a plan quarantines (implemented by queue/quarantine).
// Prepare writes everything durably under a name that nobody sees; Commit
// makes it visible once the message has left the queue; both are repeatable.
type Store interface {
	// Prepare copies message (rendered as by Claim.Render) and control (the
	// MTA's own control data, holding exactly the group's recipients).
	// bodyAt is the offset of the body in message.
	Prepare(ctx context.Context, spec ItemSpec, message io.Reader) (name string, err error)
	Commit(ctx context.Context, name string) error
	Abort(ctx context.Context, name string) error
}

// ItemSpec describes a quarantine item to be written.
type ItemSpec struct {
	Identity Identity
	Group    int // index of the group in its plan: part of the item's name
	Envelope Envelope
	Control  []byte // opaque outside the queue's implementation
	BodyAt   int64  // offset of the body in the message
	Verdict  []byte // JSON
}

// Item is a quarantine item that is being released, locked by its owner.
// Requeue journals what it prepared through Journal before it publishes, so
// that repeating after a crash finds it again.
type Item interface {
	Spec() ItemSpec
	Message() (*os.File, error) // the whole message; the caller closes it
	// Journal returns what the last SetJournal stored, nil if nothing.
	Journal() []byte
	SetJournal([]byte) error // durable on return
}

// CheckPartition reports an error unless the groups name each of n
// recipients exactly once. A nil Recipients in a plan of one group is all.
func CheckPartition(groups []Group, n int) error {
	if len(groups) == 0 {
		return errors.New("plan has no group")
	}
	if len(groups) == 1 && groups[0].Recipients == nil {
		return nil
	}
	seen := make([]bool, n)
	for g, group := range groups {
		if len(group.Recipients) == 0 {
			return fmt.Errorf("group %d has no recipient", g)
		}
		for _, r := range group.Recipients {
			if r < 0 || r >= n {
				return fmt.Errorf("group %d names recipient %d of %d", g, r, n)
			}
			if seen[r] {
				return fmt.Errorf("recipient %d is in two groups", r)
			}
			seen[r] = true
		}
	}
	for r, s := range seen {
		if !s {
			return fmt.Errorf("recipient %d is in no group", r)
		}
	}
	return nil
}
