// Package gateway is the place where queue, scan and poison meet: it claims
// messages, runs them through workers, and commits what was decided.
//
// loop.go is the whole way of a message, top to bottom.
package gateway

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/holds"
	"holdfast/poison"
	"holdfast/poison/evidence"
	"holdfast/poison/ledger"
	"holdfast/poison/recorder"
	"holdfast/queue"
	"holdfast/queue/history"
	"holdfast/queue/outbox"
	"holdfast/queue/quarantine"
	"holdfast/scan"
)

// Settings are the parts of the configuration that the loop needs.
type Settings struct {
	BatchMessages   int
	BatchBytes      int64
	NewestShare     float64 // 0 to 1
	Workers         int
	Poll            time.Duration
	LedgerAge       time.Duration // rows of other machines younger than this are left alone
	ShutdownTimeout time.Duration
	MinFree         uint64 // bytes below which no mail is claimed
	FreeDirs        []string
	PauseFile       string
	Policy          scan.Policy
	Monitor         bool // judge and log, always release unmodified
	DryRun          bool // judge and log, commit nothing
	Version         string
	Drain           bool // end when nothing can be claimed
	AlarmAges       []time.Duration
}

// A Runner runs messages through one fresh worker. It never fails: what went
// wrong is in the result.
type Runner interface {
	Run(ctx context.Context, job Job) Result
	// Canary returns a benign message of about that size and part count.
	Canary(size int64, parts int) (*os.File, error)
	// Version names the worker's build: strikes on different versions do not add up.
	Version() string
}

// Job is what one worker is to do.
type Job struct {
	Messages []Input
	More     bool                            // the larger memory allowance
	Stamp    func(i int, stage, part string) // where the worker is; called from any goroutine
}

// Input is one rendered message.
type Input struct {
	File *os.File
	Size int64
}

// Result is how a run ended.
type Result struct {
	Reports []*scan.Report // by message; nil where the worker did not finish it
	Stages  [][]history.Stage
	Stamped int           // the message that the worker was at, -1 if unknown
	Death   *poison.Death // nil: it ended well
	Stderr  string
	Crash   string
	Took    time.Duration
}

// Deps are the parts that a gateway works with.
type Deps struct {
	Settings Settings
	Queues   []queue.Queue
	Store    *quarantine.Store
	Ledger   *ledger.Ledger
	Recorder *recorder.Recorder
	History  *history.Writer
	Outbox   *outbox.Box // nil: nobody wants to be told
	Deliver  func()      // something in the outbox is ready
	Evidence evidence.Dir
	Holds    holds.Dir // what a person keeps in the queue
	Runner   Runner
	Report   func(Event)
	Beat     func() // called by the loop at least once per second while it is well
	Now      func() time.Time
	Progress func(done, total int)
	Canary   func(context.Context) error // takes a message of our own through the supervisor's steps
}

// A Gateway is one running loop.
type Gateway struct {
	Deps
	machine  *poison.Machine
	pickers  []*picker
	backoff  *backoff
	messages map[poison.Key]*message
	pending  []poison.Run          // main lane, in order
	isolate  []poison.Run          // isolation lane, in order
	running  map[poison.RunID]*run // by run
	canaries []poison.RunCanary    // wanted
	solo     poison.Key            // stamped when our last life ended: alone, nothing else in flight
	finished []string              // ride with the next Begin
	past     map[string]decided    // what earlier lives decided of messages that are still here, by key
	kicks    map[queue.Queue][]string
	waits    []wait
	breaker  string
	paused   bool
	lowSpace string
	stopping bool
	holds    map[string]holds.Hold // by the message's key
	holdsAt  time.Time             // change of their directory that was read
	// holdsUnread says why the holds cannot be read: no mail is taken.
	holdsUnread string
	turn        int // which queue is next
	changes     int // counts messages that were let go of
	total       int // messages seen so far, for progress
	alarmed     map[string]int
	stamped     bool // the recorder says what is being done

	results chan runResult
	listed  chan listed
	wake    chan struct{}
	ask     chan chan control.Status
	retries chan retryRequest
	settles chan settleRequest

	mu     sync.Mutex
	stamps map[poison.Key]stamp // written by runs, read by Status
	counts map[string]int64
	skips  map[string]int
}

// wait is a time that the machine asked for.
type wait struct {
	id poison.RunID
	at time.Time
}

