// Package outbox keeps the side effects of decisions until they are carried
// out: one file per effect, so that a crash can neither lose one nor invent
// one for a decision that was never made (CUSTODY 4).
//
//	ROOT/pending/NAME   its message is not settled yet
//	ROOT/ready/NAME     to be delivered
//
// Delivery is at least once: a repeat happens only after a crash between the
// receiver's acceptance and the removal of the file, and has the same ID.
// Never put mail in here that exists nowhere else.
package outbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"holdfast/queue"
	"holdfast/queue/durable"
)

// Box is the outbox below Root.
type Box struct {
	Root string
	FS   *durable.FS
}

// Effect is one side effect of a decision.
type Effect struct {
	Kind     string          `json:"kind"` // a word: who carries it out
	Identity queue.Identity  `json:"identity"`
	Outcome  string          `json:"outcome"` // of the decision
	When     time.Time       `json:"when"`
	Data     json.RawMessage `json:"data"`
}

const (
	pendingDir = "pending"
	readyDir   = "ready"
	maxEffect  = 1 << 20 // bytes of a file
)

var kinds = regexp.MustCompile(`^[a-z]{1,20}$`)

// ID is the same for every delivery of one effect, and different for any two
// effects: message, kind and outcome.
func (e Effect) ID() string { return prefix(e.Identity) + "-" + e.Kind + "-" + digest(e.Outcome) }

// prefix is what the names of all effects of a message begin with.
func prefix(id queue.Identity) string {
	return digest(fmt.Sprintf("%s\x00%d\x00%d", id.ID.Key(), id.T, id.Ino))
}

func digest(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:8])
}

// New makes the directories of an outbox.
func New(root string, fsys *durable.FS) (*Box, error) {
	b := &Box{Root: root, FS: fsys}
	for _, d := range []string{pendingDir, readyDir} {
		if err := b.FS.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			return nil, fmt.Errorf("make the outbox: %w", err)
		}
	}
	return b, nil
}

func (b *Box) path(dir, name string) string { return filepath.Join(b.Root, dir, name) }

// Pend writes effects durably, before their decisions. What an earlier scan
// of the same message had pending goes first: its decision was not made.
// Order: remove the earlier ones; write and fsync each file; fsync directory.
func (b *Box) Pend(ctx context.Context, effects []Effect) error {
	seen := map[string]bool{}
	for _, e := range effects {
		if p := prefix(e.Identity); !seen[p] {
			seen[p] = true
			if err := b.Cancel(ctx, e.Identity); err != nil {
				return err
			}
		}
	}
	for _, e := range effects {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("put into the outbox: %w", err)
		}
		if !kinds.MatchString(e.Kind) {
			return fmt.Errorf("put into the outbox: %q is not a kind of effect", e.Kind)
		}
		text, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("put into the outbox: %w", err)
		}
		if len(text) > maxEffect {
			return fmt.Errorf("put into the outbox: an effect of %d bytes, more than %d", len(text), maxEffect)
		}
		err = b.FS.WriteFile(b.path(pendingDir, e.ID()), 0o600, func(w io.Writer) error {
			_, err := w.Write(text)
			return err
		})
		if err != nil {
			return fmt.Errorf("put into the outbox: %w", err)
		}
	}
	return nil
}

// Ready marks the effects of messages that are settled as to be delivered.
// It renames and does not fsync: where a power loss undoes it, the next start
// finds the effect pending and its message gone, and makes it ready again.
func (b *Box) Ready(ctx context.Context, ids ...queue.Identity) error {
	for _, id := range ids {
		names, err := b.of(ctx, id)
		if err != nil {
			return err
		}
		for _, name := range names {
			err := b.FS.Rename(b.path(pendingDir, name), b.path(readyDir, name))
			if errors.Is(err, fs.ErrExist) { // ready from before a crash: the same effect
				err = b.FS.Unlink(b.path(pendingDir, name))
			}
			if err != nil {
				return fmt.Errorf("make an effect ready: %w", err)
			}
		}
	}
	return nil
}

