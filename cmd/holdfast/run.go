package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/gateway"
	"holdfast/cmd/holdfast/internal/keeper"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
	"holdfast/poison/ledger"
	"holdfast/queue"
	"holdfast/queue/quarantine"
)

type runOptions struct{ drain, dryRun bool }

const superviseName = "supervise"

func (o *runOptions) flags(c *cobra.Command) {
	c.Flags().BoolVar(&o.drain, "drain", false, "end when nothing can be claimed, and print a summary")
	c.Flags().BoolVar(&o.dryRun, "dry-run", false, "judge and log, change nothing; its own state is thrown away")
}

func newRun(g *global) *cobra.Command {
	var o runOptions
	c := &cobra.Command{
		Use: "run", Short: "Scan the mail, in the foreground",
		Long: `Scan the mail, in the foreground. A small keeper starts the supervisor, and starts
it again should it die. SIGHUP reloads the configuration, or refuses a bad one
and keeps the old; SIGTERM finishes or puts back what is in work. Under systemd it
notifies readiness and serves the watchdog (NotifyAccess=all).

With --drain it ends when nothing can be claimed: with 0 if nothing is left, with 3
and a list if something is; stopped by SIGINT it ends with 130. With --dry-run what
stays in the queue only because nothing is changed does not count as left.

` + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runRun(cmd.Context(), g, o) },
	}
	o.flags(c)
	return c
}

// runRun is the keeper. It reads the configuration only to refuse a bad one
// at once.
func runRun(ctx context.Context, g *global, o runOptions) error {
	if _, err := g.load(); err != nil {
		return err
	}
	// The daemon's records and complaints name the file for people who were not
	// in this directory.
	file, err := filepath.Abs(g.config)
	if err != nil {
		return fmt.Errorf("find the configuration again: %w", err)
	}
	args := []string{superviseName, "-c", file}
	if o.drain {
		args = append(args, "--drain")
	}
	if o.dryRun {
		args = append(args, "--dry-run")
	}
	if g.json {
		args = append(args, "--json")
	}
	code, err := keeper.Run(ctx, keeper.Options{
		Path: "/proc/self/exe", Name: "holdfast", Args: args, Stdout: g.out, Stderr: g.err,
		First: 200 * time.Millisecond, Most: time.Minute, Settled: time.Minute,
		Stopped: func(s os.Signal) int { return stoppedBetween(o, s) },
		Died: func(how string, again time.Duration) {
			fmt.Fprintf(g.err, "holdfast: the supervisor died (%s); it is started again in %s\n", how, again)
		},
	})
	if err != nil {
		return err
	}
	if code != 0 {
		return &exitError{code: code, err: errors.New("")}
	}
	return nil
}

// stoppedBetween is the exit code for a signal that came while no supervisor
// ran: nobody can tell that a drain was done.
func stoppedBetween(o runOptions, s os.Signal) int {
	switch {
	case !o.drain:
		return 0
	case s == os.Interrupt:
		return exitInterrupts
	}
	return exitPartly
}

func newSupervise(g *global) *cobra.Command {
	var o runOptions
	c := &cobra.Command{
		Use: superviseName, Hidden: true, Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			interrupt := make(chan os.Signal, 1) // beside main, which only ends the context
			signal.Notify(interrupt, os.Interrupt)
			defer signal.Stop(interrupt)
			sum, err := supervise(cmd.Context(), g, o)
			code := 0
			switch {
			case err != nil:
				code = exitFailed
				fmt.Fprintf(g.err, "holdfast: %s\n", safe.Text(err.Error()))
			case o.drain:
				if code, err = printSummary(g, o, sum, cmd.Context().Err() != nil); err != nil {
					code = exitFailed
				} else if len(interrupt) > 0 {
					code = exitInterrupts
				}
			}
			if err := keeper.Bye(code); err != nil {
				return err
			}
			if code != 0 {
				return &exitError{code: code, err: errors.New("")}
			}
			return nil
		},
	}
	o.flags(c)
	return c
}

// printSummary says what a drain did and what is left.
func printSummary(g *global, o runOptions, sum gateway.Summary, stopped bool) (code int, err error) {
	left := sum.Waiting - sum.Judged
	if left > 0 || sum.Blocked != "" {
		code = exitPartly
	}
	if g.json {
		return code, summaryJSON(g, o, sum, stopped)
	}
	took := sum.Took.Round(10 * time.Millisecond)
	switch {
	case o.dryRun:
		fmt.Fprintf(g.out, "dry run, nothing was changed, in %s: %s; %d still in the queue\n", took, settledText(sum.Counts, "would "), sum.Waiting)
	case stopped:
		fmt.Fprintf(g.out, "stopped after %s: %s, left %d\n", took, settledText(sum.Counts, ""), left)
	default:
		fmt.Fprintf(g.out, "drained in %s: %s, left %d\n", took, settledText(sum.Counts, ""), left)
	}
	if sum.Blocked != "" {
		fmt.Fprintf(g.out, "no mail is taken: %s\n", safe.Text(sum.Blocked))
	}
	for _, l := range sum.Left {
		fmt.Fprintf(g.out, "left %s: %s\n", safe.Text(l.ID.String()), safe.Text(l.Why))
	}
	if more := left - len(sum.Left); more > 0 {
		fmt.Fprintf(g.out, "and %d more\n", more)
	}
	for _, name := range slices.Sorted(maps.Keys(sum.Alone)) {
		fmt.Fprintf(g.out, "left alone in queue %s: %s\n", safe.Text(name), safe.Text(sum.Alone[name]))
	}
	return code, nil
}

