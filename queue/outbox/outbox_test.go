package outbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/queue"
	"holdfast/queue/durable"
	"holdfast/queue/durable/fault"
)

func identity(n int) queue.Identity {
	return queue.Identity{ID: queue.ID{Queue: "mta", Dir: "/q", Name: fmt.Sprintf("ID%d", n)}, T: 1795438128, Ino: uint64(n)}
}

func effect(n int, outcome string) Effect {
	return Effect{
		Kind: "notify", Identity: identity(n), Outcome: outcome,
		When: time.Unix(int64(1000-n), 0).UTC(), Data: json.RawMessage(fmt.Sprintf(`{"n":%d}`, n)),
	}
}

func open(t *testing.T, root string, hook durable.Hook) *Box {
	t.Helper()
	b, err := New(root, &durable.FS{Hook: hook})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// told delivers everything and returns what was accepted, in order.
func told(t *testing.T, b *Box) []string {
	t.Helper()
	var ids []string
	_, err := b.Deliver(t.Context(), func(_ context.Context, e Effect) error {
		ids = append(ids, e.Identity.ID.Name+" "+e.Outcome)
		return nil
	}, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func TestOnlySettledMessagesAreTold(t *testing.T) {
	b := open(t, t.TempDir(), nil)
	ctx := t.Context()
	if err := b.Pend(ctx, []Effect{effect(1, "quarantine"), effect(2, "quarantine"), effect(3, "quarantine")}); err != nil {
		t.Fatal(err)
	}
	if got := told(t, b); len(got) > 0 {
		t.Errorf("told before the decision: %q", got)
	}
	if err := b.Ready(ctx, identity(1), identity(3)); err != nil {
		t.Fatal(err)
	}
	if err := b.Cancel(ctx, identity(2)); err != nil {
		t.Fatal(err)
	}
	if n, err := b.Waiting(ctx); n != 2 || err != nil {
		t.Errorf("%d wait, %v", n, err)
	}
	if got := told(t, b); !slices.Equal(got, []string{"ID3 quarantine", "ID1 quarantine"}) {
		t.Errorf("%q, want the older first", got)
	}
	if got := told(t, b); len(got) > 0 {
		t.Errorf("told again: %q", got)
	}
	if left, _ := b.Pending(ctx, func(error) {}); len(left) > 0 {
		t.Errorf("pending: %v", left)
	}
}

func TestARescanReplaces(t *testing.T) {
	b := open(t, t.TempDir(), nil)
	for _, outcome := range []string{"quarantine", "hold", "quarantine"} {
		if err := b.Pend(t.Context(), []Effect{effect(1, outcome)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Ready(t.Context(), identity(1)); err != nil {
		t.Fatal(err)
	}
	if got := told(t, b); !slices.Equal(got, []string{"ID1 quarantine"}) {
		t.Errorf("%q", got)
	}
}

func TestWhatIsRefusedStays(t *testing.T) {
	b := open(t, t.TempDir(), nil)
	if err := b.Pend(t.Context(), []Effect{effect(1, "a"), effect(2, "a")}); err != nil {
		t.Fatal(err)
	}
	if err := b.Ready(t.Context(), identity(1), identity(2)); err != nil {
		t.Fatal(err)
	}
	n, err := b.Deliver(t.Context(), func(_ context.Context, e Effect) error {
		if e.Identity == identity(2) {
			return errors.New("no")
		}
		return nil
	}, nil)
	if n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if got := told(t, b); !slices.Equal(got, []string{"ID2 a"}) {
		t.Errorf("%q", got)
	}
}

func TestForeignFilesAreReportedAndLeft(t *testing.T) {
	root := t.TempDir()
	b := open(t, root, nil)
	for name, text := range map[string]string{"x": "{", "y": `{"kind":"notify"}`, "z": strings.Repeat("x", 2<<20)} {
		if err := os.WriteFile(filepath.Join(root, readyDir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var bad []error
	n, err := b.Deliver(t.Context(), func(context.Context, Effect) error { return nil }, func(err error) { bad = append(bad, err) })
	if n != 0 || err != nil || len(bad) != 3 {
		t.Errorf("%d, %v, %v", n, err, bad)
	}
	if n, _ := b.Waiting(t.Context()); n != 3 {
		t.Errorf("%d of 3 are left", n)
	}
	if err := b.Pend(t.Context(), []Effect{{Kind: "../../etc", Identity: identity(1)}}); err == nil {
		t.Error("a kind that is a path was accepted")
	}
	big := effect(1, "a")
	big.Data = json.RawMessage(`"` + strings.Repeat("x", maxEffect) + `"`)
	if err := b.Pend(t.Context(), []Effect{big}); err == nil {
		t.Error("an effect without bounds was accepted")
	}
}

// life is one life of a gateway of three messages: two are kept back, one
// fails to commit. queued is the file system's truth about them.
func life(ctx context.Context, b *Box, queued map[int]bool, tell func(Effect)) error {
	pending, err := b.Pending(ctx, func(error) {})
	if err != nil {
		return err
	}
	for _, e := range pending {
		settle := b.Ready
		if queued[int(e.Identity.Ino)] {
			settle = func(ctx context.Context, ids ...queue.Identity) error { return b.Cancel(ctx, ids[0]) }
		}
		if err := settle(ctx, e.Identity); err != nil {
			return err
		}
	}
	var effects []Effect
	for n := 1; n <= 3; n++ {
		if queued[n] {
			effects = append(effects, effect(n, "quarantine"))
		}
	}
	if err := b.Pend(ctx, effects); err != nil {
		return err
	}
	for _, e := range effects {
		if n := int(e.Identity.Ino); n != 2 {
			queued[n] = false // its commit is durable
			if err := b.Ready(ctx, e.Identity); err != nil {
				return err
			}
		} else if err := b.Cancel(ctx, e.Identity); err != nil {
			return err
		}
	}
	_, err = b.Deliver(ctx, func(_ context.Context, e Effect) error { tell(e); return nil }, func(error) {})
	return err
}

// TestKilledAtEachOperation: each settled message is told of at least once
// and at most once more, with the same ID; no other is ever told of.
func TestKilledAtEachOperation(t *testing.T) {
	points := 0
	for at := 0; ; at++ {
		crash := &fault.Crash{At: at}
		if !survives(t, crash, func() bool { return crash.Dead }, nil) {
			points = at
			break
		}
	}
	if points < 15 {
		t.Errorf("only %d points", points)
	}
	t.Logf("outbox: killed at %d points, lost 0, invented 0", points)
}

func TestErrorAtEachOperation(t *testing.T) {
	for at := 0; ; at++ {
		fail := &fault.Fail{At: at, Err: errors.New("no space left on device")}
		if !survives(t, fail, func() bool { return fail.Name != "" }, nil) {
			return
		}
	}
}

// TestPowerLossAtEachOperation, in the states that it could leave.
func TestPowerLossAtEachOperation(t *testing.T) {
	states := 0
	for at, more := 0, true; more; at++ {
		for choice := 0; ; choice++ {
			var power *fault.Power
			crash := &fault.Crash{At: at}
			last := false
			more = survives(t, crash, func() bool { return crash.Dead }, func(root string) {
				choices := fault.Choices(power.Pending(), int64(at))
				last = choice >= len(choices)-1
				if err := power.Lose(choices[min(choice, len(choices)-1)], fault.Content(choice%3)); err != nil {
					t.Fatal(err)
				}
			}, func(root, shadow string) {
				var err error
				if power, err = fault.NewPower(shadow, root); err != nil {
					t.Fatal(err)
				}
				crash.Next = power
			})
			states++
			if last || !more {
				break
			}
		}
	}
	t.Logf("outbox: %d states after a power loss, lost 0, invented 0", states)
}

// TestACancelledEffectStaysCancelled: its message may be judged otherwise
// and leave before the power does.
func TestACancelledEffectStaysCancelled(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/shadow", 0o700); err != nil {
		t.Fatal(err)
	}
	open(t, dir+"/outbox", nil)
	power, err := fault.NewPower(dir+"/shadow", dir+"/outbox")
	if err != nil {
		t.Fatal(err)
	}
	b := &Box{Root: dir + "/outbox", FS: &durable.FS{Hook: power}}
	if err := b.Pend(t.Context(), []Effect{effect(1, "quarantine")}); err != nil {
		t.Fatal(err)
	}
	if err := b.Cancel(t.Context(), identity(1)); err != nil {
		t.Fatal(err)
	}
	if err := power.Lose(make([]bool, power.Pending()), fault.Missing); err != nil {
		t.Fatal(err)
	}
	if left, err := b.Pending(t.Context(), func(error) {}); len(left) > 0 || err != nil {
		t.Errorf("%v, %v", left, err)
	}
}

// survives runs a life under a fault and one after it, and checks what was
// told. It reports whether the fault happened.
func survives(t *testing.T, hook durable.Hook, happened func() bool, between func(root string), before ...func(root, shadow string)) bool {
	t.Helper()
	dir := t.TempDir()
	root, shadow := dir+"/outbox", dir+"/shadow"
	if err := os.Mkdir(shadow, 0o700); err != nil {
		t.Fatal(err)
	}
	open(t, root, nil)
	for _, f := range before {
		f(root, shadow)
	}
	queued := map[int]bool{1: true, 2: true, 3: true}
	count := map[string]int{}
	tell := func(e Effect) {
		if queued[int(e.Identity.Ino)] {
			t.Errorf("told of message %d, which is still queued", e.Identity.Ino)
		}
		count[e.ID()]++
	}
	b := &Box{Root: root, FS: &durable.FS{Hook: hook}}
	err := life(context.Background(), b, queued, tell)
	if happened() && err == nil {
		t.Error("a fault was not noticed")
	}
	if between != nil {
		between(root)
	}
	if err := life(context.Background(), &Box{Root: root}, queued, tell); err != nil {
		t.Error(err)
	}
	for _, n := range []int{1, 3} {
		if c := count[effect(n, "quarantine").ID()]; c < 1 || c > 2 {
			t.Errorf("message %d was told of %d times", n, c)
		}
	}
	if c := count[effect(2, "quarantine").ID()]; c != 0 {
		t.Errorf("message 2 is queued, and was told of %d times", c)
	}
	return happened()
}
