package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The test binary is its own guard, and its own dead owner.
func TestMain(m *testing.M) {
	switch os.Getenv("LEDGER_TEST") {
	case "guard":
		err := Walk(os.Args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		switch {
		case errors.Is(err, ErrInUse):
			os.Exit(75)
		case err != nil:
			os.Exit(1)
		}
		os.Exit(0)
	case "begin": // claims an item and dies without finishing
		l, err := Open(context.Background(), os.Args[1], nil, func(Event) {})
		if err == nil {
			_, err = l.Begin(context.Background(), []Row{row("a"), row("b")}, nil)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func guard(ctx context.Context, path string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", path)
	cmd.Env = append(os.Environ(), "LEDGER_TEST=guard")
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		return nil
	case cmd.ProcessState.ExitCode() == 75:
		return ErrInUse
	}
	return fmt.Errorf("%w: %w: %s", ErrDamaged, err, out)
}

// TestALedgerInUseIsNotDamaged: whoever comes second is told so, and the file
// stays where the first has it open.
func TestALedgerInUseIsNotDamaged(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger.db")
	first := open(t, path)
	for name, g := range map[string]func(context.Context, string) error{"guarded": guard, "unguarded": nil} {
		_, err := Open(t.Context(), path, g, func(e Event) { t.Errorf("%s: moved: %+v", name, e) })
		if !errors.Is(err, ErrInUse) || errors.Is(err, ErrDamaged) {
			t.Errorf("%s: the second is told %v", name, err)
		}
	}
	if _, err := OpenReadOnly(path); !errors.Is(err, ErrInUse) {
		t.Errorf("looking: %v", err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("the directory holds %v, %v", names, err)
	}
	if _, err := first.Begin(t.Context(), []Row{row("a")}, nil); err != nil {
		t.Errorf("the first cannot go on: %v", err)
	}
}

// TestAGuardThatCannotLookAccusesNobody: a guard that does not start, or may
// not read, is no reason to move the ledger.
func TestAGuardThatCannotLookAccusesNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	open(t, path).Close()
	_, err := Open(t.Context(), path, func(context.Context, string) error { return errors.New("fork: resource temporarily unavailable") },
		func(e Event) { t.Errorf("moved: %+v", e) })
	if err == nil || !strings.Contains(err.Error(), "fork") {
		t.Errorf("%v", err)
	}
	if err := Walk(path + "/below"); err == nil || errors.Is(err, ErrDamaged) {
		t.Errorf("a ledger that cannot be opened: %v", err)
	}
}

func row(key string) Row {
	return Row{Key: key, Stat: json.RawMessage(`{"ino":1}`), Began: time.Unix(1_800_000_000, 0)}
}

func open(t *testing.T, path string) *Ledger {
	t.Helper()
	l, err := Open(t.Context(), path, guard, func(e Event) { t.Errorf("reported: %+v", e) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestEachKindOfOwner(t *testing.T) {
	self := Owner{"m", "b", 100, 5}
	now := time.Unix(1_800_000_000, 0)
	alive := func(o Owner) bool { return o.PID == 7 }
	for _, c := range []struct {
		name  string
		row   Owner
		began time.Time
		want  Recovery
	}{
		{"ourselves", self, now, None},
		{"alive here", Owner{"m", "b", 7, 1}, now, Alive},
		{"dead here", Owner{"m", "b", 8, 1}, now, DeadHere},
		{"the same number, another start", Owner{"m", "b", 100, 4}, now, DeadHere},
		{"other boot", Owner{"m", "old", 7, 1}, now, OtherBoot},
		{"other machine, young", Owner{"x", "b", 7, 1}, now.Add(-9 * time.Minute), Young},
		{"other machine, old", Owner{"x", "b", 7, 1}, now.Add(-10 * time.Minute), Old},
		{"other machine, from the future", Owner{"x", "b", 7, 1}, now.Add(time.Minute), Old},
	} {
		if got := Judge(c.row, self, c.began, now, 10*time.Minute, alive); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestWhatADeadProcessLeftIsFound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	cmd := exec.Command("/proc/self/exe", path)
	cmd.Env = append(os.Environ(), "LEDGER_TEST=begin")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l := open(t, path)
	other := row("b")
	other.Stat = json.RawMessage(`{"ino":2}`) // another message has its place by now
	found, err := l.Begin(t.Context(), []Row{row("a"), other, row("c")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if found["a"].Recovery != DeadHere || found["b"].Recovery != None || found["c"].Recovery != None {
		t.Errorf("%+v", found)
	}
}

func TestThreeTransactionsPerBatch(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "ledger.db"))
	before := l.Txs
	keys := []string{}
	for batch := range 10 {
		var rows []Row
		var ds []Decision
		for i := range 30 {
			r := row(fmt.Sprint(batch, "-", i))
			rows, ds = append(rows, r), append(ds, Decision{r.Key, []byte("{}")})
		}
		if _, err := l.Begin(t.Context(), rows, keys); err != nil {
			t.Fatal(err)
		}
		keys = keys[:0]
		if err := l.Decided(t.Context(), ds); err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			keys = append(keys, r.Key)
		}
	}
	if err := l.Finish(t.Context(), keys); err != nil {
		t.Fatal(err)
	}
	if n := l.Txs - before; n > 30 {
		t.Errorf("%d transactions for 10 batches", n)
	}
	rows, err := l.Inflight()
	journal, jerr := l.Journal()
	if err != nil || jerr != nil || len(rows)+len(journal) != 0 {
		t.Errorf("%d rows and %d decisions are left, %v, %v", len(rows), len(journal), err, jerr)
	}
}

func TestADamagedLedgerIsMovedAsideLoudly(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger.db")
	l := open(t, path)
	for i := range 200 {
		if _, err := l.Begin(t.Context(), []Row{row(fmt.Sprint("key", i, strings.Repeat("x", 200)))}, nil); err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damage := map[string][]byte{"empty": {}, "garbage": []byte(strings.Repeat("garbage ", 10_000)), "one byte": {1}}
	for _, n := range []int{100, 4096, 4097, 8192, 12_000, len(good) / 2} {
		damage[fmt.Sprint("cut at ", n)] = good[:n]
	}
	for _, page := range []int{2, 3, 5} {
		z := append([]byte(nil), good...)
		clear(z[page*4096 : (page+1)*4096])
		damage[fmt.Sprint("page ", page, " zeroed")] = z
	}
	for name, b := range damage {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ledger.db")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			var events []Event
			l, err := Open(t.Context(), path, guard, func(e Event) { events = append(events, e) })
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if _, err := l.Begin(t.Context(), []Row{row("a")}, nil); err != nil {
				t.Errorf("the new one does not work: %v", err)
			}
			aside, err := os.ReadFile(path)
			if len(events) == 1 {
				aside, err = os.ReadFile(events[0].Moved)
			} else if strings.HasPrefix(name, "page") {
				return // the page was free: nothing was damaged
			}
			if err != nil || string(aside) != string(b) {
				t.Errorf("%d events; what was moved aside is not what was there (%v)", len(events), err)
			}
		})
	}
}

func TestALedgerOfALaterVersionIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path)
	if err := l.put(tables.meta, "schema", 99, 10); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := Open(t.Context(), path, guard, func(e Event) { t.Errorf("moved: %+v", e) }); err == nil || !strings.Contains(err.Error(), "another version") {
		t.Fatalf("%v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestABoundIsAnError(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "ledger.db"))
	if err := l.put(tables.aside, "a", 1, 1); err != nil {
		t.Fatal(err)
	}
	if err := l.put(tables.aside, "b", 1, 1); err == nil || !strings.Contains(err.Error(), "full") {
		t.Fatalf("%v", err)
	}
	if err := l.put(tables.aside, "a", 2, 1); err != nil {
		t.Errorf("a row that is there: %v", err)
	}
}

func TestTheTokenStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path)
	if none, err := l.Token(); err != nil || none != "" {
		t.Fatalf("%q, %v", none, err)
	}
	if err := l.SetToken("ours"); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if b, err := open(t, path).Token(); err != nil || b != "ours" {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestSetAsideConvictedAndBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path)
	if err := l.SetAside(Aside{Key: "k", Why: "deadly", When: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	if err := l.Convict(Conviction{Key: "g", When: time.Unix(2, 0)}); err != nil {
		t.Fatal(err)
	}
	l.Close()
	ro, err := OpenReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := ro.AsideRows()
	guilty, gerr := ro.Convictions()
	if err != nil || gerr != nil || len(rows) != 1 || rows[0].Why != "deadly" || len(guilty) != 1 || guilty[0].Key != "g" {
		t.Fatalf("%+v %+v %v %v", rows, guilty, err, gerr)
	}
	ro.Close()
	l = open(t, path)
	if err := l.Return("k"); err != nil {
		t.Fatal(err)
	}
	if rows, err := l.AsideRows(); err != nil || len(rows) != 0 {
		t.Fatalf("%+v %v", rows, err)
	}
}
