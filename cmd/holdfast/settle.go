package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/notify"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/queue"
)

func newQueueRelease(g *global) *cobra.Command {
	return settleCommand(g, string(queue.Release), "Let a held message go as it is",
		"Let a message that is held go as it is: to the MTA's outbound side, unchanged, and\nwhatever was found in it.")
}

func newQueueQuarantine(g *global) *cobra.Command {
	return settleCommand(g, string(queue.Quarantine), "Put a held message into quarantine",
		"Put a message that is held into quarantine.")
}

func settleCommand(g *global, do, short, long string) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: do + " ID", Short: short,
		Long: long + " Shows it and asks first, unless --yes is\ngiven. Who did it stands in the history (holdfast explain). ID may be queue:id.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runSettle(cmd.Context(), g, args[0], do, yes) },
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func runSettle(ctx context.Context, g *global, name, do string, yes bool) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	row, err := whereabouts(ctx, c, name)
	if err != nil {
		return err
	}
	if row.State != stateHeld {
		return failWith(exitNotFound, "%s is not held: %s", safe.Text(name), safe.Text(row.text()))
	}
	if !yes {
		fmt.Fprintf(g.err, "%s, %d bytes, %s\n", safe.Text(row.ID), row.Size, safe.Text(row.text()))
		if err := g.confirm(do+" it?", "nothing was done"); err != nil {
			return err
		}
	}
	order := control.Order{Queue: row.Queue, ID: row.ID, Do: do, By: who()}
	err = control.Dial(c.Paths.Control).Settle(ctx, order)
	if errors.Is(err, control.ErrNoDaemon) {
		err = settleAlone(ctx, g, c, order)
	}
	if errors.Is(err, control.ErrNotHeld) {
		return failWith(exitNotFound, "%s is no longer held", safe.Text(name))
	}
	if err != nil {
		return err
	}
	what := map[string]string{string(queue.Release): "is released", string(queue.Quarantine): "is in quarantine"}[do]
	return done(g, map[string]string{"queue": row.Queue, "id": row.ID, "done": do, "by": order.By}, "%s %s, by %s; holdfast explain %s tells more", row.ID, what, order.By, row.ID)
}

// settleAlone does, while no daemon runs, what the daemon would do: with its
// ledger, its locks, and after its recovery, so that a daemon that starts
// meanwhile is refused, and a crash costs nothing.
func settleAlone(ctx context.Context, g *global, c *conf.Config, o control.Order) error {
	now := time.Now()
	s := &supervisor{g: g, read: c, conf: c, started: now, loaded: now, notify: notify.FromEnv()}
	defer s.close()
	if err := s.open(ctx); err != nil {
		return err
	}
	defer s.deliver(ctx)()
	return s.gate.SettleAlone(ctx, o)
}
