package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/queue"
)

func newQueue(g *global) *cobra.Command {
	return group("queue", "Look at the MTA's inbound queues",
		newQueueList(g), newQueueShow(g), newQueueCat(g), newQueueStat(g), newQueueRetry(g))
}

// queueRow is one line of holdfast queue list.
type queueRow struct {
	Queue string    `json:"queue"`
	ID    string    `json:"id"`
	Dir   string    `json:"dir"`
	Since time.Time `json:"since"`
	Size  int64     `json:"size"`
	State string    `json:"state"` // waiting, in flight, held back
	Why   string    `json:"why,omitempty"`
}

func newQueueList(g *global) *cobra.Command {
	var limit int
	c := &cobra.Command{
		Use: "list [QUEUE…]", Short: "List what waits in the inbound queues, oldest first",
		Long: "List what waits in the inbound queues, oldest first, with what is being done to\nit or why it is left alone. Works with the daemon up and down.\n\n" + exitHelp,
		RunE: func(cmd *cobra.Command, args []string) error { return runQueueList(cmd.Context(), g, args, limit) },
	}
	c.Flags().IntVarP(&limit, "limit", "n", 10_000, "list at most `N` messages of each queue")
	return c
}

func runQueueList(ctx context.Context, g *global, names []string, limit int) error {
	c, err := g.load()
	if err != nil {
		return err
	}
	qs, err := openQueues(ctx, c, names, nil)
	if err != nil {
		return err
	}
	states, err := messageStates(ctx, c)
	if err != nil {
		return err
	}
	table := safe.NewTable("QUEUE", "ID", "SINCE", "SIZE", "STATE")
	more := 0
	for _, q := range qs {
		var rows []queueRow
		n := 0
		res, err := q.List(ctx, func(e queue.Entry) bool {
			if n++; len(rows) < limit {
				rows = append(rows, row(e, states))
			}
			return ctx.Err() == nil
		})
		if err != nil {
			return fmt.Errorf("list queue %s: %w", q.Name(), err)
		}
		more += n - len(rows)
		sort.Slice(rows, func(i, j int) bool { return rows[i].Since.Before(rows[j].Since) })
		for _, r := range rows {
			if g.json {
				if err := safe.WriteJSON(g.out, r); err != nil {
					return err
				}
				continue
			}
			state := r.State
			if r.Why != "" {
				state += ": " + r.Why
			}
			table.Row(r.Queue, r.ID, r.Since.Local().Format(time.DateTime), fmt.Sprint(r.Size), state)
		}
		if !g.json {
			defer leftAlone(g.err, q.Name(), res.Skipped)
		}
	}
	if !g.json {
		if err := table.Write(g.out); err != nil {
			return err
		}
	}
	if more > 0 {
		fmt.Fprintf(g.err, "holdfast: %d more are not shown: raise --limit\n", more)
	}
	return nil
}

func leftAlone(w io.Writer, name string, skipped map[string]int) {
	var parts []string
	for why, n := range skipped {
		parts = append(parts, fmt.Sprintf("%d %s", n, why))
	}
	if sort.Strings(parts); len(parts) > 0 {
		fmt.Fprintf(w, "holdfast: queue %s, left alone: %s\n", safe.Text(name), safe.Text(strings.Join(parts, ", ")))
	}
}

func row(e queue.Entry, states map[string]queueRow) queueRow {
	r := queueRow{Queue: e.ID.Queue, ID: e.ID.Name, Dir: e.ID.Dir, Since: e.Arrived, Size: e.Size, State: "waiting"}
	if s, ok := states[e.ID.Queue+"\x00"+e.ID.Name]; ok {
		r.State, r.Why = s.State, s.Why
	}
	return r
}

