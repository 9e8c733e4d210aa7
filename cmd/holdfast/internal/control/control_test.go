package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/conf"
)

type daemon struct {
	status Status
	woken  chan struct{}
	files  []conf.Source
}

func (d *daemon) Status(context.Context) (Status, error) { return d.status, nil }
func (d *daemon) Retry(_ context.Context, queue, id string) (int, error) {
	return len(queue) + len(id), nil
}
func (d *daemon) Sources() []conf.Source { return d.files }
func (d *daemon) Settle(_ context.Context, o Order) error {
	if o.ID == "nothing" {
		return ErrNotHeld
	}
	return fmt.Errorf("told %+v", o)
}
func (d *daemon) Wake() { d.woken <- struct{}{} }

// serve starts a socket and waits until it answers.
func serve(t *testing.T, path string, d Daemon) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, path, d) }()
	for {
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
		if _, err := Dial(path).Status(ctx); err == nil {
			return func() error { cancel(); return <-done }
		}
		time.Sleep(time.Millisecond)
	}
}

func TestTheConfigurationInForceCanBeHad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	text := "queues: [{name: q, type: sendmail, in: /in, out: /out}]\nmonitor: yes\n"
	stop := serve(t, path, &daemon{files: []conf.Source{{Name: "/etc/h.yaml", Data: []byte(text)}}})
	c, err := Dial(path).Config(t.Context())
	if err != nil || !c.Monitor || c.Pos("monitor") != "/etc/h.yaml:2" {
		t.Errorf("%+v, %v", c, err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(path).Config(t.Context()); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("%v", err)
	}
}

func TestAClientSeesTheStatusAndWakesTheDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	d := &daemon{woken: make(chan struct{}, 1), status: Status{PID: 42, InFlight: []InFlight{{ID: "q1", Stage: "parse"}}}}
	stop := serve(t, path, d)
	st, err := Dial(path).Status(t.Context())
	if err != nil || st.PID != 42 || len(st.InFlight) != 1 || st.InFlight[0].Stage != "parse" {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := Dial(path).Wake(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-d.woken
	if n, err := Dial(path).Retry(t.Context(), "a&b", "c d"); err != nil || n != 6 {
		t.Fatalf("%d, %v", n, err)
	}
	if err := Dial(path).Settle(t.Context(), Order{"q", "a b&", "release", "joe"}); err == nil || err.Error() != "told {Queue:q ID:a b& Do:release By:joe}" {
		t.Fatal(err)
	}
	if err := Dial(path).Settle(t.Context(), Order{ID: "nothing"}); !errors.Is(err, ErrNotHeld) {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(path).Status(t.Context()); !errors.Is(err, ErrNoDaemon) {
		t.Fatalf("after the end: %v", err)
	}
}

func TestASecondDaemonIsRefusedAndADeadOnesSocketReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	d := &daemon{woken: make(chan struct{}, 1)}
	stop := serve(t, path, d)
	if err := Serve(t.Context(), path, d); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Fatalf("second: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), path, d); err == nil {
		t.Fatal("replaced a file that is no socket")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	stop = serve(t, path, d)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}
