package postfix

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	commandTime = 30 * time.Second
	commandTail = 500 // bytes of a failed command's output that are shown
	postcatMost = 1 << 30
)

// Where Postfix's commands are, if they are not in PATH: root's may lack sbin.
var commandDirs = []string{"/usr/sbin", "/usr/local/sbin", "/usr/lib/postfix/sbin"}

// Command is a command of Postfix's, with the configuration it is to read.
func command(ctx context.Context, config, name string, args ...string) *exec.Cmd {
	path, err := exec.LookPath(name)
	for _, dir := range commandDirs {
		if err == nil {
			break
		}
		path = filepath.Join(dir, name)
		_, err = os.Stat(path)
	}
	cmd := exec.CommandContext(ctx, path, append([]string{"-c", config}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return cmd
}

// run runs a command and returns what it printed on either stream.
func run(ctx context.Context, config string, in io.Reader, name string, args ...string) (stdout, stderr []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	cmd := command(ctx, config, name, args...)
	var out, diag bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &diag
	if err := cmd.Run(); err != nil {
		return nil, nil, fmt.Errorf("%s: %w: %.*q", name, err, commandTail, diag.Bytes())
	}
	return out.Bytes(), diag.Bytes(), nil
}

// Parameters are what Postfix's own configuration says that we must know.
type Parameters struct {
	Version        string         // mail_version
	Dir            string         // queue_directory
	Hashed         map[string]int // depth of each hashed queue
	RecipientLimit int            // of one SMTP transaction
}

// Ask reads Postfix's parameters with postconf(1), from its configuration
// directory.
func Ask(ctx context.Context, config string) (Parameters, error) {
	names := []string{"mail_version", "queue_directory", "hash_queue_names", "hash_queue_depth", "smtpd_recipient_limit"}
	out, _, err := run(ctx, config, nil, "postconf", append([]string{"-x"}, names...)...)
	if err != nil {
		return Parameters{}, fmt.Errorf("ask Postfix for its parameters: %w", err)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(line, "=")
		got[strings.TrimSpace(name)] = strings.TrimSpace(value)
	}
	p := Parameters{Version: got["mail_version"], Dir: filepath.Clean(got["queue_directory"]), Hashed: map[string]int{}}
	depth, err := strconv.Atoi(got["hash_queue_depth"])
	if err == nil {
		p.RecipientLimit, err = strconv.Atoi(got["smtpd_recipient_limit"])
	}
	if err != nil {
		return p, fmt.Errorf("ask Postfix for its parameters: %w", err)
	}
	for _, q := range strings.FieldsFunc(got["hash_queue_names"], func(r rune) bool { return r == ' ' || r == ',' || r == '\t' }) {
		p.Hashed[q] = depth
	}
	return p, nil
}

// Known says that the queue files of a version are known: those that we write
// were read by its queue manager, or by one with the same format (3.0 to 3.10).
func (p Parameters) Known() bool {
	major, rest, _ := strings.Cut(p.Version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	n, err := strconv.Atoi(minor)
	return err == nil && major == "3" && n <= 10
}

// release has postsuper(1) take messages off hold; it reports which it took.
func (q *Queue) postsuper(ctx context.Context, what string, ids []string) (map[string]bool, error) {
	args := []string{what, "-"}
	if what == "-d" {
		args = append(args, holdDir) // never another queue's
	}
	_, diag, err := run(ctx, q.PostfixConfig, strings.NewReader(strings.Join(ids, "\n")+"\n"), "postsuper", args...)
	if err != nil {
		return nil, err
	}
	done := map[string]bool{}
	for line := range strings.Lines(string(diag)) { // postsuper: ID: removed
		if f := strings.Fields(line); len(f) >= 3 && f[0] == "postsuper:" {
			done[strings.TrimSuffix(f[1], ":")] = true
		}
	}
	return done, nil
}

// postkick sends a request to the queue manager by Postfix's own command. That
// writes the request, and then a NUL: a queue manager that has read the request
// by then has hung up, and postkick dies of SIGPIPE (seen with 3.7.11, half the
// time). It may be asked twice, so that it is asked again without the NUL.
func (q *Queue) postkick(ctx context.Context, request string) error {
	_, _, err := run(ctx, q.PostfixConfig, nil, "postkick", "public", "qmgr", request)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGPIPE {
			return trigger(filepath.Join(q.Dir, "public", "qmgr"), request)
		}
	}
	return err
}

// trigger runs the configured command that wakes the queue manager.
func (q *Queue) triggerCommand(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, q.Trigger[0], q.Trigger[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %.*q", q.Trigger[0], err, commandTail, out)
	}
	return nil
}

// postcat has Postfix's own program read a queue file that we do not
// understand: -e prints its envelope, -bh its content.
func (q *Queue) postcat(ctx context.Context, path string, to io.Writer, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	cmd := command(ctx, q.PostfixConfig, "postcat", append(args, path)...)
	var diag bytes.Buffer
	cmd.Stderr = &diag
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("postcat: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("postcat: %w", err)
	}
	n, cerr := io.Copy(to, io.LimitReader(out, postcatMost+1))
	if n > postcatMost {
		cerr = errors.Join(cerr, fmt.Errorf("it printed more than %d bytes", postcatMost))
		cancel()
	}
	if err := errors.Join(cerr, cmd.Wait()); err != nil {
		return fmt.Errorf("postcat: %w: %.*q", err, commandTail, diag.Bytes())
	}
	return nil
}