// Cancel removes what is pending for a message: it will be judged again.
// Order: unlink each; fsync, or a power loss could bring back an effect whose
// message was judged otherwise since.
func (b *Box) Cancel(ctx context.Context, id queue.Identity) error {
	names, err := b.of(ctx, id)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := b.FS.Unlink(b.path(pendingDir, name)); err != nil {
			return fmt.Errorf("cancel an effect: %w", err)
		}
	}
	if len(names) == 0 {
		return nil
	}
	if err := b.FS.FsyncDir(filepath.Join(b.Root, pendingDir)); err != nil {
		return fmt.Errorf("cancel an effect: %w", err)
	}
	return nil
}

// of lists what is pending for a message.
func (b *Box) of(ctx context.Context, id queue.Identity) ([]string, error) {
	names, err := b.names(ctx, pendingDir)
	if err != nil {
		return nil, err
	}
	p := prefix(id) + "-"
	out := names[:0]
	for _, n := range names {
		if strings.HasPrefix(n, p) {
			out = append(out, n)
		}
	}
	return out, nil
}

// Pending lists the effects whose messages are not settled: after a crash,
// each is to be made ready or cancelled. A file that is none is reported
// through bad and left alone.
func (b *Box) Pending(ctx context.Context, bad func(error)) ([]Effect, error) {
	names, err := b.names(ctx, pendingDir)
	if err != nil {
		return nil, err
	}
	var out []Effect
	for _, n := range names {
		e, err := b.read(pendingDir, n)
		if err != nil {
			bad(err)
			continue
		}
		out = append(out, e)
	}
	return out, nil
}

// Waiting counts what is to be delivered.
func (b *Box) Waiting(ctx context.Context) (int, error) {
	names, err := b.names(ctx, readyDir)
	return len(names), err
}

// Deliver hands each ready effect to deliver, oldest first, and forgets those
// that it accepts. It goes on after one that is refused; deliver has said why.
// Order: deliver; unlink. The unlink is not fsynced: at worst it is a repeat.
func (b *Box) Deliver(ctx context.Context, deliver func(context.Context, Effect) error, bad func(error)) (done int, err error) {
	names, err := b.names(ctx, readyDir)
	if err != nil {
		return 0, err
	}
	var effects []Effect
	for _, n := range names {
		e, err := b.read(readyDir, n)
		if err != nil {
			bad(err)
			continue
		}
		effects = append(effects, e)
	}
	sort.SliceStable(effects, func(i, j int) bool { return effects[i].When.Before(effects[j].When) })
	for _, e := range effects {
		if ctx.Err() != nil {
			return done, nil
		}
		if deliver(ctx, e) != nil {
			continue
		}
		if err := b.FS.Unlink(b.path(readyDir, e.ID())); err != nil {
			return done, fmt.Errorf("forget a delivered effect: %w", err)
		}
		done++
	}
	return done, nil
}

func (b *Box) names(ctx context.Context, dir string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list the outbox: %w", err)
	}
	entries, err := os.ReadDir(filepath.Join(b.Root, dir))
	if err != nil {
		return nil, fmt.Errorf("list the outbox: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// read reads one effect, bounded, and checks that it is the one its name says.
func (b *Box) read(dir, name string) (Effect, error) {
	var e Effect
	path := b.path(dir, name)
	f, err := os.Open(path)
	if err != nil {
		return e, fmt.Errorf("read an effect: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxEffect+1))
	if err != nil {
		return e, fmt.Errorf("read an effect: %w", err)
	}
	if err := json.Unmarshal(text, &e); err != nil {
		return e, fmt.Errorf("read the effect %s: %w", path, err)
	}
	if e.ID() != name {
		return e, fmt.Errorf("the effect %s belongs under the name %s", path, e.ID())
	}
	return e, nil
}
