package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/poison"
	"holdfast/poison/proc"
	"holdfast/queue/history"
	"holdfast/scan"
	"holdfast/scan/wire"
	"holdfast/scan/worker"
)

// Workers runs messages through fresh worker processes. It implements Runner.
type Workers struct {
	Path       string // of the program; /proc/self/exe survives an upgrade on disk
	Args       []string
	Starter    *proc.Starter
	UID, GID   int // 0 keeps ours
	RunDir     string
	Settings   wire.Settings
	MoreMemory int64
	CPU, Wall  time.Duration // for one message
	Build      string
}

// Version is the worker's build.
func (w *Workers) Version() string { return w.Build }

// Run starts a worker and has it look at the messages.
func (w *Workers) Run(ctx context.Context, job Job) Result {
	start := time.Now()
	res := Result{Reports: make([]*scan.Report, len(job.Messages)), Stages: make([][]history.Stage, len(job.Messages)), Stamped: -1}
	s := w.Settings
	if job.More {
		s.Memory = w.MoreMemory
	}
	n := time.Duration(max(len(job.Messages), 1))
	s.CPUSeconds = int64((w.CPU*n)/time.Second) + 5 // a backstop behind our own measure
	conn, theirs, err := worker.Pair()
	if err != nil {
		res.Death = &poison.Death{Class: poison.ClassResource, Signature: "no worker: " + err.Error()}
		return res
	}
	defer conn.Close()
	p, err := w.Starter.Start(proc.Spec{
		Path: w.Path, Args: w.Args, Env: []string{"GOTRACEBACK=single", "GOMAXPROCS=2"}, Files: []*os.File{theirs}, Crash: 1,
		UID: w.UID, GID: w.GID, CPU: w.CPU * n, Wall: w.Wall * n, What: "worker", RunDir: w.RunDir,
	})
	theirs.Close()
	if err != nil {
		res.Death = &poison.Death{Class: poison.ClassResource, Signature: "no worker: " + err.Error()}
		return res
	}
	talk := conversation{res: &res, job: job, begun: time.Now()}
	err = talk.run(ctx, conn, s)
	if err != nil && !errors.Is(err, worker.ErrEnded) {
		p.Kill(poison.KilledStopped)
	}
	x := p.Wait(ctx)
	res.Took, res.Stderr, res.Crash = time.Since(start), x.Stderr, x.Crash
	said := ""
	switch {
	case errors.Is(err, wire.ErrProtocol), errors.Is(err, worker.ErrSandbox):
		said = err.Error()
	case ctx.Err() != nil:
		x.Killed = poison.KilledStopped
	}
	if res.Death = poison.Classify(x, said, err == nil); res.Death != nil {
		res.Death.Stage, res.Death.Part = talk.stage, talk.part
	}
	return res
}

// conversation follows what a worker says, and times its stages.
type conversation struct {
	res         *Result
	job         Job
	begun       time.Time
	stage, part string
	at          int
}

func (c *conversation) run(ctx context.Context, conn *worker.Conn, s wire.Settings) error {
	files := make([]*os.File, len(c.job.Messages))
	for i, m := range c.job.Messages {
		files[i] = m.File
	}
	return conn.Run(ctx, s, files, worker.Handler{
		Stamp: func(i int, stage, part string) {
			c.close(i)
			c.stage, c.part, c.at = stage, part, i
			c.res.Stamped = i
			c.job.Stamp(i, stage, part)
		},
		Report: func(i int, r scan.Report) {
			c.close(i)
			c.stage, c.part = "", ""
			c.res.Stamped = -1
			c.res.Reports[i] = &r
		},
	})
}

// close books the time of the stage that ends.
func (c *conversation) close(i int) {
	now := time.Now()
	if c.stage != "" && c.at == i {
		st := &c.res.Stages[i]
		if n := len(*st); n > 0 && (*st)[n-1].Name == c.stage {
			(*st)[n-1].Duration += now.Sub(c.begun)
		} else if n < 20 {
			*st = append(*st, history.Stage{Name: c.stage, Duration: now.Sub(c.begun)})
		}
	}
	c.begun = now
}

// Canary makes a benign message of about the given size and part count.
func (w *Workers) Canary(size int64, parts int) (*os.File, error) {
	fd, err := unix.MemfdCreate("canary", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make a canary: %w", err)
	}
	f := os.NewFile(uintptr(fd), "canary")
	if _, err := f.Write(canary(size, parts)); err != nil {
		f.Close()
		return nil, fmt.Errorf("make a canary: %w", err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal a canary: %w", err)
	}
	return f, nil
}

const maxCanary = 64 << 20

func canary(size int64, parts int) []byte {
	parts = min(max(parts, 1), 100)
	var b bytes.Buffer
	b.WriteString("From: canary@holdfast.invalid\nSubject: a known good message\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=canary\n\n")
	each := int(min(size, maxCanary))/parts + 1
	for range parts {
		b.WriteString("--canary\nContent-Type: text/plain\n\n")
		for n := 0; n < each; n += 64 {
			b.WriteString("all is well with this message, and with what has to parse it. \n")
		}
	}
	b.WriteString("--canary--\n")
	return b.Bytes()
}
