// Package poison finds the one item that kills what works on it. It knows
// items, runs and deaths; what an item is, its caller knows.
//
// The Machine is pure: events in, actions out; no clock, disk or goroutine.
package poison

import (
	"slices"
	"time"
)

// Key names an item. It is opaque here.
type Key string

// RunID numbers what the machine asks for.
type RunID int64

// Lane says where a run belongs.
type Lane int

// The lanes: suspects never wait for the main one, nor it for them.
const (
	Main Lane = iota
	Isolation
)

// Origin says what was known of items when they arrived.
type Origin int

// The origins (CUSTODY 5, DESIGN 4).
const (
	Fresh          Origin = iota
	DeadHere              // in work when our last life ended: suspects, in groups of four or fewer, no strike
	AloneFirst            // another machine's, abandoned: alone
	SupervisorDied        // stamped when our last life ended: alone, with nothing else in flight
)

// Event is what happened.
type Event interface{ event() }

// Arrived brings items that are to be run.
type Arrived struct {
	Keys []Key
	From Origin
}

// Ended is the end of a run. Items that neither passed nor are stamped were
// not reached.
type Ended struct {
	Run    RunID
	Passed []Key
	Stamp  Key    // what it was working on, "" if unknown
	Death  *Death // nil: it ended well
}

// CanaryEnded is the end of a canary's run.
type CanaryEnded struct {
	Run     RunID
	Passed  bool
	Death   *Death
	Version string // of the component that ran it
}

// Waited says that a Wait is over.
type Waited struct{ ID RunID }

// Gone says that an item vanished.
type Gone struct{ Key Key }

func (Arrived) event()     {}
func (Ended) event()       {}
func (CanaryEnded) event() {}
func (Waited) event()      {}
func (Gone) event()        {}

// Action is what is to be done.
type Action interface{ action() }

// Run asks for a run of items in one fresh worker.
type Run struct {
	ID        RunID
	Keys      []Key
	Lane      Lane
	Exclusive bool // with nothing else in flight
	More      bool // with the larger memory allowance
}

// RunCanary asks for a run of a benign item of the size of Like.
type RunCanary struct {
	ID   RunID
	Like Key // "" for any
}

// Convict says that an item is guilty.
type Convict struct {
	Key    Key
	Deaths []Death
}

// Unscannable says that an item cannot be worked on, without guilt.
type Unscannable struct {
	Key    Key
	Deaths []Death
}

// Unexplained says that all items of a run that died passed later.
type Unexplained struct {
	Keys   []Key
	Deaths []Death
}

// Breaker says that no new item should arrive, or that they may again.
type Breaker struct {
	Open bool
	Why  string
}

// Wait asks for a Waited event after a time.
type Wait struct {
	ID  RunID
	For time.Duration
}

func (Run) action()         {}
func (RunCanary) action()   {}
func (Convict) action()     {}
func (Unscannable) action() {}
func (Unexplained) action() {}
func (Breaker) action()     {}
func (Wait) action()        {}

// The rules of guilt (CUSTODY 6).
const (
	strikesSame   = 2 // solo deaths with one signature
	strikesMixed  = 3
	maxFailures   = 3 // answered failures alone
	maxResource   = 5 // solo ends of class resource
	singlesUpTo   = 4
	deadHereGroup = 4
	thirdRunDelay = 30 * time.Second
	firstProbe    = 5 * time.Second
	lastProbe     = 5 * time.Minute
)

// Machine decides what is run with what, and who is guilty.
type Machine struct {
	nextID   RunID
	items    map[Key]*item
	runs     map[RunID]*active
	canaries map[RunID]*item // nil is the breaker's probe
	waits    map[RunID]*item
	open     bool // the breaker
	probe    time.Duration
	blocked  []*active // wanted while the breaker is open
	retry    []*item   // suspects whose procedure starts again when it closes
	groups   []*group
	out      []Action
}

// item is one unsettled item.
type item struct {
	key      Key
	deaths   []Death // counted ones, each between passing canaries
	last     *Death  // the latest, not yet confirmed by a canary
	version  string  // of the component, at the last passing canary
	failures int
	resource int
	more     bool
	all      []Death
}

type active struct {
	Run
	alone bool
	items []*item // who the keys were: one may go and come back meanwhile
}

// is says that an item is still the one that has its key.
func (m *Machine) is(it *item) bool { return it != nil && m.items[it.key] == it }

// group is what died together, until all of it is settled.
type group struct {
	keys, left []Key
	deaths     []Death
	guilty     bool
}

// New makes a machine.
func New() *Machine {
	return &Machine{items: map[Key]*item{}, runs: map[RunID]*active{}, canaries: map[RunID]*item{}, waits: map[RunID]*item{}, probe: firstProbe}
}

