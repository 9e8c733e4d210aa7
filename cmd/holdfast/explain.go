package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/queue/history"
)

func newExplain(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "explain ID", Short: "Tell what was done with a message, and why",
		Long: "Tell what was done with a message, and why. ID is its queue id before or after, its\nMessage-ID, or the name of its quarantine item.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runExplain(cmd.Context(), g, args[0]) },
	}
}

const maxExplained = 100

func runExplain(ctx context.Context, g *global, id string) error {
	c, err := g.load()
	if err != nil {
		return err
	}
	res, err := history.Find(ctx, c.Paths.History, id, maxExplained)
	if err != nil {
		return err
	}
	if res.Damaged > 0 {
		fmt.Fprintf(g.err, "holdfast: %d damaged lines of the history were passed over\n", res.Damaged)
	}
	if len(res.Records) == 0 {
		states, err := messageStates(ctx, c)
		if err != nil {
			return err
		}
		for key, s := range states {
			if strings.HasSuffix(key, "\x00"+id) {
				fmt.Fprintf(g.out, "%s is still in the inbound queue: %s: %s\n", safe.Text(id), s.State, safe.Text(s.Why))
				return nil
			}
		}
		return failWith(exitNotFound, "nothing is known of %s; holdfast queue list shows what waits", safe.Text(id))
	}
	for i, r := range res.Records {
		if g.json {
			if err := safe.WriteJSON(g.out, r); err != nil {
				return err
			}
			continue
		}
		if i > 0 {
			fmt.Fprintln(g.out)
		}
		explainOne(g, r)
	}
	return nil
}

func explainOne(g *global, r history.Record) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(g.out, "%-12s%s\n", name, safe.Text(fmt.Sprintf(format, args...)))
	}
	line("message", "%s in queue %s (%s)", r.ID, r.Queue, r.Dir)
	line("when", "%s", r.Time.Local().Format(time.DateTime))
	line("verdict", "%s", r.Verdict)
	for _, why := range r.Reasons {
		text := why.Rule + ": " + why.Text
		if why.Part != "" {
			text += ", part " + why.Part
		}
		if why.Source != "" {
			text += ", by " + why.Source
		}
		line("why", "%s", text)
	}
	if len(r.Reasons) == 0 && r.Verdict == "release" {
		line("why", "nothing was found")
	}
	if r.Note != "" {
		line("note", "%s", r.Note)
	}
	if len(r.NewIDs) > 0 {
		line("became", "%s", strings.Join(r.NewIDs, ", "))
	}
	line("from", "<%s>", r.From)
	line("to", "%s", strings.Join(r.Addresses, ", "))
	if more := r.Recipients - len(r.Addresses); more > 0 {
		line("", "and %d more", more)
	}
	line("message-id", "%s", r.MessageID)
	line("client", "%s", r.ClientAddr)
	line("size", "%d bytes", r.Size)
	for _, st := range r.Stages {
		line("stage", "%s took %s", st.Name, st.Duration.Round(time.Microsecond))
	}
}
