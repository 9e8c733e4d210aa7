package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/conf"
)

// pauseFile is the file whose presence stops claiming, in this life of the
// daemon and the next.
func pauseFile(c *conf.Config) string { return filepath.Join(c.State, "paused") }

type pauseNote struct {
	By string    `json:"by"`
	At time.Time `json:"at"`
}

func newPause(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "pause", Short: "Take no more mail until resume, across restarts too",
		Long: "Take no more mail until resume, across restarts too. What is in work is finished;\nnew mail waits untouched in the MTA's inbound queue.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runPause(cmd.Context(), g) },
	}
}

func runPause(ctx context.Context, g *global) error {
	c, err := g.load()
	if err != nil {
		return err
	}
	path := pauseFile(c)
	if _, err := os.Lstat(path); err == nil {
		fmt.Fprintln(g.out, "already paused")
		return nil
	}
	text, err := json.Marshal(pauseNote{By: who(), At: time.Now().UTC()})
	if err != nil {
		return fmt.Errorf("encode pause note: %w", err)
	}
	if err := os.WriteFile(path, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	return tell(ctx, g, c, "paused: no more mail is taken until holdfast resume")
}

func newResume(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "resume", Short: "Take mail again after pause", Long: "Take mail again after pause.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runResume(cmd.Context(), g) },
	}
}

func runResume(ctx context.Context, g *global) error {
	c, err := g.load()
	if err != nil {
		return err
	}
	err = os.Remove(pauseFile(c))
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintln(g.out, "not paused")
		return nil
	}
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	return tell(ctx, g, c, "resumed")
}

// tell wakes the daemon, if one runs, and says what was done.
func tell(ctx context.Context, g *global, c *conf.Config, what string) error {
	err := control.Dial(c.Paths.Control).Wake(ctx)
	switch {
	case errors.Is(err, control.ErrNoDaemon):
		what += " (no daemon runs now)"
	case err != nil:
		return fmt.Errorf("%s, but the daemon could not be told: %w", what, err)
	}
	fmt.Fprintln(g.out, what)
	return nil
}

// who names the person at the keyboard, for records.
func who() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}
