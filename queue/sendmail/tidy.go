package sendmail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"holdfast/queue"
	"holdfast/queue/inode"
)

// Tidy removes what a crash left beside messages that have gone, where their
// marker names it: for a start without a journal, when nobody calls Sweep. The
// marker is in the control file that is outbound by now, or was put aside to be
// removed; either comes last in a commit, so that everything else is done. What
// no marker names stays, and is counted by listings.
func (q *Queue) Tidy(ctx context.Context) (tidied []queue.ID, err error) {
	dirs, err := expand(q.In)
	if err != nil {
		return nil, err
	}
	for _, base := range dirs {
		ids, err := q.originals(at(base))
		if err != nil {
			return tidied, err
		}
		for _, id := range ids {
			done, err := q.tidy(ctx, at(base), queue.ID{Queue: q.Config.Name, Dir: base, Name: id})
			if err != nil {
				return tidied, err
			}
			if done {
				tidied = append(tidied, queue.ID{Queue: q.Config.Name, Dir: base, Name: id})
			}
		}
	}
	return tidied, nil
}

// originals are the ids beside which an original control file lies.
func (q *Queue) originals(p place) (ids []string, err error) {
	d, err := os.Open(p.qf)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(pageSize)
		for _, name := range names {
			id, ok := strings.CutSuffix(name, ".0")
			if ok = ok && strings.HasPrefix(id, "hc"); ok && validID(id[2:]) {
				ids = append(ids, id[2:])
			}
		}
		if errors.Is(err, io.EOF) {
			return ids, nil
		}
		if err != nil {
			return ids, fmt.Errorf("read directory %s: %w", p.qf, err)
		}
	}
}

// tidy sweeps up after one message, if it has gone and a marker says what is left.
func (q *Queue) tidy(ctx context.Context, in place, id queue.ID) (bool, error) {
	if _, err := inode.Lstat(in.control(id.Name)); !errors.Is(err, queue.ErrGone) {
		return false, nil // its claim reads the traces
	}
	original, err := inode.Lstat(in.newControl(id.Name, 0))
	if err != nil {
		return false, nil
	}
	places := []string{in.goneControl(id.Name)}
	if out, err := q.outbound(in, id.Name); err == nil {
		places = append(places, out.control(id.Name))
	}
	for _, path := range places {
		st, err := inode.Lstat(path)
		if err != nil {
			continue
		}
		if m, ok := q.readMarker(path); ok && m.self == st.Ino && m.orig == original.Ino {
			return true, q.Sweep(ctx, id, queue.Stats{Control: queue.FileStat{Ino: m.orig}, Data: queue.FileStat{Ino: m.df}})
		}
	}
	return false, nil
}