// messageStates asks the daemon what it does with which message; without a
// daemon nothing is being done.
func messageStates(ctx context.Context, c *conf.Config) (map[string]queueRow, error) {
	st, err := control.Dial(c.Paths.Control).Status(ctx)
	if errors.Is(err, control.ErrNoDaemon) {
		return setAsideRows(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	out := map[string]queueRow{}
	for _, w := range st.Waiting {
		state := "held back"
		if time.Until(w.Until) < 24*time.Hour {
			state += " until " + w.Until.Local().Format(time.TimeOnly)
		}
		out[w.Queue+"\x00"+w.ID] = queueRow{State: state, Why: w.Why}
	}
	for _, m := range st.InFlight {
		at := m.Stage
		if m.Part != "" {
			at += " " + m.Part
		}
		out[m.Queue+"\x00"+m.ID] = queueRow{State: "in flight since " + m.Since.Local().Format(time.TimeOnly), Why: at}
	}
	return out, nil
}

// one finds a message by queue id, or by queue:id if several queues have it.
func one(ctx context.Context, c *conf.Config, name string) (queue.Queue, queue.Entry, error) {
	want, id, ok := strings.Cut(name, ":")
	if !ok {
		want, id = "", name
	}
	qs, err := openQueues(ctx, c, nil, nil)
	if err != nil {
		return nil, queue.Entry{}, err
	}
	var found []queue.Entry
	var in queue.Queue
	for _, q := range qs {
		if want != "" && q.Name() != want {
			continue
		}
		_, err := q.List(ctx, func(e queue.Entry) bool {
			if e.ID.Name == id {
				found, in = append(found, e), q
			}
			return ctx.Err() == nil
		})
		if err != nil {
			return nil, queue.Entry{}, fmt.Errorf("list queue %s: %w", q.Name(), err)
		}
	}
	switch len(found) {
	case 0:
		return nil, queue.Entry{}, failWith(exitNotFound, "no message %s waits; holdfast explain %s tells what became of it", safe.Text(name), safe.Text(id))
	case 1:
		return in, found[0], nil
	}
	return nil, queue.Entry{}, failWith(exitFailed, "%d messages have the id %s: name one as queue:id", len(found), safe.Text(id))
}

// peek reads a message under the MTA's lock, and lets go of it.
func peek(ctx context.Context, c *conf.Config, name string, use func(queue.Entry, queue.Envelope, *os.File) error) error {
	q, e, err := one(ctx, c, name)
	if err != nil {
		return err
	}
	cl, err := q.Lock(ctx, e)
	if errors.Is(err, queue.ErrBusy) {
		return failWith(exitPartly, "%s is locked: it is in work, by Holdfast or by the MTA", safe.Text(name))
	}
	if err != nil {
		return err
	}
	defer cl.Close()
	env, err := cl.Read(ctx)
	if err != nil {
		return err
	}
	f, err := cl.Render(ctx)
	if err != nil {
		return err
	}
	defer f.Close()
	return use(e, env, f)
}

func newQueueShow(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show the envelope and the header of a waiting message",
		Long: "Show the envelope and the header of a waiting message, escaped for the terminal.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			return peek(cmd.Context(), c, args[0], func(e queue.Entry, env queue.Envelope, f *os.File) error {
				return showMessage(g, e.ID.Name, env, f)
			})
		},
	}
}

const maxShownHeader = 256 << 10

// showMessage prints envelope and header.
func showMessage(g *global, name string, env queue.Envelope, f io.ReaderAt) error {
	head := make([]byte, maxShownHeader)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the header of %s: %w", name, err)
	}
	header, _, _ := strings.Cut(string(head[:n]), "\n\n")
	if g.json {
		return safe.WriteJSON(g.out, map[string]any{"id": name, "envelope": env, "header": strings.Split(strings.TrimRight(header, "\n"), "\n")})
	}
	fmt.Fprintf(g.out, "id          %s\narrived     %s\nclient      %s [%s]\nhelo        %s\nprotocol    %s\nsender      <%s>\n", safe.Text(name),
		env.Arrived.Local().Format(time.DateTime), safe.Text(env.ClientName), safe.Text(env.ClientAddr), safe.Text(env.Helo), safe.Text(env.Protocol), safe.Text(env.Sender))
	for _, r := range env.Recipients {
		fmt.Fprintf(g.out, "recipient   <%s>", safe.Text(r.Address))
		if r.Notify != "" {
			fmt.Fprintf(g.out, " NOTIFY=%s", safe.Text(r.Notify))
		}
		fmt.Fprintln(g.out)
	}
	fmt.Fprintln(g.out)
	for line := range strings.Lines(header + "\n") {
		fmt.Fprintln(g.out, safe.Text(strings.TrimRight(line, "\n")))
	}
	return nil
}

func newQueueCat(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "cat ID", Short: "Write a waiting message to standard output, byte for byte",
		Long: "Write a waiting message to standard output, byte for byte: not for a terminal.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.load()
			if err != nil {
				return err
			}
			return peek(cmd.Context(), c, args[0], func(_ queue.Entry, _ queue.Envelope, f *os.File) error {
				if _, err := f.Seek(0, io.SeekStart); err != nil {
					return fmt.Errorf("read %s: %w", args[0], err)
				}
				if _, err := io.Copy(g.out, f); err != nil {
					return fmt.Errorf("write %s: %w", args[0], err)
				}
				return nil
			})
		},
	}
}