// settledText is "quarantine 1, release 39".
func settledText(counts map[string]int64, would string) string {
	var parts []string
	for verdict, n := range counts {
		parts = append(parts, fmt.Sprintf("%s%s %d", would, verdict, n))
	}
	sort.Strings(parts)
	if len(parts) == 0 {
		return "nothing to do"
	}
	return strings.Join(parts, ", ")
}

func summaryJSON(g *global, o runOptions, sum gateway.Summary, stopped bool) error {
	left := []map[string]string{}
	for _, l := range sum.Left {
		left = append(left, map[string]string{"queue": l.ID.Queue, "id": l.ID.Name, "why": l.Why})
	}
	return safe.WriteJSON(g.out, map[string]any{
		"settled": sum.Counts, "left": left, "left_count": sum.Waiting - sum.Judged, "waiting": sum.Waiting, "left_alone": sum.Alone,
		"seconds": sum.Took.Seconds(), "blocked": sum.Blocked, "dry_run": o.dryRun, "stopped": stopped,
	})
}

func numCPU() int { return runtime.NumCPU() }

// openQueues opens queues for looking and for releasing from quarantine.
func openQueues(ctx context.Context, c *conf.Config, names []string, store *quarantine.Store) ([]queue.Queue, error) {
	p := lookingOnly
	p.store = store
	all, err := makeQueues(ctx, c, p)
	if err != nil {
		return nil, err
	}
	var out, every []queue.Queue
	for _, q := range all {
		every = append(every, q)
		if len(names) == 0 || contains(names, q.Name()) {
			out = append(out, q)
		}
	}
	for _, n := range names {
		if !contains(queueNames(out), n) {
			return nil, failWith(exitNotFound, "no queue is named %s; there are: %s", safe.Text(n), strings.Join(queueNames(every), ", "))
		}
	}
	return out, nil
}

func queueNames(qs []queue.Queue) []string {
	var out []string
	for _, q := range qs {
		out = append(out, q.Name())
	}
	return out
}

func contains(all []string, s string) bool {
	for _, x := range all {
		if x == s {
			return true
		}
	}
	return false
}

// returnAside ends, without a daemon, a message's being set aside.
func returnAside(ctx context.Context, c *conf.Config, inQueue, id string) (n int, err error) {
	if !ledgerSound(ctx, c.Paths.Ledger) {
		return 0, nil
	}
	l, err := ledger.Open(ctx, c.Paths.Ledger, nil, func(ledger.Event) {})
	if err != nil {
		return 0, err
	}
	defer l.Close()
	rows, err := l.AsideRows()
	if err != nil {
		return 0, err
	}
	for _, a := range rows {
		if f := strings.SplitN(a.Key, "\x00", 3); len(f) == 3 && f[2] == id && (inQueue == "" || f[0] == inQueue) {
			if err := l.Return(a.Key); err != nil {
				return n, err
			}
			n++
		}
	}
	return n, nil
}

// ledgerSound says whether there is a ledger that can be opened without dying
// of it. A damaged one is said so, and left for the next start of the daemon
// to move aside: whoever looks at the queue can do without it.
func ledgerSound(ctx context.Context, path string) bool {
	if _, err := os.Stat(path); err != nil {
		return false // Holdfast has never run here
	}
	err := guard(ctx, path)
	if err == nil {
		return true
	}
	why := err.Error()
	if errors.Is(err, ledger.ErrDamaged) {
		why = "damaged; the next start of the daemon moves it aside"
	}
	fmt.Fprintf(os.Stderr, "holdfast: what is held back cannot be told: ledger %s: %s\n", safe.Text(path), safe.Text(why))
	return false
}

// heldRows tells, without a daemon, what is held.
func heldRows(ctx context.Context, c *conf.Config, each func(queueName, id, why string)) error {
	held, err := holdsOf(c).All()
	if err != nil {
		return err
	}
	for _, h := range held {
		each(h.Queue, h.ID, h.Text())
	}
	if !ledgerSound(ctx, c.Paths.Ledger) {
		return nil
	}
	l, err := ledger.OpenReadOnly(c.Paths.Ledger)
	if err != nil {
		return err
	}
	defer l.Close()
	rows, err := l.AsideRows()
	for _, a := range rows {
		if f := strings.SplitN(a.Key, "\x00", 3); len(f) == 3 {
			each(f[0], f[2], a.Why)
		}
	}
	return err
}
