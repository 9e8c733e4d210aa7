package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
)

const (
	defaultConfig = "/etc/holdfast/holdfast.yaml"
	defaultSocket = "/var/lib/holdfast/control.sock"
)

// global is what every command takes.
type global struct {
	streams
	config string
	socket string
	json   bool
}

// load reads the configuration that -c names.
func (g *global) load() (*conf.Config, error) {
	c, err := conf.Load(g.config)
	var wrong conf.Errors
	if err == nil || errors.As(err, &wrong) {
		return c, err
	}
	if _, serr := os.Stat(g.config); errors.Is(serr, fs.ErrNotExist) {
		err = fmt.Errorf("%w; write one: holdfast config-example > %s", err, g.config)
	}
	return nil, &exitError{code: exitUsage, err: err}
}

// current is the configuration for the daily commands. If the file cannot be
// used, and a daemon runs well with what it has read before, that is taken:
// mail must be in reach while somebody edits.
func (g *global) current(ctx context.Context) (*conf.Config, error) {
	c, err := g.load()
	if err == nil {
		return c, nil
	}
	c, derr := control.Dial(g.socket).Config(ctx)
	if derr != nil {
		return nil, err
	}
	complain(g.err, err)
	fmt.Fprintln(g.err, "holdfast: this configuration cannot be used; the one that the daemon runs with is used instead")
	return c, nil
}

func newRoot(s streams) *cobra.Command {
	g := &global{streams: s}
	root := &cobra.Command{
		Use:   "holdfast",
		Short: "Scan the mail that an MTA queues; no message can stop the mail",
		Long: `Holdfast takes messages from an MTA's queue directory, has each one judged in
a process of its own that is allowed to die, and hands it back to the MTA or
keeps it in quarantine.

Day by day:
  holdfast check               is everything in order?
  holdfast queue list          what waits, and why
  holdfast quarantine list     what was kept back
  holdfast explain ID          what was done with a message, and why

` + exitHelp,
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions:          cobra.CompletionOptions{HiddenDefaultCmd: true},
		Version:                    version,
		SuggestionsMinimumDistance: 2,
		Args:                       cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknown(cmd, args[0])
			}
			return cmd.Help()
		},
	}
	root.SetHelpCommand(newHelp())
	root.Flags().Bool("version", false, "print the version") // without it, cobra adds -v, too
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{code: exitUsage, err: err} })
	root.PersistentFlags().StringVarP(&g.config, "config", "c", defaultConfig, "configuration `FILE`")
	root.PersistentFlags().StringVar(&g.socket, "socket", defaultSocket, "the daemon's control socket, `FILE`, which is asked for the configuration\nif the file cannot be used")
	root.PersistentFlags().BoolVar(&g.json, "json", false, "print JSON, one object per line")
	root.AddCommand(newRun(g), newSupervise(g), newCheck(g), newQueue(g), newQuarantine(g), newExplain(g), newHold(g), newSetup(g),
		newPause(g), newResume(g), newConfigExample(g))
	addFaultCommands(root, g)
	return root
}

// unknown is the error for a command that does not exist.
func unknown(cmd *cobra.Command, name string) error {
	text := ""
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		text = "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return failWith(exitUsage, "no command is named %s%s (see holdfast help)", safe.Text(name), text)
}

func newHelp() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND…]", Short: "Tell about a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return unknown(cmd.Root(), strings.Join(args, " "))
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}

// arguments wraps cobra's checks so that wrong usage ends with its own code.
func arguments(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return failWith(exitUsage, "%w (see holdfast help %s)", err, cmd.CommandPath()[len("holdfast "):])
		}
		return nil
	}
}

// group is a command that only holds others.
func group(use, short string, of ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, SuggestionsMinimumDistance: 2, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknown(cmd, args[0])
		}
		if err := cmd.Help(); err != nil {
			return err
		}
		return failWith(exitUsage, "%s needs a command", cmd.CommandPath())
	}}
	c.AddCommand(of...)
	return c
}
