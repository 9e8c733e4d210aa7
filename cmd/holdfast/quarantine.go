package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/queue"
	"holdfast/queue/history"
	"holdfast/queue/quarantine"
	"holdfast/scan"
)

func newQuarantine(g *global) *cobra.Command {
	return group("quarantine", "Look at what was kept back, release or delete it",
		newQuarantineList(g), newQuarantineShow(g), newQuarantineRelease(g), newQuarantineDelete(g))
}

// itemRow is one item of holdfast quarantine list.
type itemRow struct {
	Item       string               `json:"item"`
	Queue      string               `json:"queue"`
	ID         string               `json:"id"`
	When       time.Time            `json:"when"`
	From       string               `json:"from"`
	Recipients []string             `json:"recipients"`
	Size       int64                `json:"size"`
	Reasons    []string             `json:"reasons"`
	Uncertain  bool                 `json:"uncertain,omitempty"`
	Released   []quarantine.Release `json:"released,omitempty"`
	Damaged    string               `json:"damaged,omitempty"`
}

func openStore(c *conf.Config) (*quarantine.Store, error) {
	if _, err := os.Stat(c.Paths.Quarantine); errors.Is(err, fs.ErrNotExist) {
		return nil, failWith(exitNotFound, "there is no quarantine yet at %s: Holdfast has not run here", c.Paths.Quarantine)
	}
	return quarantine.New(c.Paths.Quarantine, nil)
}

func rowOf(m quarantine.Meta, err error) itemRow {
	r := itemRow{
		Item: m.Name, Queue: m.Identity.ID.Queue, ID: m.Identity.ID.Name, When: m.When, From: m.Envelope.Sender,
		Recipients: []string{}, Size: m.Size, Reasons: []string{}, Uncertain: m.Uncertain,
	}
	if err != nil {
		r.Damaged = err.Error()
		return r
	}
	for _, to := range m.Envelope.Recipients {
		r.Recipients = append(r.Recipients, to.Address)
	}
	var v scan.Verdict
	if json.Unmarshal(m.Verdict, &v) == nil {
		for _, why := range v.Reasons {
			r.Reasons = append(r.Reasons, why.Text)
		}
	}
	if r.Released, err = m.Releases(); err != nil {
		r.Damaged = err.Error()
	}
	return r
}

func newQuarantineList(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List what was kept back, newest first", Long: "List what was kept back, newest first.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.current(cmd.Context())
			if err != nil {
				return err
			}
			s, err := openStore(c)
			if err != nil {
				return err
			}
			table := itemTable()
			var werr error
			err = s.List(cmd.Context(), func(m quarantine.Meta, ierr error) bool {
				r := rowOf(m, ierr)
				if g.json {
					werr = safe.WriteJSON(g.out, r)
					return werr == nil
				}
				itemLine(table, r)
				return true
			})
			if err = errors.Join(err, werr); err != nil || g.json {
				return err
			}
			return table.Write(g.out)
		},
	}
}

// findItem maps what the quarantine says to exit codes.
func findItem(ctx context.Context, s *quarantine.Store, what string) (quarantine.Meta, error) {
	m, err := s.Find(ctx, what)
	if errors.Is(err, quarantine.ErrNotFound) {
		return m, &exitError{code: exitNotFound, err: err}
	}
	return m, err
}

func newQuarantineShow(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "show ITEM", Short: "Show an item: why it is here, envelope and header",
		Long: "Show an item: why it is here, envelope and header, escaped for the terminal. ITEM\nis its name, the beginning of it, or the queue id or Message-ID of the message.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.current(cmd.Context())
			if err != nil {
				return err
			}
			s, err := openStore(c)
			if err != nil {
				return err
			}
			m, err := findItem(cmd.Context(), s, args[0])
			if err != nil {
				return err
			}
			return showItem(g, m)
		},
	}
}

// itemShown is an item as JSON.
type itemShown struct {
	itemRow
	Dir      string       `json:"dir"`
	Envelope envelopeView `json:"envelope"`
	Header   []string     `json:"header"`
}

