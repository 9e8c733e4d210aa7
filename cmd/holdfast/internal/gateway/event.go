package gateway

import (
	"errors"

	"holdfast/queue"
	"holdfast/queue/history"
)

// Event is one thing that happened. Exactly one place logs it.
type Event struct {
	Name   string
	ID     queue.ID // zero if it is not about one message
	Err    error
	Quiet  bool            // normal in passing: for debugging only
	Record *history.Record // EventMessage only
	Fields Fields
}

// Fields are further facts of an event.
type Fields map[string]any

// The events.
const (
	EventMessage       = "message"     // one message is settled; Record says all
	EventSkipped       = "skipped"     // one message is left alone for now
	EventGone          = "gone"        // somebody else took a message that we held
	EventLeftAlone     = "left alone"  // what listings do not touch, when the numbers change
	EventDeath         = "death"       // a worker died or failed
	EventConvicted     = "convicted"   // a message kills what parses it
	EventUnscannable   = "unscannable" // a message cannot be scanned
	EventUnexplained   = "unexplained" // a group died, and every member passed alone
	EventBreaker       = "breaker"     // mail is no longer, or again, taken
	EventPause         = "pause"
	EventAlarm         = "alarm" // mail waits for too long
	EventAside         = "aside" // a message that kills the supervisor is set aside
	EventCrash         = "crash" // the supervisor's previous life ended badly
	EventSwept         = "swept" // what a crash had left was tidied up
	EventRetry         = "retry" // a person gave a message another chance
	EventStopping      = "stopping"
	EventStarted       = "started"
	EventReloading     = "reloading" // what is in work is finished for a new configuration
	EventReloaded      = "reloaded"
	EventReloadRefused = "reload refused" // the configuration cannot work: the old one stays
	EventReloadFailed  = "reload failed"  // it looked as if it could, and could not be opened
	EventProblem       = "problem"        // something of ours failed; mail is safe
)

// ErrReload is the cause of a stop that is none: the daemon goes on with a new
// configuration.
var ErrReload = errors.New("the configuration is read again")

func problem(what string, err error) Event {
	return Event{Name: EventProblem, Err: err, Fields: Fields{"what": what}}
}