func newQueueRetry(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "retry ID", Short: "Take a message again that is held back",
		Long: "Take a message again that is held back: by policy, after a failure, or because\nHoldfast itself died of it. ID may be queue:id.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runQueueRetry(cmd.Context(), g, args[0]) },
	}
}

func runQueueRetry(ctx context.Context, g *global, name string) error {
	c, err := g.load()
	if err != nil {
		return err
	}
	inQueue, id, ok := strings.Cut(name, ":")
	if !ok {
		inQueue, id = "", name
	}
	held, err := holdsOf(c).End(inQueue, id)
	if err != nil {
		return err
	}
	n, err := control.Dial(c.Paths.Control).Retry(ctx, inQueue, id)
	if errors.Is(err, control.ErrNoDaemon) {
		n, err = returnAside(ctx, c, inQueue, id)
	}
	switch n += held; {
	case err != nil:
		return err
	case n == 0:
		return failWith(exitNotFound, "%s is not held back", safe.Text(name))
	}
	fmt.Fprintf(g.out, "%s will be taken again\n", safe.Text(name))
	return nil
}

// queueStat is one queue of holdfast queue stat.
type queueStat struct {
	Queue    string         `json:"queue"`
	Messages int            `json:"messages"`
	InFlight int            `json:"in_flight"`
	HeldBack int            `json:"held_back"`
	Oldest   *time.Time     `json:"oldest,omitempty"`
	Bytes    int64          `json:"bytes"`
	Skipped  map[string]int `json:"left_alone"`
}

func newQueueStat(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "stat", Short: "Count what waits, and say how old it is",
		Long: "Count what waits in each queue, and say how old it is and whether mail is taken.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runQueueStat(cmd.Context(), g) },
	}
}

func runQueueStat(ctx context.Context, g *global) error {
	c, err := g.load()
	if err != nil {
		return err
	}
	qs, err := openQueues(ctx, c, nil, nil)
	if err != nil {
		return err
	}
	states, err := messageStates(ctx, c)
	if err != nil {
		return err
	}
	table := safe.NewTable("QUEUE", "MESSAGES", "IN FLIGHT", "HELD BACK", "BYTES", "OLDEST")
	for _, q := range qs {
		st := queueStat{Queue: q.Name()}
		res, err := q.List(ctx, func(e queue.Entry) bool {
			st.add(e, states)
			return ctx.Err() == nil
		})
		if err != nil {
			return fmt.Errorf("list queue %s: %w", q.Name(), err)
		}
		st.Skipped = res.Skipped
		if g.json {
			if err := safe.WriteJSON(g.out, st); err != nil {
				return err
			}
			continue
		}
		oldest := "-"
		if st.Oldest != nil {
			oldest = time.Since(*st.Oldest).Round(time.Second).String()
		}
		table.Row(st.Queue, fmt.Sprint(st.Messages), fmt.Sprint(st.InFlight), fmt.Sprint(st.HeldBack), fmt.Sprint(st.Bytes), oldest)
		defer leftAlone(g.err, q.Name(), res.Skipped)
	}
	if g.json {
		return nil
	}
	if err := table.Write(g.out); err != nil {
		return err
	}
	return daemonLine(ctx, g, c)
}

func (st *queueStat) add(e queue.Entry, states map[string]queueRow) {
	st.Messages++
	st.Bytes += e.Size
	if st.Oldest == nil || e.Arrived.Before(*st.Oldest) {
		st.Oldest = &e.Arrived
	}
	switch s := states[e.ID.Queue+"\x00"+e.ID.Name]; {
	case strings.HasPrefix(s.State, "in flight"):
		st.InFlight++
	case s.State != "":
		st.HeldBack++
	}
}

// daemonLine says whether mail is taken, and if not, why.
func daemonLine(ctx context.Context, g *global, c *conf.Config) error {
	st, err := control.Dial(c.Paths.Control).Status(ctx)
	switch {
	case errors.Is(err, control.ErrNoDaemon):
		fmt.Fprintln(g.out, "\nno daemon runs")
	case err != nil:
		return err
	case st.Paused:
		fmt.Fprintln(g.out, "\npaused: no mail is taken until holdfast resume")
	case st.Breaker != "":
		fmt.Fprintf(g.out, "\nno mail is taken: %s\n", safe.Text(st.Breaker))
	default:
		fmt.Fprintf(g.out, "\nrunning as process %d since %s, with the configuration of %s\n", st.PID,
			st.Started.Local().Format(time.DateTime), st.Loaded.Local().Format(time.DateTime))
	}
	if st.ReloadRefused != "" {
		fmt.Fprintf(g.out, "the last reload was refused: %s\n", safe.Text(st.ReloadRefused))
	}
	return nil
}
