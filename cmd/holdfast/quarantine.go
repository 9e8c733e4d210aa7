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

	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/queue"
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
		Use: "list", Short: "List what was kept back, newest day first", Long: "List what was kept back, newest day first.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			s, err := openStore(c)
			if err != nil {
				return err
			}
			table := safe.NewTable("ITEM", "ID", "WHEN", "FROM", "RCPTS", "SIZE", "WHY")
			var werr error
			err = s.List(cmd.Context(), func(m quarantine.Meta, ierr error) bool {
				r := rowOf(m, ierr)
				if g.json {
					werr = safe.WriteJSON(g.out, r)
					return werr == nil
				}
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
		Long: "Show an item: why it is here, envelope and header, escaped for the terminal. ITEM\nis its name, the beginning of it, or the queue id that the message had.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
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
			r := rowOf(m, nil)
			if g.json {
				return safe.WriteJSON(g.out, r)
			}
			fmt.Fprintf(g.out, "item        %s\nmessage     %s/message\nsince       %s\n", r.Item, safe.Text(m.Dir), r.When.Local().Format(time.DateTime))
			for _, why := range r.Reasons {
				fmt.Fprintf(g.out, "why         %s\n", safe.Text(why))
			}
			if r.Uncertain {
				fmt.Fprintln(g.out, "uncertain   its message was gone when a crash was recovered: perhaps somebody else took it")
			}
			for _, rel := range r.Released {
				fmt.Fprintf(g.out, "released    as %s by %s, %s\n", safe.Text(rel.NewID), safe.Text(rel.By), rel.When.Local().Format(time.DateTime))
			}
			f, err := os.Open(m.Dir + "/message")
			if err != nil {
				return fmt.Errorf("read item %s: %w", m.Name, err)
			}
			defer f.Close()
			return showMessage(g, m.Identity.ID.Name, m.Envelope, f)
		},
	}
}

func newQuarantineRelease(g *global) *cobra.Command {
	var again bool
	c := &cobra.Command{
		Use: "release ITEM…", Short: "Hand items back to the MTA, for exactly their recipients",
		Long: "Hand items back to the MTA, unscanned, for exactly their recipients. Releasing one a\nsecond time does nothing without --again.\n\n" + exitHelp,
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
	c, err := g.load()
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
	if err := q.Kick(ctx, []string{r.NewID}); err != nil {
		fmt.Fprintf(g.err, "holdfast: %s\n", safe.Text(err.Error()))
	}
	if g.json {
		return safe.WriteJSON(g.out, map[string]any{"item": it.Name, "new_id": r.NewID, "by": r.By, "when": r.When})
	}
	fmt.Fprintf(g.out, "%s is released as %s, by %s, %s\n", it.Name, safe.Text(r.NewID), safe.Text(r.By), r.When.Local().Format(time.DateTime))
	return nil
}

func newQuarantineDelete(g *global) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "delete ITEM…", Short: "Delete items for good",
		Long: "Delete items for good. Asks first, unless --yes is given.\n\n" + exitHelp,
		Args: arguments(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !yes {
				fmt.Fprintf(g.err, "delete %d items for good? Type yes: ", len(args))
				var answer string
				if _, err := fmt.Fscanln(g.in, &answer); err != nil || answer != "yes" {
					return failWith(exitFailed, "nothing was deleted")
				}
			}
			return eachItem(cmd.Context(), g, args, func(_ *conf.Config, _ *quarantine.Store, it *quarantine.Item) error {
				if err := it.Delete(); err != nil {
					return err
				}
				if g.json {
					return safe.WriteJSON(g.out, map[string]string{"item": it.Name, "done": "deleted"})
				}
				fmt.Fprintf(g.out, "%s is deleted\n", it.Name)
				return nil
			})
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}
