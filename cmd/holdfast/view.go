package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"holdfast/cmd/holdfast/internal/control"
	"holdfast/conf"
	"holdfast/queue"
)

// What is being done with a message in an inbound queue.
const (
	stateWaiting  = "waiting"
	stateInFlight = "in_flight"
	stateDelayed  = "delayed"    // it could not be handled, and is tried again
	stateHeld     = "held"       // until a person decides
	stateLeft     = "left_alone" // not for Holdfast to take
)

// queueRow is one message of an inbound queue, as people and programs see it.
type queueRow struct {
	Queue   string     `json:"queue"`
	ID      string     `json:"id"`
	Dir     string     `json:"dir"`
	Since   time.Time  `json:"since"`
	Size    int64      `json:"size"`
	State   string     `json:"state"`
	RetryAt *time.Time `json:"retry_at,omitempty"` // delayed
	TakenAt *time.Time `json:"taken_at,omitempty"` // in flight
	Why     string     `json:"why,omitempty"`
	File    string     `json:"file,omitempty"` // left alone
	Do      string     `json:"do,omitempty"`
}

// text is the state for people.
func (r queueRow) text() string {
	state := strings.ReplaceAll(r.State, "_", " ")
	if r.RetryAt != nil {
		state += " until " + r.RetryAt.Local().Format(time.TimeOnly)
	}
	if r.TakenAt != nil {
		state += " since " + r.TakenAt.Local().Format(time.TimeOnly)
	}
	if r.Why != "" {
		state += ": " + r.Why
	}
	return state
}

// view is what is known beside the queues' directories.
type view struct {
	rows   map[string]queueRow // what is not just waiting, by queue and id
	daemon *control.Status     // nil: none runs
	paused *pauseNote          // nil: it is not
}

// look asks the daemon; without one, the ledger tells what is held.
func look(ctx context.Context, c *conf.Config) (view, error) {
	v := view{rows: map[string]queueRow{}, paused: readPause(c)}
	st, err := control.Dial(c.Paths.Control).Status(ctx)
	if errors.Is(err, control.ErrNoDaemon) {
		err = heldRows(ctx, c, func(queueName, id, why string) { v.rows[queueName+"\x00"+id] = heldRow(why) })
		return v, err
	}
	if err != nil {
		return v, err
	}
	v.daemon = &st
	for _, w := range st.Waiting {
		r := heldRow(w.Why)
		if heldNoLongerThan := 365 * 24 * time.Hour; time.Until(w.Until) < heldNoLongerThan {
			r = queueRow{State: stateDelayed, RetryAt: &w.Until, Why: w.Why}
		}
		v.rows[w.Queue+"\x00"+w.ID] = r
	}
	for _, m := range st.InFlight {
		v.rows[m.Queue+"\x00"+m.ID] = queueRow{State: stateInFlight, TakenAt: &m.Since, Why: strings.TrimSpace(m.Stage + " " + m.Part)}
	}
	return v, nil
}

func heldRow(why string) queueRow {
	return queueRow{State: stateHeld, Why: strings.TrimPrefix(strings.TrimPrefix(why, "held: "), "held ")}
}

// blocked says why no mail is taken, "" if it is.
func (v view) blocked() string {
	switch {
	case v.paused != nil:
		return "paused by " + v.paused.By + " since " + v.paused.At.Local().Format(time.DateTime)
	case v.daemon == nil:
		return "no daemon runs"
	case v.daemon.Paused:
		return "paused"
	}
	return v.daemon.Breaker
}

// row is an entry of a listing with what is known of it.
func (v view) row(e queue.Entry) queueRow {
	r := v.rows[e.ID.Queue+"\x00"+e.ID.Name]
	if r.State == "" {
		r.State = stateWaiting
	}
	r.Queue, r.ID, r.Dir, r.Since, r.Size = e.ID.Queue, e.ID.Name, e.ID.Dir, e.Arrived, e.Size
	return r
}

// leftRow is a file that a listing left alone.
func leftRow(f queue.Left) queueRow {
	r := queueRow{Queue: f.ID.Queue, ID: f.ID.Name, Dir: f.ID.Dir, State: stateLeft, Why: f.Why, File: f.File, Do: f.Do}
	if st, err := os.Lstat(f.File); err == nil {
		r.Since, r.Size = st.ModTime(), st.Size()
	}
	return r
}

// find returns what the inbound queues have under a queue id.
func find(ctx context.Context, c *conf.Config, v view, id string) ([]queueRow, error) {
	qs, err := openQueues(ctx, c, nil, nil)
	if err != nil {
		return nil, err
	}
	var found []queueRow
	for _, q := range qs {
		res, err := q.List(ctx, func(e queue.Entry) bool {
			if e.ID.Name == id {
				found = append(found, v.row(e))
			}
			return ctx.Err() == nil
		})
		if err != nil {
			return found, fmt.Errorf("list queue %s: %w", q.Name(), err)
		}
		for _, f := range res.Left {
			if f.ID.Name == id {
				found = append(found, leftRow(f))
			}
		}
	}
	return found, nil
}

// readPause reads the note of holdfast pause; one that cannot be read counts.
func readPause(c *conf.Config) *pauseNote {
	text, err := os.ReadFile(pauseFile(c))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	note := &pauseNote{By: "somebody"}
	if err != nil || json.Unmarshal(text, note) != nil {
		if st, serr := os.Stat(pauseFile(c)); serr == nil {
			note.At = st.ModTime()
		}
	}
	return note
}
