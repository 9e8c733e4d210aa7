package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sort"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/holds"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/queue"
)

func holdsOf(c *conf.Config) holds.Dir { return holds.Dir{Path: filepath.Join(c.State, "holds")} }

func newHold(g *global) *cobra.Command {
	var why string
	c := &cobra.Command{
		Use: "hold [ID]", Short: "Keep a message in the inbound queue, or list what is kept",
		Long: `Keep a message in the inbound queue until holdfast queue retry ID ends the hold.
ID may be queue:id. Without ID, list what is kept. The hold outlives restarts and
the loss of the ledger. A message that is in work is still kept if it is not
settled yet: then the command ends with 3, and holdfast explain ID tells.

` + exitHelp,
		Args: arguments(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return runHoldList(cmd.Context(), g)
			}
			return runHold(cmd.Context(), g, args[0], why)
		},
	}
	c.Flags().StringVar(&why, "why", "", "`REASON`, for whoever finds it")
	return c
}

func runHold(ctx context.Context, g *global, name, why string) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	q, e, err := one(ctx, c, name)
	if err != nil {
		return err
	}
	h := holds.Hold{Queue: e.ID.Queue, Dir: e.ID.Dir, ID: e.ID.Name, By: who(), At: time.Now().UTC(), Why: why}
	switch cl, err := q.Lock(ctx, e); {
	case err == nil:
		h.Ino = holds.Inode(cl.Stats())
		cl.Close()
	case !errors.Is(err, queue.ErrBusy): // in work: whatever has this id is meant
		return err
	}
	if err := holdsOf(c).Put(h); err != nil {
		return err
	}
	if g.json {
		err = safe.WriteJSON(g.out, h)
	} else {
		_, err = fmt.Fprintf(g.out, "%s stays in the queue until holdfast queue retry %s\n", safe.Text(name), safe.Text(name))
	}
	if err != nil {
		return err
	}
	return inWork(ctx, c, h)
}

// inWork wakes the daemon, and warns of a message that is in its hands.
func inWork(ctx context.Context, c *conf.Config, h holds.Hold) error {
	d := control.Dial(c.Paths.Control)
	err := d.Wake(ctx)
	if errors.Is(err, control.ErrNoDaemon) {
		return nil
	}
	st, serr := d.Status(ctx)
	if err = errors.Join(err, serr); err != nil {
		return fmt.Errorf("it is on hold, but the daemon could not be asked whether it has the message in work: %w", err)
	}
	for _, m := range st.InFlight {
		if m.Queue == h.Queue && m.ID == h.ID {
			return failWith(exitPartly, "%s is in work: it is kept only if it is not settled yet", safe.Text(h.ID))
		}
	}
	return nil
}

func runHoldList(ctx context.Context, g *global) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	all, err := holdsOf(c).All()
	if err != nil {
		return err
	}
	sort.Slice(all, func(i, j int) bool { return all[i].At.Before(all[j].At) })
	table := safe.NewTable("QUEUE", "ID", "HELD")
	for _, h := range all {
		if g.json {
			if err := safe.WriteJSON(g.out, h); err != nil {
				return err
			}
			continue
		}
		table.Row(h.Queue, h.ID, h.Text())
	}
	if g.json {
		return nil
	}
	return table.Write(g.out)
}
