package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"holdfast/cmd/holdfast/internal/gateway"
	"holdfast/conf"
	"holdfast/poison/ledger"
	"holdfast/queue"
	"holdfast/queue/postfix"
	"holdfast/queue/quarantine"
	"holdfast/queue/sendmail"
)

// mtaQueue is a queue that one daemon works on for as long as it lives.
type mtaQueue interface {
	queue.Queue
	HoldDirs() error
	// Passable says why no mail could get through, if its directories show it.
	Passable() error
	Close()
}

// queueParts are what queues need of the rest of the program.
type queueParts struct {
	store  *quarantine.Store
	token  string         // this installation's
	notes  *ledger.Ledger // nil: nothing is remembered
	report func(gateway.Event)
}

// lookingOnly is for commands that decide nothing: a queue without a journal
// and with nobody's token.
var lookingOnly = queueParts{token: "0000000000000000", report: func(gateway.Event) {}}

// makeQueues makes the configured queues.
func makeQueues(ctx context.Context, c *conf.Config, p queueParts) ([]mtaQueue, error) {
	var out []mtaQueue
	for i := range c.Queues {
		q := &c.Queues[i]
		made, err := makeSendmail(c, q, p)
		if q.Type == conf.Postfix {
			made, err = makePostfix(ctx, c, q, p)
		}
		if err != nil {
			return nil, fmt.Errorf("queue %s: %w", q.Name, err)
		}
		out = append(out, made)
	}
	return out, nil
}

// store keeps a nil store from becoming an interface that is not nil.
func (p queueParts) keeper() queue.Store {
	if p.store == nil {
		return nil
	}
	return p.store
}

func (p queueParts) tell(id queue.ID, what string, err error) {
	p.report(gateway.Event{Name: gateway.EventProblem, ID: id, Err: err, Fields: gateway.Fields{"what": what}})
}

func makeSendmail(c *conf.Config, q *conf.Queue, p queueParts) (mtaQueue, error) {
	return sendmail.New(sendmail.Config{
		Name: q.Name, In: q.In, Out: q.Out, Work: c.Paths.Work, Token: p.token, RenderInMemory: int64(c.Limits.RenderInMemory),
		MaxControl: int64(c.Limits.ControlFile), MaxRecipients: c.Limits.Recipients, Lock: string(q.Lock),
		Kick: kickCommand(q.Kick), Store: p.keeper(), Report: func(e sendmail.Event) { p.tell(e.ID, e.What, e.Err) },
	})
}

// kickCommand is the configured command, or the MTA that Debian's package
// installs, in its daemon's mode.
func kickCommand(k conf.Command) []string {
	if !k.Auto {
		return k.Words
	}
	for _, path := range []string{"/usr/sbin/sendmail-mta", "/usr/lib/sm.bin/sendmail"} {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return []string{path, "-Am"}
		}
	}
	return nil
}

// askTime bounds the question for Postfix's own parameters.
const askTime = 10 * time.Second

// makePostfix asks Postfix for what it knows better. Without an answer its
// defaults are taken, and nothing is written that would need to know.
func makePostfix(ctx context.Context, c *conf.Config, q *conf.Queue, p queueParts) (mtaQueue, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	ask, err := postfix.Ask(ctx, q.Config)
	if err != nil {
		p.tell(queue.ID{Queue: q.Name}, "Postfix's defaults are taken", err)
		ask = postfix.Parameters{Dir: q.Dir, Hashed: map[string]int{"deferred": 1, "defer": 1}}
	}
	if ask.Dir != q.Dir {
		return nil, fmt.Errorf("dir is %s, and Postfix (config: %s) has its queues in %s", q.Dir, q.Config, ask.Dir)
	}
	pc := postfix.Config{
		Name: q.Name, Dir: q.Dir, Hashed: ask.Hashed, Work: c.Paths.Work, Token: p.token, RenderInMemory: int64(c.Limits.RenderInMemory),
		MaxControl: int64(c.Limits.ControlFile), MaxRecipients: c.Limits.Recipients, PostfixConfig: q.Config,
		Listener: q.Reinject, RecipientLimit: ask.RecipientLimit, Store: p.keeper(), Journal: noJournal{},
		Report: func(e postfix.Event) { p.tell(e.ID, e.What, e.Err) },
	}
	if p.notes != nil {
		pc.Journal = p.notes.Notes(q.Name)
	}
	if q.Release == conf.ReleasePostsuper {
		pc.Release = postfix.ByPostsuper
	}
	switch {
	case q.Modify == conf.ModifyReinject:
		pc.Modify = postfix.ByReinjection
	case q.Modify == conf.ModifyRewrite && ask.Known():
		pc.Modify = postfix.ByRewriting
	case q.Modify == conf.ModifyRewrite:
		p.tell(queue.ID{Queue: q.Name}, "modify: rewrite is refused, and mail that must be changed follows policy.unchangeable", fmt.Errorf("the queue files of Postfix %q are not known", ask.Version))
	}
	if !q.Kick.Auto {
		pc.Trigger = append([]string{}, q.Kick.Words...)
	}
	if q.MilterHeld == conf.MilterLeave {
		pc.HeldLog = postfix.NewHeldLog(q.MailLog)
	}
	return postfix.New(pc)
}

// noJournal remembers nothing, and so lets nothing be decided.
type noJournal struct{}

func (noJournal) Save(rows map[string][]byte) error {
	if len(rows) == 0 {
		return nil
	}
	return errors.New("this command has no journal")
}

func (noJournal) Rows() (map[string][]byte, error) { return nil, nil }
