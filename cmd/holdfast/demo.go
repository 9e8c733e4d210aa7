//go:build faults

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/cmd/holdfast/internal/sample"
)

const (
	demoMessages = 300
	demoEICAR    = 17
	demoKiller   = 101
)

func newDemo(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "demo", Short: "Drain a queue of samples, one of which kills its worker and one of which is infected",
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runDemo(cmd.Context(), g) },
	}
}

// runDemo builds a queue in a directory of its own, drains it with the real
// command, and counts what came out by looking at the directories.
func runDemo(ctx context.Context, g *global) error {
	dir, err := os.MkdirTemp("", "holdfast-demo-")
	if err != nil {
		return fmt.Errorf("make a place for the demonstration: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return fmt.Errorf("open the demonstration's directory to workers: %w", err)
	}
	in, out := filepath.Join(dir, "mqueue.in"), filepath.Join(dir, "mqueue")
	messages := sample.Demo(demoMessages, demoEICAR, demoKiller)
	for _, d := range []string{in, out} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("make a queue: %w", err)
		}
	}
	for _, m := range messages {
		if err := m.Write(in); err != nil {
			return err
		}
	}
	config := filepath.Join(dir, "holdfast.yaml")
	text := fmt.Sprintf("state: %s/state\nqueues: [{name: demo, type: sendmail, in: %s, out: %s, kick: none}]\nmin_free: 1MB\nlog: {level: error}\n", dir, in, out)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the demonstration's configuration: %w", err)
	}
	fmt.Fprintf(g.out, "%d messages in %s\n", len(messages), in)
	fmt.Fprintf(g.out, "one carries EICAR (%s), one kills its worker with SIGSEGV (%s)\n\n$ holdfast run --drain -c %s\n",
		messages[demoEICAR].ID, messages[demoKiller].ID, config)
	run := exec.CommandContext(ctx, "/proc/self/exe", "run", "--drain", "-c", config)
	run.Stdout, run.Stderr = g.out, g.err
	if err := run.Run(); err != nil {
		return fmt.Errorf("holdfast run --drain: %w", err)
	}
	list := exec.CommandContext(ctx, "/proc/self/exe", "quarantine", "list", "-c", config, "--json")
	var items bytes.Buffer
	list.Stdout, list.Stderr = &items, g.err
	if err := list.Run(); err != nil {
		return fmt.Errorf("holdfast quarantine list: %w", err)
	}
	return demoAccount(g, messages, in, out, items.Bytes())
}

// demoAccount compares what went in with what is in the directories now.
func demoAccount(g *global, messages []sample.Message, in, out string, items []byte) error {
	why := map[string]string{}
	dec := json.NewDecoder(bytes.NewReader(items))
	for dec.More() {
		var it struct {
			ID      string   `json:"id"`
			Reasons []string `json:"reasons"`
		}
		if err := dec.Decode(&it); err != nil {
			return fmt.Errorf("read the list of the quarantine: %w", err)
		}
		why[it.ID] = strings.Join(it.Reasons, "; ")
	}
	var wrong []string
	released := 0
	for i, m := range messages {
		kept := i == demoEICAR || i == demoKiller
		reason, quarantined := why[m.ID]
		body, err := os.ReadFile(filepath.Join(out, "df"+m.ID))
		control, qerr := os.ReadFile(filepath.Join(out, "qf"+m.ID))
		switch {
		case kept && !quarantined:
			wrong = append(wrong, m.ID+" should be in quarantine")
		case kept && !errors.Is(qerr, os.ErrNotExist):
			wrong = append(wrong, m.ID+" was released as well")
		case kept:
			fmt.Fprintf(g.out, "quarantined %s: %s\n", m.ID, safe.Text(reason))
		case quarantined:
			wrong = append(wrong, m.ID+" is an innocent in quarantine: "+reason)
		case err != nil || qerr != nil:
			wrong = append(wrong, fmt.Sprintf("%s did not arrive: %v", m.ID, errors.Join(err, qerr)))
		case !bytes.Equal(body, m.Body) || !bytes.Equal(control, m.Control()):
			wrong = append(wrong, m.ID+" was changed")
		default:
			released++
		}
	}
	left, err := os.ReadDir(in)
	if err != nil {
		return fmt.Errorf("look at the inbound queue: %w", err)
	}
	for _, e := range left {
		wrong = append(wrong, "left in the inbound queue: "+e.Name())
	}
	fmt.Fprintf(g.out, "\nin %d, out %d unchanged, quarantined %d, mismatches %d\n", len(messages), released, len(why), len(wrong))
	if len(wrong) > 0 {
		sort.Strings(wrong)
		return failWith(exitFailed, "the demonstration did not go as it must:\n%s", strings.Join(wrong, "\n"))
	}
	return nil
}
