// Command holdfast scans the mail that an MTA leaves in a queue directory,
// and no message can stop the mail.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
)

// version is set by the linker for releases.
var version = "0.1-dev"

func main() {
	if code, ok := child(os.Args[1:]); ok {
		os.Exit(code)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := execute(ctx, os.Args[1:], streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
	stop()
	os.Exit(code)
}

// streams are where a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// Exit codes, the same for every command.
const (
	exitFailed     = 1
	exitUsage      = 2
	exitPartly     = 3 // some of it was done, or something is left
	exitNoDaemon   = 4
	exitNotFound   = 5
	exitInterrupts = 130
)

const exitHelp = `Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 partly done or
something is left, 4 no daemon runs, 5 not found, 130 interrupted.`

// exitError is an error that ends the program with a code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func failWith(code int, format string, args ...any) error {
	return &exitError{code: code, err: fmt.Errorf(format, args...)}
}

// execute runs one command line and returns the exit code: the one place
// where errors become codes and text.
func execute(ctx context.Context, args []string, s streams) int {
	root := newRoot(s)
	root.SetArgs(args)
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var coded *exitError
	var wrong conf.Errors
	switch {
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(s.err, "holdfast: interrupted")
		return exitInterrupts
	case errors.As(err, &wrong):
		complain(s.err, err)
		return exitUsage
	}
	complain(s.err, err)
	if errors.As(err, &coded) {
		return coded.code
	}
	return exitFailed
}

// complain prints an error; mistakes in a configuration with their lines.
func complain(w io.Writer, err error) {
	var wrong conf.Errors
	if errors.As(err, &wrong) {
		fmt.Fprintln(w, strings.TrimRight(wrong.Format(), "\n"))
		return
	}
	text := err.Error()
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		text += " (run it as root)"
	}
	if text != "" {
		fmt.Fprintf(w, "holdfast: %s\n", safe.Text(text))
	}
}
