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
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	path := pauseFile(c)
	if before := readPause(c); before != nil {
		return done(g, pauseAnswer{Paused: true, By: before.By, At: &before.At}, "already paused, by %s since %s", before.By, before.At.Local().Format(time.DateTime))
	}
	note := pauseNote{By: who(), At: time.Now().UTC()}
	text, err := json.Marshal(note)
	if err != nil {
		return fmt.Errorf("encode pause note: %w", err)
	}
	if err := os.WriteFile(path, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	return tell(ctx, g, c, pauseAnswer{Paused: true, By: note.By, At: &note.At, Changed: true}, "paused: no more mail is taken until holdfast resume")
}

func newResume(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "resume", Short: "Take mail again after pause", Long: "Take mail again after pause.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runResume(cmd.Context(), g) },
	}
}

func runResume(ctx context.Context, g *global) error {
	c, err := g.current(ctx)
	if err != nil {
		return err
	}
	err = os.Remove(pauseFile(c))
	if errors.Is(err, fs.ErrNotExist) {
		return done(g, pauseAnswer{}, "not paused")
	}
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	return tell(ctx, g, c, pauseAnswer{Changed: true}, "resumed")
}

// pauseAnswer is what pause and resume say as JSON.
type pauseAnswer struct {
	Paused  bool       `json:"paused"`
	Changed bool       `json:"changed"`
	By      string     `json:"by,omitempty"`
	At      *time.Time `json:"at,omitempty"`
	Told    bool       `json:"daemon_told"`
}

// tell wakes the daemon, if one runs, and says what was done.
func tell(ctx context.Context, g *global, c *conf.Config, answer pauseAnswer, what string) error {
	err := control.Dial(c.Paths.Control).Wake(ctx)
	switch {
	case errors.Is(err, control.ErrNoDaemon):
		what += " (no daemon runs now)"
	case err != nil:
		return fmt.Errorf("%s, but the daemon could not be told: %w", what, err)
	}
	answer.Told = err == nil
	return done(g, answer, "%s", what)
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
