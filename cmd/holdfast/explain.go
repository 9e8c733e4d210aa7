package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/queue/history"
	"holdfast/queue/quarantine"
)

func newExplain(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "explain ID", Short: "Tell what was done with a message, and why",
		Long: `Tell what was done with a message, and why; of one that still waits in an inbound
queue, what it waits for. ID is its queue id before or after, its Message-ID, or the
name of its quarantine item.

` + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runExplain(cmd.Context(), g, args[0]) },
	}
}

const maxExplained = 100

func runExplain(ctx context.Context, g *global, id string) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	res, err := trail(ctx, c, id)
	if err != nil {
		return err
	}
	if res.Damaged > 0 {
		fmt.Fprintf(g.err, "holdfast: %d damaged lines of the history were passed over\n", res.Damaged)
	}
	rows, err := nowWaiting(ctx, c, id)
	if err != nil {
		fmt.Fprintf(g.err, "holdfast: whether it waits is not known: %s\n", safe.Text(err.Error()))
	}
	if len(res.Records)+len(rows) == 0 {
		return failWith(exitNotFound, "nothing is known of %s; holdfast queue list shows what waits", safe.Text(id))
	}
	for i, r := range rows {
		if err := explainRow(g, r, i > 0); err != nil {
			return err
		}
	}
	for i, r := range res.Records {
		if err := explainOne(g, r, i+len(rows) > 0); err != nil {
			return err
		}
	}
	return nil
}

// trail returns the records about a message, also those that know it only
// by its quarantine item.
func trail(ctx context.Context, c *conf.Config, id string) (history.Result, error) {
	res, err := history.Find(ctx, c.Paths.History, id, maxExplained)
	if err != nil {
		return res, err
	}
	names := []string{id}
	for _, r := range res.Records {
		for _, name := range append([]string{r.Item}, r.NewIDs...) {
			if quarantine.IsName(name) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	if len(names) == 1 {
		return res, nil
	}
	return history.FindAny(ctx, c.Paths.History, names, maxExplained)
}

// nowWaiting is what the inbound queues have under that id, and for what it
// waits.
func nowWaiting(ctx context.Context, c *conf.Config, id string) ([]queueRow, error) {
	if quarantine.IsName(id) || strings.ContainsAny(id, "@/") {
		return nil, nil
	}
	v, err := look(ctx, c)
	if err != nil {
		return nil, err
	}
	rows, err := find(ctx, c, v, id)
	for i := range rows {
		switch r := &rows[i]; r.State {
		case stateWaiting:
			r.Why = v.blocked()
		case stateHeld:
			r.Do = "holdfast queue release " + id + " lets it go as it is, holdfast queue retry " + id + " has it scanned again"
		}
	}
	return rows, err
}

// line prints a named line; without a value it prints nothing.
func (g *global) line(name, format string, args ...any) {
	text := safe.Text(fmt.Sprintf(format, args...))
	if strings.TrimSpace(text) != "" {
		fmt.Fprintf(g.out, "%-12s%s\n", name, text)
	}
}

func explainRow(g *global, r queueRow, apart bool) error {
	if g.json {
		return safe.WriteJSON(g.out, r)
	}
	if apart {
		fmt.Fprintln(g.out)
	}
	g.line("message", "%s in queue %s (%s)", r.ID, r.Queue, r.Dir)
	g.line("now", "%s", r.text())
	g.line("since", "%s", r.Since.Local().Format(time.DateTime))
	g.line("size", "%d bytes", r.Size)
	g.line("to do", "%s", r.Do)
	return nil
}

func explainOne(g *global, r history.Record, apart bool) error {
	if g.json {
		return safe.WriteJSON(g.out, r)
	}
	if apart {
		fmt.Fprintln(g.out)
	}
	g.line("message", "%s in queue %s (%s)", r.ID, r.Queue, r.Dir)
	g.line("when", "%s", r.Time.Local().Format(time.DateTime))
	g.line("verdict", "%s", r.Verdict)
	g.line("item", "%s", r.Item)
	g.line("by", "%s", r.By)
	for _, why := range r.Reasons {
		text := why.Rule + ": " + why.Text
		if why.Part != "" {
			text += ", part " + why.Part
		}
		if why.Source != "" {
			text += ", by " + why.Source
		}
		g.line("why", "%s", text)
	}
	if len(r.Reasons) == 0 && r.Verdict == "release" {
		g.line("why", "nothing was found")
	}
	g.line("note", "%s", r.Note)
	g.line("became", "%s", became(r.NewIDs))
	g.line("from", "<%s>", r.From)
	g.line("to", "%s", strings.Join(r.Addresses, ", "))
	if more := r.Recipients - len(r.Addresses); more > 0 {
		g.line("", "and %d more", more)
	}
	g.line("message-id", "%s", r.MessageID)
	g.line("client", "%s", r.ClientAddr)
	g.line("size", "%d bytes", r.Size)
	for _, st := range r.Stages {
		g.line("stage", "%s took %s", st.Name, st.Duration.Round(time.Microsecond))
	}
	return nil
}

func became(ids []string) string {
	var out []string
	for _, id := range ids {
		if quarantine.IsName(id) {
			id = "quarantine item " + id
		}
		out = append(out, id)
	}
	return strings.Join(out, ", ")
}