// Step takes one event and returns what is to be done. An event about
// something that the machine does not know changes nothing.
func (m *Machine) Step(e Event) []Action {
	m.out = nil
	switch e := e.(type) {
	case Arrived:
		m.arrived(e)
	case Ended:
		m.ended(e)
	case CanaryEnded:
		m.canaryEnded(e)
	case Waited:
		m.waited(e)
	case Gone:
		m.settle(e.Key, false)
	}
	return m.out
}

// Unsettled is how many items are running or waiting.
func (m *Machine) Unsettled() int { return len(m.items) }

func (m *Machine) id() RunID { m.nextID++; return m.nextID }

func (m *Machine) do(a Action) { m.out = append(m.out, a) }

func (m *Machine) arrived(e Arrived) {
	var keys []Key
	for _, k := range e.Keys {
		if m.items[k] == nil && k != "" {
			m.items[k] = &item{key: k}
			keys = append(keys, k)
		}
	}
	switch e.From {
	case DeadHere:
		for part := range slices.Chunk(keys, deadHereGroup) {
			m.run(part, Main, false, false)
		}
	case AloneFirst, SupervisorDied:
		for _, k := range keys {
			m.run([]Key{k}, Isolation, e.From == SupervisorDied, false)
		}
	default:
		if len(keys) > 0 {
			m.run(keys, Main, false, false)
		}
	}
}

func (m *Machine) run(keys []Key, lane Lane, exclusive, more bool) {
	r := Run{ID: m.id(), Keys: slices.Clone(keys), Lane: lane, Exclusive: exclusive, More: more}
	a := &active{Run: r, alone: len(keys) == 1}
	for _, k := range keys {
		a.items = append(a.items, m.items[k])
	}
	m.start(a)
}

func (m *Machine) start(a *active) {
	if m.open {
		m.blocked = append(m.blocked, a)
		return
	}
	m.runs[a.ID] = a
	m.do(a.Run)
}

// ended: passes are final. What a death means depends on whether anybody
// else was in the process.
func (m *Machine) ended(e Ended) {
	r := m.runs[e.Run]
	if r == nil {
		return
	}
	delete(m.runs, e.Run)
	var left []Key
	for i, k := range r.Keys {
		if !m.is(r.items[i]) {
			continue
		}
		if slices.Contains(e.Passed, k) {
			m.settle(k, true)
		} else {
			left = append(left, k)
		}
	}
	death := e.Death
	if death == nil {
		if len(left) == 0 {
			return
		}
		death = &Death{Class: ClassFailure, Signature: "ended well without finishing"}
	}
	switch {
	case len(left) == 0: // it died after its work: nobody is accused of that
		m.do(Unexplained{Keys: r.Keys, Deaths: []Death{*death}})
	case r.alone:
		m.soloDeath(left[0], *death)
	default:
		m.groupDeath(left, e.Stamp, *death)
	}
}

// groupDeath: the stamped one alone, the rest again at once. Without a stamp
// the group is split. It changes suspicion, never guilt.
func (m *Machine) groupDeath(left []Key, stamp Key, d Death) {
	m.groups = append(m.groups, &group{keys: slices.Clone(left), left: slices.Clone(left), deaths: []Death{d}})
	if i := slices.Index(left, stamp); i >= 0 {
		rest := slices.Delete(slices.Clone(left), i, i+1)
		m.suspect(stamp)
		if len(rest) > 0 {
			m.run(rest, Main, false, false)
		}
		return
	}
	if len(left) <= singlesUpTo {
		for _, k := range left {
			m.run([]Key{k}, Main, false, false)
		}
		return
	}
	half := len(left) / 2
	m.run(left[:half], Main, false, false)
	m.run(left[half:], Main, false, false)
}

// suspect begins the procedure of an item alone: canary, run, canary, run,
// canary; each death counts only between two canaries that pass.
func (m *Machine) suspect(k Key) { m.canary(m.items[k]) }

func (m *Machine) canary(it *item) {
	if m.open {
		m.retry = append(m.retry, it)
		return
	}
	id := m.id()
	m.canaries[id] = it
	m.do(RunCanary{ID: id, Like: it.key})
}

// soloDeath: an item ended its worker with nobody else in it. Whether that
// counts, the canary after it decides.
func (m *Machine) soloDeath(k Key, d Death) {
	it := m.items[k]
	it.last = &d
	it.all = append(it.all, d)
	m.canary(it)
}