func showItem(g *global, m quarantine.Meta) error {
	r := rowOf(m, nil)
	f, err := os.Open(m.Dir + "/message")
	if err != nil {
		return fmt.Errorf("read item %s: %w", m.Name, err)
	}
	defer f.Close()
	header, err := headerOf(m.Name, f)
	if err != nil {
		return err
	}
	if g.json {
		return safe.WriteJSON(g.out, itemShown{r, m.Dir, viewOf(m.Envelope), headerLines(header)})
	}
	fmt.Fprintf(g.out, "item        %s\nmessage     %s/message\nsince       %s\n", r.Item, safe.Text(m.Dir), r.When.Local().Format(time.DateTime))
	for _, why := range r.Reasons {
		g.line("why", "%s", why)
	}
	if r.Uncertain {
		g.line("uncertain", "its message was gone when a crash was recovered: perhaps somebody else took it")
	}
	for _, rel := range r.Released {
		g.line("released", "as %s by %s, %s", rel.NewID, rel.By, rel.When.Local().Format(time.DateTime))
	}
	printMessage(g, m.Identity.ID.Name, m.Envelope, header)
	return nil
}

func newQuarantineRelease(g *global) *cobra.Command {
	var again bool
	c := &cobra.Command{
		Use: "release ITEM…", Short: "Hand items back to the MTA, for exactly their recipients",
		Long: "Hand items back to the MTA, unscanned, for exactly their recipients, and have them\ndelivered. Releasing one a second time does nothing without --again.\n\n" + exitHelp,
		Args: arguments(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return eachItem(cmd.Context(), g, args, func(c *conf.Config, s *quarantine.Store, it *quarantine.Item) error {
				return release(cmd.Context(), g, c, s, it, again)
			})
		},
	}
	c.Flags().BoolVar(&again, "again", false, "also what was released before, or may have been taken by somebody else")
	return c
}

// eachItem opens each item in turn; one that fails does not stop the others.
func eachItem(ctx context.Context, g *global, names []string, do func(*conf.Config, *quarantine.Store, *quarantine.Item) error) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	s, err := openStore(c)
	if err != nil {
		return err
	}
	one := func(name string) error {
		m, err := findItem(ctx, s, name)
		if err != nil {
			return err
		}
		it, err := s.Open(m)
		if err != nil {
			return err
		}
		defer it.Close()
		return do(c, s, it)
	}
	failed := 0
	for _, name := range names {
		if err := one(name); err != nil {
			if len(names) == 1 {
				return err
			}
			failed++
			fmt.Fprintf(g.err, "holdfast: %s\n", safe.Text(err.Error()))
		}
	}
	if failed > 0 {
		return failWith(exitPartly, "%d of %d items failed", failed, len(names))
	}
	return nil
}

func release(ctx context.Context, g *global, c *conf.Config, s *quarantine.Store, it *quarantine.Item, again bool) error {
	before, err := it.Releases()
	if err != nil {
		return err
	}
	if len(before) > 0 && !again && it.Journal() == nil {
		last := before[len(before)-1]
		return done(g, released{it.Name, last, true}, "%s: already released as %s, by %s on %s; nothing done (--again repeats it)",
			it.Name, last.NewID, last.By, last.When.Local().Format(time.DateTime))
	}
	qs, err := openQueues(ctx, c, nil, s)
	if err != nil {
		return err
	}
	var q queue.Queue
	for _, x := range qs {
		if x.Name() == it.Identity.ID.Queue {
			q = x
		}
	}
	if q == nil {
		return fmt.Errorf("%s came from queue %s, which the configuration does not have", it.Name, safe.Text(it.Identity.ID.Queue))
	}
	r, err := it.Release(ctx, q, who(), again)
	if err != nil {
		return err
	}
	note(ctx, g, c, it.Meta, history.Record{Verdict: history.Released, NewIDs: []string{r.NewID}, By: r.By, Time: r.When})
	when := "the MTA is told to deliver it"
	if err := q.Kick(ctx, []string{r.NewID}); err != nil {
		fmt.Fprintf(g.err, "holdfast: %s\n", safe.Text(err.Error()))
		when = "delivered by the MTA's next queue run"
	} else if !kicks(c, q.Name()) {
		when = "delivered by the MTA's next queue run (kick: none)"
	}
	return done(g, released{it.Name, r, false}, "%s is released as %s, by %s, %s; %s", it.Name, r.NewID, r.By, r.When.Local().Format(time.DateTime), when)
}

// released is what a release says as JSON.
type released struct {
	Item string `json:"item"`
	quarantine.Release
	Already bool `json:"already"`
}

