package gateway

import (
	"errors"

	"holdfast/queue"
	"holdfast/queue/history"
)

// Event is one thing that happened. Exactly one place logs it. Its name is
// what a postmaster reads first: words for what it means for the mail.
type Event struct {
	Name    string
	ID      queue.ID // zero if it is not about one message
	Err     error
	Quiet   bool            // normal in passing: for debugging only
	Trouble bool            // something of ours failed; mail is safe
	Record  *history.Record // EventMessage only
	Fields  Fields
}

// Fields are further facts of an event.
type Fields map[string]any

// The events. Those of something of ours that failed are named where they
// are reported: see problem.
const (
	EventMessage       = "message"                       // one message is settled; Record says all
	EventSkipped       = "left for now"                  // one message could not be taken, and is tried again
	EventCommitFailed  = "commit failed"                 // it was judged, and is still in the inbound queue
	EventGone          = "taken by somebody else"        // a message that we held has left the queue without us
	EventLeftAlone     = "not ours to take"              // what listings pass over, when the numbers change
	EventDeath         = "a worker died"                 // or failed
	EventConvicted     = "kills what parses it"          // one message
	EventUnscannable   = "cannot be scanned"             // one message
	EventUnexplained   = "deaths without an explanation" // a group died, and every member passed alone
	EventClosed        = "mail is no longer taken"
	EventOpened        = "mail is taken again"
	EventPaused        = "paused"
	EventResumed       = "resumed"
	EventAlarm         = "mail waits for too long"
	EventAside         = "set aside"           // a message that kills the supervisor
	EventCrash         = "the supervisor died" // in its previous life
	EventSwept         = "tidied up"           // what a crash had left
	EventRetry         = "to be taken again"   // a person gave a message another chance
	EventStopping      = "stopping"
	EventStarted       = "started"
	EventReloading     = "reloading" // what is in work is finished for a new configuration
	EventReloaded      = "reloaded"
	EventReloadRefused = "reload refused" // the configuration cannot work: the old one stays
	EventReloadFailed  = "reload failed"  // it looked as if it could, and could not be opened
	EventPurged        = "purged"
	EventProblem       = "trouble" // of a queue, which says what in its fields
)

// ErrReload is the cause of a stop that is none: the daemon goes on with a new
// configuration.
var ErrReload = errors.New("the configuration is read again")

// problem is the event of something of ours that failed. What says so.
func problem(what string, err error) Event { return Event{Name: what, Err: err, Trouble: true} }
