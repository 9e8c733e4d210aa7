package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/cmd/holdfast/internal/setup"
)

func newSetup(g *global) *cobra.Command {
	return group("setup", "Print how an MTA on this machine hands its mail to Holdfast", newSetupPostfix(g), newSetupSendmail(g))
}

const onlyPrints = `

It only prints, as lines for a shell with comments: read them, then run them.
Holdfast itself never changes an MTA's configuration; holdfast check looks whether
the lines are in force.

` + exitHelp

func mustPrint(print bool) error {
	if !print {
		return failWith(exitUsage, "setup only prints, and wants to be told so: --print")
	}
	return nil
}

func newSetupPostfix(g *global) *cobra.Command {
	var print bool
	var p setup.Postfix
	c := &cobra.Command{
		Use: "postfix --print", Short: "Print the lines for Postfix",
		Long: "Print the lines for Postfix: hold for all mail, and the second listener, for mail that\nis changed." + onlyPrints,
		Args: arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := mustPrint(print); err != nil {
				return err
			}
			if err := askPostfix(cmd.Context(), &p); err != nil {
				return err
			}
			return p.Print(g.out)
		},
	}
	c.Flags().BoolVar(&print, "print", false, "print them")
	c.Flags().StringVar(&p.Config, "postfix", "/etc/postfix", "Postfix's configuration `DIR`")
	c.Flags().StringVar(&p.Listener, "reinject", "127.0.0.1:10027", "`HOST:PORT` of the listener for changed mail")
	c.Flags().BoolVar(&p.ByClient, "smtp-only", false, "hold mail from SMTP only, and leave header_checks alone")
	return c
}

const postfixTime = 10 * time.Second

// postconf asks for lines of Postfix's configuration.
func postconf(ctx context.Context, config string, args ...string) ([]string, error) {
	out, err := postfixCommand(ctx, config, "", "postconf", args...)
	return strings.Split(strings.TrimRight(out, "\n"), "\n"), err
}

// postmap looks a key up in one of Postfix's tables; no entry is no answer.
func postmap(ctx context.Context, config, key, table string) (string, error) {
	out, err := postfixCommand(ctx, config, "", "postmap", "-q", key, table)
	return strings.TrimSpace(out), err
}

func postsuper(ctx context.Context, config string, args ...string) error {
	_, err := postfixCommand(ctx, config, "", "postsuper", args...)
	return err
}

// sendmailTest hands a message to sendmail(1), and returns a word by which it
// is known.
func sendmailTest(ctx context.Context, config, message string) (string, error) {
	mark := fmt.Sprintf("check-%d-%d", os.Getpid(), time.Now().UnixNano())
	message = "X-Holdfast-Check: " + mark + "\n" + message
	_, err := postfixCommand(ctx, "", message, "sendmail", "-C", config, "-f", "", "-i", "holdfast-check@holdfast.invalid")
	return mark, err
}

// postfixCommand runs one of Postfix's commands, from PATH or where Debian has it.
func postfixCommand(ctx context.Context, config, in, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, postfixTime)
	defer cancel()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	if config != "" {
		args = append([]string{"-c", config}, args...)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = strings.NewReader(in)
	var diag bytes.Buffer
	cmd.Stderr = &diag
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %.300q", name, err, diag.Bytes())
	}
	return string(out), nil
}

// askPostfix reads what is set now.
func askPostfix(ctx context.Context, p *setup.Postfix) error {
	values, err := postconf(ctx, p.Config, "-hx", "queue_directory", "header_checks", "smtpd_data_restrictions")
	if err != nil {
		return err
	}
	for len(values) < 3 {
		values = append(values, "")
	}
	p.QueueDir, p.HeaderChecks, p.DataChecks = values[0], strings.TrimSpace(values[1]), strings.TrimSpace(values[2])
	services, err := postconf(ctx, p.Config, "-M")
	if err != nil {
		return err
	}
	p.Chroot = "n"
	for _, line := range services {
		if f := strings.Fields(line); len(f) >= 8 && f[1] == "inet" && f[7] == "smtpd" {
			p.Chroot = f[4]
			break
		}
	}
	options, err := postconf(ctx, p.Config, "-P")
	if err != nil {
		return err
	}
	for _, line := range options {
		name, value, _ := strings.Cut(line, " = ")
		service, ok := strings.CutSuffix(strings.TrimSpace(name), "/receive_override_options")
		if ok && service != p.Listener+"/inet" && strings.Contains(value, "no_header_body_checks") {
			p.Unchecked = append(p.Unchecked, service)
		}
	}
	return nil
}

func newSetupSendmail(g *global) *cobra.Command {
	var print bool
	var s setup.Sendmail
	c := &cobra.Command{
		Use: "sendmail --print", Short: "Print the lines for sendmail",
		Long: "Print the lines for sendmail: a daemon that only queues, without ETRN, and another\nthat delivers what Holdfast hands back." + onlyPrints,
		Args: arguments(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if err := mustPrint(print); err != nil {
				return err
			}
			if s.Program == "" {
				s.Program = "/usr/sbin/sendmail-mta"
				_, err := os.Stat("/etc/mail/sendmail.conf")
				s.Debian = err == nil
			}
			return s.Print(g.out)
		},
	}
	c.Flags().BoolVar(&print, "print", false, "print them")
	c.Flags().StringVar(&s.In, "in", "/var/spool/mqueue.in", "`DIR` of mail that is not scanned yet")
	c.Flags().StringVar(&s.Out, "out", "/var/spool/mqueue", "`DIR` that the MTA delivers from")
	c.Flags().StringVar(&s.Program, "mta", "", "sendmail's `PROGRAM`, where it is not Debian's package")
	c.Flags().StringVar(&s.CF, "cf", "", "its configuration `FILE`, if not its own")
	return c
}
