package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/check"
	"holdfast/cmd/holdfast/internal/control"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
)

func newCheck(g *global) *cobra.Command {
	var smtp string
	var sendTest bool
	c := &cobra.Command{
		Use: "check", Short: "Read configuration and machine: what is fine, what is not, what to do",
		Long: "Read configuration and machine: what is fine, what is not, what to do. Changes\nnothing. Ends with 1 if something would stop mail or break a promise.\n\n" + exitHelp,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runCheck(cmd.Context(), g, smtp, sendTest) },
	}
	c.Flags().StringVar(&smtp, "smtp", "127.0.0.1:25", "`HOST:PORT` of the listener that queues for Holdfast; empty: do not ask it")
	c.Flags().BoolVar(&sendTest, "send-test", false, "Postfix: send a message of its own by each route, see that it is put on hold, and remove it")
	return c
}

func runCheck(ctx context.Context, g *global, smtp string, sendTest bool) error {
	if _, port, err := net.SplitHostPort(smtp); smtp != "" && (err != nil || port == "") {
		return failWith(exitUsage, "--smtp %s is no HOST:PORT", safe.Text(smtp))
	}
	c, err := g.load()
	if err != nil {
		return err
	}
	paused := ""
	if p := readPause(c); p != nil {
		paused = "paused by " + p.By + " since " + p.At.Local().Format(time.DateTime)
	}
	all := check.Run(ctx, c, check.Host{
		Proc: "/proc", MailDir: "/etc/mail", SMTP: smtp, UID: os.Geteuid(), Sandbox: probeSandbox, Paused: paused, Kick: kickCommand,
		PidFiles: []string{"/run/sendmail/*/*.pid", "/run/sendmail*.pid", "/var/run/sendmail/*/*.pid", "/var/run/sendmail*.pid", "/etc/mail/*.pid"},
		Daemon: func(ctx context.Context) (check.Daemon, error) {
			st, err := control.Dial(c.Paths.Control).Status(ctx)
			if errors.Is(err, control.ErrNoDaemon) {
				return check.Daemon{}, nil
			}
			return check.Daemon{PID: st.PID, Blocked: st.Breaker, ReloadRefused: st.ReloadRefused}, err
		},
		Postconf: postconf, Postmap: postmap, Postsuper: postsuper, Sendmail: sendmailTest, SendTest: sendTest,
	})
	for _, f := range all {
		if g.json {
			if err := safe.WriteJSON(g.out, f); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(g.out, "%-8s %-12s %s\n", f.Level, safe.Text(f.Topic), safe.Text(f.Text))
		if f.Do != "" {
			fmt.Fprintf(g.out, "%21s → %s\n", "", safe.Text(f.Do))
		}
	}
	if check.Worst(all) == check.Failure {
		return failWith(exitFailed, "not everything is in order")
	}
	return nil
}

// probeSandbox lets a process shut itself in as a worker does.
func probeSandbox(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", childProbe)
	var out bytes.Buffer
	cmd.Stdout = &out
	err := cmd.Run()
	var lacks []string
	for line := range strings.Lines(out.String()) {
		lacks = append(lacks, strings.TrimSpace(line))
	}
	if len(lacks) > 0 {
		return lacks, nil
	}
	return nil, err
}

func newConfigExample(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "config-example", Short: "Print a configuration with every setting, its meaning and its default",
		Args: arguments(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			_, err := g.out.Write(conf.Example())
			return err
		},
	}
}
