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
		newQueueList(g), newQueueShow(g), newQueueCat(g), newQueueStat(g), newQueueRetry(g),
		newQueueRelease(g), newQueueQuarantine(g))
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
	if limit < 1 {
		return failWith(exitUsage, "--limit %d would list nothing", limit)
	}
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	qs, err := openQueues(ctx, c, names, nil)
	if err != nil {
		return err
	}
	v, err := look(ctx, c)
	if err != nil {
		return err
	}
	table := safe.NewTable("QUEUE", "ID", "SINCE", "SIZE", "STATE")
	more := 0
	var advice []string
	for _, q := range qs {
		rows, beyond, err := listed(ctx, q, v, limit)
		if err != nil {
			return err
		}
		more += beyond
		for _, r := range rows {
			if g.json {
				if err := safe.WriteJSON(g.out, r); err != nil {
					return err
				}
				continue
			}
			table.Row(r.Queue, r.ID, r.Since.Local().Format(time.DateTime), fmt.Sprint(r.Size), r.text())
			if r.Do != "" {
				advice = append(advice, r.ID+": "+r.Do)
			}
		}
	}
	if !g.json {
		if err := table.Write(g.out); err != nil {
			return err
		}
	}
	for _, a := range advice {
		fmt.Fprintf(g.err, "holdfast: %s\n", safe.Text(a))
	}
	if more > 0 {
		fmt.Fprintf(g.err, "holdfast: %d more are not shown: raise --limit\n", more)
	}
	return nil
}

// listed lists one queue: at most limit messages, the oldest of them first,
// and what is left alone.
func listed(ctx context.Context, q queue.Queue, v view, limit int) (rows []queueRow, beyond int, err error) {
	res, err := q.List(ctx, func(e queue.Entry) bool {
		if len(rows) < limit {
			rows = append(rows, v.row(e))
		} else {
			beyond++
		}
		return ctx.Err() == nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("list queue %s: %w", q.Name(), err)
	}
	sort.Slice(rows, func(i, j int) bool { return rows[i].Since.Before(rows[j].Since) })
	for _, f := range res.Left {
		rows = append(rows, leftRow(f))
	}
	for _, n := range res.Skipped {
		beyond += n
	}
	return rows, beyond - len(res.Left), nil
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
			c, err := g.current(cmd.Context())
			if err != nil {
				return err
			}
			return peek(cmd.Context(), c, args[0], func(e queue.Entry, env queue.Envelope, f *os.File) error {
				return showMessage(g, e.ID.Name, env, f)
			})
		},
	}
}

// shown is a message as JSON. The envelope has names of its own here: those of
// queue.Envelope are the program's.
type shown struct {
	ID       string       `json:"id"`
	Envelope envelopeView `json:"envelope"`
	Header   []string     `json:"header"`
}

type envelopeView struct {
	Sender     string          `json:"sender"`
	Recipients []recipientView `json:"recipients"`
	EnvID      string          `json:"env_id,omitempty"`
	Ret        string          `json:"ret,omitempty"`
	Body8Bit   bool            `json:"body_8bit"`
	SMTPUTF8   bool            `json:"smtputf8"`
	ClientName string          `json:"client_name,omitempty"`
	ClientAddr string          `json:"client_addr,omitempty"`
	Helo       string          `json:"helo,omitempty"`
	Protocol   string          `json:"protocol,omitempty"`
	Arrived    time.Time       `json:"arrived"`
	Attempts   int             `json:"attempts"`
	Filter     string          `json:"filter,omitempty"`
	Redirect   string          `json:"redirect,omitempty"`
	VERP       string          `json:"verp,omitempty"`
	SASLUser   string          `json:"sasl_user,omitempty"`
	SASLSender string          `json:"sasl_sender,omitempty"`
}

type recipientView struct {
	Address  string `json:"address"`
	Notify   string `json:"notify,omitempty"`
	ORcpt    string `json:"orcpt,omitempty"`
	Original string `json:"original,omitempty"`
}

