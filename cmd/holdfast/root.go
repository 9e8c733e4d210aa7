package main

import (
	"github.com/spf13/cobra"

	"holdfast/conf"
)

const defaultConfig = "/etc/holdfast/holdfast.yaml"

// global is what every command takes.
type global struct {
	streams
	config string
	json   bool
}

// load reads the configuration that -c names.
func (g *global) load() (*conf.Config, error) { return conf.Load(g.config) }

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
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Version:           version,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{code: exitUsage, err: err} })
	root.PersistentFlags().StringVarP(&g.config, "config", "c", defaultConfig, "configuration `FILE`")
	root.PersistentFlags().BoolVar(&g.json, "json", false, "print JSON, one object per line")
	root.AddCommand(newRun(g), newSupervise(g), newCheck(g), newQueue(g), newQuarantine(g), newExplain(g), newHold(g), newSetup(g),
		newPause(g), newResume(g), newConfigExample(g))
	addFaultCommands(root, g)
	return root
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
	c := &cobra.Command{Use: use, Short: short, Args: arguments(cobra.NoArgs), RunE: func(cmd *cobra.Command, _ []string) error {
		if err := cmd.Help(); err != nil {
			return err
		}
		return failWith(exitUsage, "%s needs a command", cmd.CommandPath())
	}}
	c.AddCommand(of...)
	return c
}