// message is one claimed message on its way through the loop.
type message struct {
	key     poison.Key
	queue   queue.Queue
	claim   queue.Claim
	env     queue.Envelope
	render  *os.File
	size    int64
	began   time.Time // claimed
	started time.Time // given to its first worker
	stages  []history.Stage
	report  *scan.Report
	verdict scan.Verdict
	note    string
	deaths  []poison.Death
	foreign bool // its row in the ledger is another owner's
	stderr  string
	crash   string
}

func (m *message) id() queue.ID { return m.claim.Entry().ID }

// took books how long a stage of ours took, beside those of the worker.
func (m *message) took(stage string, d time.Duration) {
	m.stages = append(m.stages, history.Stage{Name: stage, Duration: d})
}

type stamp struct{ stage, part string }

type run struct {
	poison.Run
	canary *poison.RunCanary
	cancel context.CancelFunc
}

type runResult struct {
	id  poison.RunID
	res Result
}

// New makes a gateway. Recover must be called before Run.
func New(d Deps) *Gateway {
	s := d.Settings
	g := &Gateway{
		Deps: d, machine: poison.New(),
		backoff: newBackoff(1_000_000), messages: map[poison.Key]*message{},
		running: map[poison.RunID]*run{}, kicks: map[queue.Queue][]string{},
		alarmed: map[string]int{}, past: map[string]decided{},
		results: make(chan runResult, s.Workers+2), listed: make(chan listed, 1),
		wake: make(chan struct{}, 1), ask: make(chan chan control.Status), retries: make(chan retryRequest),
		settles: make(chan settleRequest),
		stamps:  map[poison.Key]stamp{}, counts: map[string]int64{}, skips: map[string]int{},
	}
	for _, q := range d.Queues {
		g.pickers = append(g.pickers, newPicker(q, g.backoff, g.listed, s.BatchMessages, s.Workers))
	}
	return g
}

// Wake makes the loop look around now. It never blocks.
func (g *Gateway) Wake() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// Status asks the loop what it is doing.
func (g *Gateway) Status(ctx context.Context) (control.Status, error) {
	answer := make(chan control.Status, 1)
	select {
	case g.ask <- answer:
	case <-ctx.Done():
		return control.Status{}, fmt.Errorf("the loop does not answer: %w", ctx.Err())
	}
	return <-answer, nil
}

type retryRequest struct {
	queue, name string
	answer      chan int
}

// Retry asks the loop to take a message again that it leaves alone; it
// returns how many it had by that name.
func (g *Gateway) Retry(ctx context.Context, queueName, name string) (int, error) {
	r := retryRequest{queueName, name, make(chan int, 1)}
	select {
	case g.retries <- r:
	case <-ctx.Done():
		return 0, fmt.Errorf("the loop does not answer: %w", ctx.Err())
	}
	return <-r.answer, nil
}

func (g *Gateway) status(now time.Time) control.Status {
	st := control.Status{Paused: g.paused, Breaker: g.breaker, Counts: map[string]int64{}, Skipped: map[string]int{}}
	if st.Breaker == "" {
		st.Breaker = g.lowSpace + g.holdsUnread
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for k, m := range g.messages {
		at := g.stamps[k]
		if at.stage == "" {
			at.stage = "waiting for a worker"
		}
		st.InFlight = append(st.InFlight, control.InFlight{
			Queue: m.id().Queue, ID: m.id().Name, Since: m.began, Stage: at.stage, Part: at.part,
		})
	}
	for _, w := range g.backoff.waiting(now) {
		st.Waiting = append(st.Waiting, control.Waiting{Queue: w.ID.Queue, ID: w.ID.Name, Until: w.Until, Tries: w.Tries, Why: w.Why})
	}
	for k, n := range g.counts {
		st.Counts[k] = n
	}
	for k, n := range g.skips {
		st.Skipped[k] = n
	}
	return st
}

// Left is what a drain could not settle.
type Left struct {
	ID  queue.ID
	Why string
}

// Summary is how a drain ended.
type Summary struct {
	Counts  map[string]int64
	Waiting int               // messages in the inbound queues at the end
	Judged  int               // of those, what a dry run has judged
	Left    []Left            // some of the others, with the reason
	Alone   map[string]string // by queue: what there is that is not ours to take
	Blocked string            // why no mail was taken at the end, if so
	Took    time.Duration
}