func viewOf(e queue.Envelope) envelopeView {
	v := envelopeView{
		Sender: e.Sender, Recipients: []recipientView{}, EnvID: e.EnvID, Ret: e.Ret, Body8Bit: e.Body8Bit, SMTPUTF8: e.SMTPUTF8,
		ClientName: e.ClientName, ClientAddr: e.ClientAddr, Helo: e.Helo, Protocol: e.Protocol, Arrived: e.Arrived, Attempts: e.Attempts,
		Filter: e.Filter, Redirect: e.Redirect, VERP: e.VERP, SASLUser: e.SASLUser, SASLSender: e.SASLSender,
	}
	for _, r := range e.Recipients {
		v.Recipients = append(v.Recipients, recipientView(r))
	}
	return v
}

const maxShownHeader = 256 << 10

// showMessage prints envelope and header.
func showMessage(g *global, name string, env queue.Envelope, f io.ReaderAt) error {
	header, err := headerOf(name, f)
	if err != nil {
		return err
	}
	if g.json {
		return safe.WriteJSON(g.out, shown{ID: name, Envelope: viewOf(env), Header: headerLines(header)})
	}
	printMessage(g, name, env, header)
	return nil
}

func headerOf(name string, f io.ReaderAt) (string, error) {
	head := make([]byte, maxShownHeader)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read the header of %s: %w", name, err)
	}
	header, _, _ := strings.Cut(string(head[:n]), "\n\n")
	return header, nil
}

func headerLines(header string) []string { return strings.Split(strings.TrimRight(header, "\n"), "\n") }

func printMessage(g *global, name string, env queue.Envelope, header string) {
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
}

func newQueueCat(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "cat ID", Short: "Write a waiting message to standard output, byte for byte",
		Long: "Write a waiting message to standard output, byte for byte: not for a terminal.\n\n" + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.current(cmd.Context())
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
		Use: "retry ID", Short: "Scan a message again that is held or delayed",
		Long: `Scan a message again that is held or delayed: by policy, after a failure, or
because Holdfast itself died of it. ID may be queue:id. What policy still holds is
held again: holdfast queue release lets it go as it is.

` + exitHelp,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runQueueRetry(cmd.Context(), g, args[0]) },
	}
}

// split takes queue:id apart; without a queue the id alone counts.
func split(name string) (inQueue, id string) {
	inQueue, id, ok := strings.Cut(name, ":")
	if !ok {
		return "", name
	}
	return inQueue, id
}

func runQueueRetry(ctx context.Context, g *global, name string) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	inQueue, id := split(name)
	held, err := holdsOf(c).End(inQueue, id)
	if err != nil {
		return err
	}
	n, err := control.Dial(c.Paths.Control).Retry(ctx, inQueue, id)
	if errors.Is(err, control.ErrNoDaemon) {
		n, err = returnAside(ctx, c, inQueue, id)
	}
	if err != nil {
		return err
	}
	if n += held; n > 0 {
		return done(g, map[string]any{"id": id, "done": "will be taken again"}, "%s will be taken again", name)
	}
	row, err := whereabouts(ctx, c, name)
	if err != nil {
		return err
	}
	return done(g, row, "%s needs no retry: %s", name, row.text())
}

// whereabouts says what a waiting message does.
func whereabouts(ctx context.Context, c *conf.Config, name string) (queueRow, error) {
	_, e, err := one(ctx, c, name)
	if err != nil {
		return queueRow{}, err
	}
	v, err := look(ctx, c)
	if err != nil {
		return queueRow{}, err
	}
	row := v.row(e)
	if row.State == stateWaiting {
		row.Why = v.blocked()
	}
	return row, nil
}

// done says what was done: as an object, or as a line.
func done(g *global, object any, format string, args ...any) error {
	if g.json {
		return safe.WriteJSON(g.out, object)
	}
	fmt.Fprintln(g.out, safe.Text(fmt.Sprintf(format, args...)))
	return nil
}

// queueStat is one queue of holdfast queue stat.
type queueStat struct {
	Queue    string         `json:"queue"`
	Messages int            `json:"messages"`
	InFlight int            `json:"in_flight"`
	Delayed  int            `json:"delayed"`
	Held     int            `json:"held"`
	Oldest   *time.Time     `json:"oldest,omitempty"`
	Bytes    int64          `json:"bytes"`
	Skipped  map[string]int `json:"left_alone"`
}

