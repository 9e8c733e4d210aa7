// Package control is the daemon's socket: HTTP and JSON on a unix socket of
// mode 0600. It tells what only the running daemon knows, and wakes it.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/conf"
)

// Status is what the daemon tells of itself.
type Status struct {
	Version  string           `json:"version"`
	PID      int              `json:"pid"`
	Started  time.Time        `json:"started"`
	Paused   bool             `json:"paused"`
	Breaker  string           `json:"breaker,omitempty"` // why no mail is taken, if so
	InFlight []InFlight       `json:"in_flight"`
	Waiting  []Waiting        `json:"waiting"`
	Counts   map[string]int64 `json:"counts"` // since the daemon started, by disposition
	Skipped  map[string]int   `json:"skipped"`

	// Loaded is when the configuration in use was read.
	Loaded time.Time `json:"loaded"`
	// ReloadRefused says why the last SIGHUP changed nothing, "" if it did.
	ReloadRefused string `json:"reload_refused,omitempty"`
}

// InFlight is one claimed message.
type InFlight struct {
	Queue string    `json:"queue"`
	ID    string    `json:"id"`
	Since time.Time `json:"since"`
	Stage string    `json:"stage"` // what is being done to it
	Part  string    `json:"part,omitempty"`
}

// Waiting is one message that is left alone for a while.
type Waiting struct {
	Queue string    `json:"queue"`
	ID    string    `json:"id"`
	Until time.Time `json:"until"` // zero: until a person decides
	Tries int       `json:"tries"`
	Why   string    `json:"why"`
}

// Daemon is what the socket serves.
type Daemon interface {
	// Status may be called from any goroutine.
	Status(ctx context.Context) (Status, error)
	// Wake makes the daemon look at its queues and its pause file now.
	Wake()
	// Retry takes a message again that is left alone: how many had the name.
	Retry(ctx context.Context, queue, id string) (int, error)
	// Settle carries out a person's decision about a held message.
	Settle(ctx context.Context, o Order) error
	// Sources are the files of the configuration in force.
	Sources() []conf.Source
}

// Order is what a person decided about a held message.
type Order struct {
	Queue, ID string // any queue, if Queue is empty
	Do        string // release or quarantine
	By        string // who
}

// ErrNotHeld says that no such message is held.
var ErrNotHeld = errors.New("no such message is held")

const (
	maxAnswer = 64 << 20 // bytes of an answer that a client reads
	ioTimeout = 30 * time.Second
)

// ErrNoDaemon says that nobody answers on the socket.
var ErrNoDaemon = errors.New("no daemon runs")

// Serve answers on the socket at path until ctx ends. It replaces a socket
// that a dead daemon left, and refuses to replace one that answers.
func Serve(ctx context.Context, path string, d Daemon) error {
	l, err := listen(path)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		st, err := d.Status(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// The client sees a cut answer as broken JSON: there is nobody else to tell.
		_ = json.NewEncoder(w).Encode(st)
	})
	mux.HandleFunc("POST /v1/wake", func(w http.ResponseWriter, _ *http.Request) {
		d.Wake()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /v1/retry", func(w http.ResponseWriter, r *http.Request) {
		n, err := d.Retry(r.Context(), r.URL.Query().Get("queue"), r.URL.Query().Get("id"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintf(w, "%d\n", n)
	})
	mux.HandleFunc("POST /v1/settle", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		err := d.Settle(r.Context(), Order{Queue: q.Get("queue"), ID: q.Get("id"), Do: q.Get("do"), By: q.Get("by")})
		a := settled{NotHeld: errors.Is(err, ErrNotHeld)}
		if err != nil {
			a.Error = err.Error()
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(a)
	})
	mux.HandleFunc("GET /v1/config", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(d.Sources())
	})
	srv := &http.Server{
		Handler: mux, ReadTimeout: ioTimeout, WriteTimeout: ioTimeout, IdleTimeout: ioTimeout,
		MaxHeaderBytes: 16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve control socket %s: %w", path, err)
	}
	return nil
}

// listen binds under umask 0177: the socket is never open to others, not
// even for the moment until a chmod.
func listen(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("control socket %s: another daemon answers on it", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the control socket of a dead daemon: %w", err)
		}
	}
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on control socket %s: %w", path, err)
	}
	return l, nil
}

// Client asks the daemon.
type Client struct{ http *http.Client }

// Dial makes a client for the socket at path. It connects with each request.
func Dial(path string) *Client {
	var d net.Dialer
	return &Client{http: &http.Client{
		Timeout: ioTimeout,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return d.DialContext(ctx, "unix", path)
			},
		},
	}}
}

// Status asks for the daemon's status; ErrNoDaemon if none runs.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	body, err := c.do(ctx, http.MethodGet, "/v1/status")
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(body, &st); err != nil {
		return st, fmt.Errorf("read the daemon's status: %w", err)
	}
	return st, nil
}

// Wake makes the daemon look around now; ErrNoDaemon if none runs.
func (c *Client) Wake(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/v1/wake")
	return err
}

// Retry asks the daemon to take a message again; ErrNoDaemon if none runs.
func (c *Client) Retry(ctx context.Context, queue, id string) (int, error) {
	body, err := c.do(ctx, http.MethodPost, "/v1/retry?"+url.Values{"queue": {queue}, "id": {id}}.Encode())
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(body)))
	if err != nil {
		return 0, fmt.Errorf("read the daemon's answer: %w", err)
	}
	return n, nil
}

type settled struct {
	NotHeld bool   `json:"not_held"`
	Error   string `json:"error"`
}

// Settle has the daemon carry out a decision; ErrNotHeld, or ErrNoDaemon if
// none runs.
func (c *Client) Settle(ctx context.Context, o Order) error {
	body, err := c.do(ctx, http.MethodPost, "/v1/settle?"+url.Values{"queue": {o.Queue}, "id": {o.ID}, "do": {o.Do}, "by": {o.By}}.Encode())
	if err != nil {
		return err
	}
	var a settled
	switch err := json.Unmarshal(body, &a); {
	case err != nil:
		return fmt.Errorf("read the daemon's answer: %w", err)
	case a.NotHeld:
		return ErrNotHeld
	case a.Error != "":
		return errors.New(a.Error)
	}
	return nil
}

// Config asks for the configuration in force; ErrNoDaemon if none runs. The
// files that it came from may have changed since.
func (c *Client) Config(ctx context.Context) (*conf.Config, error) {
	body, err := c.do(ctx, http.MethodGet, "/v1/config")
	if err != nil {
		return nil, err
	}
	var files []conf.Source
	if err := json.Unmarshal(body, &files); err != nil {
		return nil, fmt.Errorf("read the daemon's configuration: %w", err)
	}
	return conf.Parse(files)
}

func (c *Client) do(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://holdfast"+path, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("ask the daemon: %w", err)
	}
	res, err := c.http.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrNoDaemon
	}
	if err != nil {
		return nil, fmt.Errorf("ask the daemon: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read the daemon's answer: %w", err)
	}
	if res.StatusCode >= 300 {
		return nil, fmt.Errorf("daemon answers %s: %s", res.Status, bytes.TrimSpace(body))
	}
	return body, nil
}
