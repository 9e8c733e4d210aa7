// Package keeper starts the supervisor, and starts it again when it dies.
package keeper

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options say what is kept running.
type Options struct {
	Path, Name string // executable, and argv[0]
	Args       []string
	Stdout     io.Writer
	Stderr     io.Writer
	First      time.Duration // delay after a death, doubling
	Most       time.Duration
	Settled    time.Duration // a life of this length resets the delay
	Died       func(how string, again time.Duration)
	Stopped    func(os.Signal) int // the exit code when it is stopped while no supervisor runs; nil: 0

	began time.Time
}

// Environment variables by which the supervisor knows its keeper.
const (
	byeFD    = "HOLDFAST_KEEPER_FD" // descriptor on which an orderly end is announced
	lastLife = "HOLDFAST_LAST_DEATH"
	began    = "HOLDFAST_BEGAN" // unix nanoseconds
)

// Bye announces an orderly end with an exit code. Without it any end, even
// one with status 0, counts as a death.
func Bye(code int) error {
	fd, err := strconv.Atoi(os.Getenv(byeFD))
	if err != nil {
		return nil // no keeper: started by hand
	}
	f := os.NewFile(uintptr(fd), "keeper")
	if _, err := fmt.Fprintf(f, "bye %d\n", code); err != nil {
		return fmt.Errorf("tell the keeper: %w", err)
	}
	return nil
}

// LastDeath is how the previous life ended, "" if this is the first.
func LastDeath() string { return os.Getenv(lastLife) }

// Began is when the keeper started its first supervisor; died says that this is
// not the first.
func Began() (at time.Time, died bool) {
	n, err := strconv.ParseInt(os.Getenv(began), 10, 64)
	return time.Unix(0, n), err == nil && LastDeath() != ""
}

// Run keeps the supervisor running until it ends in an orderly way, and
// returns its exit code. SIGTERM, SIGINT and SIGHUP are passed on; after one
// that ends it, it is not started again.
func Run(ctx context.Context, o Options) (int, error) {
	runtime.LockOSThread() // the parent-death signal is tied to the thread that forks
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)
	delay, last, stopping := o.First, "", false
	o.began = time.Now()
	for {
		start := time.Now()
		code, how, err := life(ctx, o, last, signals, &stopping)
		if err != nil {
			return 1, err
		}
		if how == "" {
			return code, nil
		}
		if stopping {
			return 1, fmt.Errorf("the supervisor died while stopping: %s", how)
		}
		if time.Since(start) > o.Settled {
			delay = o.First
		}
		last = how
		o.Died(how, delay)
		select {
		case <-time.After(delay):
		case s := <-signals:
			if s != unix.SIGHUP {
				return o.stopped(s), nil
			}
		}
		delay = min(2*delay, o.Most)
	}
}

func (o Options) stopped(s os.Signal) int {
	if o.Stopped == nil {
		return 0
	}
	return o.Stopped(s)
}

// life runs the supervisor once. how is "" if it ended in order.
func life(_ context.Context, o Options, last string, signals <-chan os.Signal, stopping *bool) (code int, how string, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 1, "", fmt.Errorf("start the supervisor: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(o.Path, o.Args...)
	cmd.Args[0] = o.Name
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, o.Stdout, o.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.Env = append(os.Environ(), byeFD+"=3", lastLife+"="+last, began+"="+strconv.FormatInt(o.began.UnixNano(), 10))
	// In its own group a signal from the terminal comes once, through us; and
	// without us it stops in an orderly way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		w.Close()
		return 1, "", fmt.Errorf("start the supervisor: %w", err)
	}
	w.Close()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			*stopping = *stopping || s != unix.SIGHUP
			_ = cmd.Process.Signal(s) // gone already: the next turn sees it
		case werr := <-ended:
			text, rerr := io.ReadAll(io.LimitReader(r, 64))
			if rerr == nil {
				if n, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "bye "); ok {
					if code, err := strconv.Atoi(n); err == nil {
						return code, "", nil
					}
				}
			}
			if werr == nil {
				return 0, "ended without a word", nil
			}
			return 1, werr.Error(), nil
		}
	}
}