func (m *Machine) canaryEnded(e CanaryEnded) {
	it, ok := m.canaries[e.Run]
	if !ok {
		return
	}
	delete(m.canaries, e.Run)
	if it == nil {
		m.probed(e)
		return
	}
	if !m.is(it) {
		return
	}
	if !e.Passed {
		it.last = nil // what died while the canary dies too proves nothing
		it.version = ""
		m.retry = append(m.retry, it)
		why := "a known good message does not pass"
		if e.Death != nil {
			why += ": " + e.Death.String()
		}
		m.breaker(why)
		return
	}
	if it.last != nil {
		d, sandwiched := *it.last, it.version == e.Version
		it.last, it.version = nil, e.Version
		m.judge(it, d, sandwiched)
		return
	}
	it.version = e.Version
	m.run([]Key{it.key}, Isolation, false, it.more)
}

// judge books a solo death between canaries.
func (m *Machine) judge(it *item, d Death, sandwiched bool) {
	switch {
	case d.Class == ClassResource:
		if it.resource++; it.resource >= maxResource {
			m.unscannable(it)
			return
		}
	case !d.Class.strike():
		if it.failures++; it.failures >= maxFailures {
			m.unscannable(it)
			return
		}
	case d.Class == ClassMemory && !it.more:
		it.more = true // one more try with a larger allowance
	case sandwiched:
		it.deaths = append(it.deaths, d)
	default: // no canary before it, or another version: this canary is the first of a sandwich
	}
	same := 0
	for _, x := range it.deaths {
		if n := count(it.deaths, x.Signature); n > same {
			same = n
		}
	}
	switch {
	case same >= strikesSame || len(it.deaths) >= strikesMixed:
		m.do(Convict{Key: it.key, Deaths: it.deaths})
		m.guilty(it.key)
		m.settle(it.key, false)
	case len(it.deaths) == strikesSame: // two different signatures: a third run, later
		id := m.id()
		m.waits[id] = it
		m.do(Wait{ID: id, For: thirdRunDelay})
	default:
		m.run([]Key{it.key}, Isolation, false, it.more)
	}
}

func count(deaths []Death, signature string) (n int) {
	for _, d := range deaths {
		if d.Signature == signature {
			n++
		}
	}
	return n
}

func (m *Machine) unscannable(it *item) {
	m.do(Unscannable{Key: it.key, Deaths: it.all})
	m.guilty(it.key)
	m.settle(it.key, false)
}

func (m *Machine) waited(e Waited) {
	it, ok := m.waits[e.ID]
	if !ok {
		return
	}
	delete(m.waits, e.ID)
	switch {
	case it == nil:
		id := m.id()
		m.canaries[id] = nil
		m.do(RunCanary{ID: id})
	case m.is(it):
		m.canary(it) // time has passed: the sandwich needs a fresh canary
	}
}

// breaker opens it: the environment is at fault, not an item.
func (m *Machine) breaker(why string) {
	if m.open {
		return
	}
	m.open = true
	m.do(Breaker{Open: true, Why: why})
	m.waitProbe()
}

func (m *Machine) waitProbe() {
	id := m.id()
	m.waits[id] = nil
	m.do(Wait{ID: id, For: m.probe})
	m.probe = min(2*m.probe, lastProbe)
}

// probed: a canary passes again, and everything that waited is run.
func (m *Machine) probed(e CanaryEnded) {
	if !e.Passed {
		m.waitProbe()
		return
	}
	m.open, m.probe = false, firstProbe
	m.do(Breaker{Open: false, Why: "a known good message passes again"})
	blocked, retry := m.blocked, m.retry
	m.blocked, m.retry = nil, nil
	for _, a := range blocked {
		a.items = slices.DeleteFunc(a.items, func(it *item) bool { return !m.is(it) })
		a.Keys = nil
		for _, it := range a.items {
			a.Keys = append(a.Keys, it.key)
		}
		if a.alone = len(a.Keys) == 1; len(a.Keys) > 0 {
			m.start(a)
		}
	}
	for _, it := range retry {
		if m.is(it) {
			m.canary(it)
		}
	}
}

func (m *Machine) guilty(k Key) {
	for _, g := range m.groups {
		if slices.Contains(g.keys, k) {
			g.guilty = true
		}
	}
}

// settle ends an item. When the last of a group that died has passed and
// nobody was found guilty, the death is unexplained.
func (m *Machine) settle(k Key, passed bool) {
	if m.items[k] == nil {
		return
	}
	delete(m.items, k)
	rest := m.groups[:0]
	for _, g := range m.groups {
		i := slices.Index(g.left, k)
		if i >= 0 {
			g.left = slices.Delete(g.left, i, i+1)
			g.guilty = g.guilty || !passed
		}
		switch {
		case len(g.left) > 0:
			rest = append(rest, g)
		case !g.guilty:
			m.do(Unexplained{Keys: g.keys, Deaths: g.deaths})
		}
	}
	m.groups = rest
}