// daemonStat is the last object of holdfast queue stat --json.
type daemonStat struct {
	Running       bool       `json:"running"`
	PID           int        `json:"pid,omitempty"`
	Started       *time.Time `json:"started,omitempty"`
	Loaded        *time.Time `json:"configuration_loaded,omitempty"`
	Paused        *pauseNote `json:"paused,omitempty"`
	Blocked       string     `json:"blocked,omitempty"` // why no mail is taken
	ReloadRefused string     `json:"reload_refused,omitempty"`
}

func newQueueStat(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "stat", Short: "Count what waits, and say how old it is",
		Long: "Count what waits in each queue, and say how old it is and whether mail is taken.\nWith --json the last object is the daemon's.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runQueueStat(cmd.Context(), g) },
	}
}

func runQueueStat(ctx context.Context, g *global) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	qs, err := openQueues(ctx, c, nil, nil)
	if err != nil {
		return err
	}
	v, err := look(ctx, c)
	if err != nil {
		return err
	}
	table := safe.NewTable("QUEUE", "MESSAGES", "IN FLIGHT", "DELAYED", "HELD", "BYTES", "OLDEST")
	for _, q := range qs {
		st := queueStat{Queue: q.Name()}
		res, err := q.List(ctx, func(e queue.Entry) bool {
			st.add(v.row(e))
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
		table.Row(st.Queue, fmt.Sprint(st.Messages), fmt.Sprint(st.InFlight), fmt.Sprint(st.Delayed), fmt.Sprint(st.Held), fmt.Sprint(st.Bytes), oldest)
		defer leftAlone(g.err, q.Name(), res.Skipped)
	}
	if g.json {
		return safe.WriteJSON(g.out, map[string]daemonStat{"daemon": v.stat()})
	}
	if err := table.Write(g.out); err != nil {
		return err
	}
	v.daemonLines(g.out)
	return nil
}

func leftAlone(w io.Writer, name string, skipped map[string]int) {
	var parts []string
	for why, n := range skipped {
		parts = append(parts, fmt.Sprintf("%d %s", n, why))
	}
	if sort.Strings(parts); len(parts) > 0 {
		fmt.Fprintf(w, "holdfast: queue %s, left alone: %s (holdfast queue list names them)\n", safe.Text(name), safe.Text(strings.Join(parts, ", ")))
	}
}

func (st *queueStat) add(r queueRow) {
	st.Messages++
	st.Bytes += r.Size
	if st.Oldest == nil || r.Since.Before(*st.Oldest) {
		st.Oldest = &r.Since
	}
	switch r.State {
	case stateInFlight:
		st.InFlight++
	case stateDelayed:
		st.Delayed++
	case stateHeld:
		st.Held++
	}
}

func (v view) stat() daemonStat {
	st := daemonStat{Paused: v.paused, Blocked: v.blocked()}
	if d := v.daemon; d != nil {
		st.Running, st.PID, st.ReloadRefused = true, d.PID, d.ReloadRefused
		st.Started, st.Loaded = &d.Started, &d.Loaded
	}
	return st
}

// daemonLines say whether mail is taken, and if not, why.
func (v view) daemonLines(w io.Writer) {
	fmt.Fprintln(w)
	switch why := v.blocked(); {
	case v.paused != nil:
		fmt.Fprintf(w, "%s: no mail is taken until holdfast resume\n", safe.Text(why))
	case v.daemon != nil && why != "":
		fmt.Fprintf(w, "no mail is taken: %s\n", safe.Text(why))
	}
	if v.daemon == nil {
		fmt.Fprintln(w, "no daemon runs")
		return
	}
	fmt.Fprintf(w, "running as process %d since %s, with the configuration of %s\n", v.daemon.PID,
		v.daemon.Started.Local().Format(time.DateTime), v.daemon.Loaded.Local().Format(time.DateTime))
	if why := v.daemon.ReloadRefused; why != "" {
		fmt.Fprintf(w, "the last reload was refused: %s\n", safe.Text(why))
	}
}