// kicks says that the MTA is told of what is released into a queue.
func kicks(c *conf.Config, name string) bool {
	for i := range c.Queues {
		if q := &c.Queues[i]; q.Name == name {
			return q.Type == conf.Postfix && q.Kick.Auto || len(kickCommand(q.Kick)) > 0
		}
	}
	return false
}

// note writes into the history what a person did with an item. What was done
// stays done if that fails.
func note(ctx context.Context, g *global, c *conf.Config, m quarantine.Meta, rec history.Record) {
	rec.Item, rec.Queue, rec.Dir, rec.ID = m.Name, m.Identity.ID.Queue, m.Identity.ID.Dir, m.Identity.ID.Name
	rec.T, rec.From, rec.Size, rec.ClientAddr = m.Identity.T, m.Envelope.Sender, m.Size, m.Envelope.ClientAddr
	rec.Recipients = len(m.Envelope.Recipients)
	for i := range min(rec.Recipients, history.MaxAddresses) {
		rec.Addresses = append(rec.Addresses, m.Envelope.Recipients[i].Address)
	}
	w := &history.Writer{Dir: c.Paths.History}
	if err := errors.Join(w.Append(ctx, []history.Record{rec}), w.Close()); err != nil {
		fmt.Fprintf(g.err, "holdfast: done, but not noted in the history: %s\n", safe.Text(err.Error()))
	}
}

func newQuarantineDelete(g *global) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "delete ITEM…", Short: "Delete items for good",
		Long: "Delete items for good. Shows them and asks first, unless --yes is given.\n\n" + exitHelp,
		Args: arguments(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runDelete(cmd.Context(), g, args, yes) },
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func runDelete(ctx context.Context, g *global, names []string, yes bool) error {
	if !yes {
		items, err := itemsToDelete(ctx, g, names)
		if err != nil {
			return err
		}
		if err := g.confirm(fmt.Sprintf("delete %d for good?", len(items)), "nothing was deleted"); err != nil {
			return err
		}
		names = items
	}
	return eachItem(ctx, g, names, func(c *conf.Config, _ *quarantine.Store, it *quarantine.Item) error {
		if err := it.Delete(); err != nil {
			return err
		}
		note(ctx, g, c, it.Meta, history.Record{Verdict: history.Deleted, By: who(), Time: time.Now().UTC()})
		return done(g, map[string]string{"item": it.Name, "done": "deleted"}, "%s is deleted", it.Name)
	})
}

// itemsToDelete resolves names, and shows what would go.
func itemsToDelete(ctx context.Context, g *global, names []string) ([]string, error) {
	c, err := g.current(ctx)
	if err != nil {
		return nil, err
	}
	s, err := openStore(c)
	if err != nil {
		return nil, err
	}
	table := itemTable()
	var items []string
	for _, name := range names {
		m, err := findItem(ctx, s, name)
		if err != nil {
			return nil, err
		}
		if !contains(items, m.Name) {
			items = append(items, m.Name)
			itemLine(table, rowOf(m, nil))
		}
	}
	return items, table.Write(g.err)
}

func itemTable() *safe.Table {
	return safe.NewTable("ITEM", "ID", "WHEN", "FROM", "RCPTS", "SIZE", "WHY")
}

func itemLine(table *safe.Table, r itemRow) {
	why := strings.Join(r.Reasons, "; ")
	switch {
	case r.Damaged != "":
		why = "damaged: " + r.Damaged
	case len(r.Released) > 0:
		why = "released as " + r.Released[len(r.Released)-1].NewID + "; " + why
	case r.Uncertain:
		why = "uncertain; " + why
	}
	table.Row(r.Item, r.ID, r.When.Local().Format(time.DateTime), "<"+r.From+">", fmt.Sprint(len(r.Recipients)), fmt.Sprint(r.Size), why)
}

// confirm asks the person at the terminal.
func (g *global) confirm(question, refused string) error {
	f, ok := g.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return failWith(exitUsage, "%s; without a terminal to ask on, this needs --yes", refused)
	}
	fmt.Fprintf(g.err, "%s Type yes: ", question)
	var answer string
	if _, err := fmt.Fscanln(g.in, &answer); err != nil || answer != "yes" {
		return failWith(exitFailed, "%s", refused)
	}
	return nil
}
