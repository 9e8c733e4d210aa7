package history

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func day(n int) time.Time { return time.Date(2026, 11, n, 12, 0, 0, 0, time.UTC) }

func rec(at time.Time, id, mid string, became ...string) Record {
	return Record{Time: at, Queue: "q", ID: id, MessageID: mid, NewIDs: became, Verdict: "release"}
}

func TestARecordIsFoundByEachOfItsNames(t *testing.T) {
	w := &Writer{Dir: filepath.Join(t.TempDir(), "history")}
	for n := 1; n <= 3; n++ { // an id comes again on another day
		if err := w.Append(t.Context(), []Record{rec(day(n), "A", fmt.Sprintf("<m%d@x>", n), fmt.Sprint("B", n)), rec(day(n), "AA", "<other>")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string]string{"A": "B3 B2 B1", "B2": "B2", "<m1@x>": "B1", "m1@x": "B1", "nothing": "", "m": ""} {
		res, err := Find(t.Context(), w.Dir, what, 10)
		var got []string
		for _, r := range res.Records {
			got = append(got, r.NewIDs...)
		}
		if err != nil || res.Damaged != 0 || strings.Join(got, " ") != want {
			t.Errorf("%q: %v, %v", what, got, err)
		}
	}
	if res, err := Find(t.Context(), w.Dir, "A", 2); err != nil || len(res.Records) != 2 {
		t.Errorf("limit: %d, %v", len(res.Records), err)
	}
}

func TestWhatAPersonDidIsFoundByItemOldAndNewID(t *testing.T) {
	w := &Writer{Dir: t.TempDir()}
	did := rec(day(2), "OLD", "", "NEW")
	did.Verdict, did.Item, did.By = Released, "20261101-aaaaaaaaaaaa-0", "joe"
	if err := w.Append(t.Context(), []Record{rec(day(1), "OLD", "<m@x>", did.Item), did, rec(day(2), "OTHER", "")}); err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string]int{"OLD": 2, "NEW": 1, did.Item: 2, "<m@x>": 1, "": 0} {
		if res, err := Find(t.Context(), w.Dir, what, 10); err != nil || len(res.Records) != want {
			t.Errorf("%q: %+v, %v", what, res, err)
		}
	}
	res, err := FindAny(t.Context(), w.Dir, []string{"NEW", did.Item}, 10)
	if err != nil || len(res.Records) != 2 || res.Records[0].By != "joe" {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestALineCutOffByADeathCostsOnlyItself(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "20261101.jsonl")
	if err := os.WriteFile(path, []byte(`{"id":"A","queue":"q`), 0o600); err != nil {
		t.Fatal(err)
	}
	w := &Writer{Dir: dir}
	if err := w.Append(t.Context(), []Record{rec(day(1), "A", "<x>")}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	res, err := Find(t.Context(), dir, "A", 10)
	if err != nil || len(res.Records) != 1 || res.Damaged != 1 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestAGiantLineIsPassedOver(t *testing.T) {
	dir := t.TempDir()
	text := `{"id":"A","note":"` + strings.Repeat("A", 3*maxLine) + "\"}\n" + `{"id":"A"}` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "20261101.jsonl"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	res, err := Find(t.Context(), dir, "A", 10)
	if err != nil || len(res.Records) != 1 {
		t.Errorf("%d, %v", len(res.Records), err)
	}
}

func TestPurgeTakesWholeOldDays(t *testing.T) {
	w := &Writer{Dir: t.TempDir()}
	for n := 1; n <= 5; n++ {
		if err := w.Append(t.Context(), []Record{rec(day(n), "A", "")}); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	gone, err := Purge(w.Dir, day(4))
	if err != nil || len(gone) != 3 {
		t.Errorf("%v, %v", gone, err)
	}
	if res, err := Find(t.Context(), w.Dir, "A", 10); err != nil || len(res.Records) != 2 {
		t.Errorf("%d, %v", len(res.Records), err)
	}
}

// TestWhatWasWrittenSinceATime: of that day, and of later ones.
func TestWhatWasWrittenSinceATime(t *testing.T) {
	w := &Writer{Dir: t.TempDir()}
	for n := 1; n <= 4; n++ {
		if err := w.Append(t.Context(), []Record{rec(day(n), fmt.Sprint("A", n), ""), rec(day(n).Add(time.Hour), fmt.Sprint("B", n), "")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := Since(t.Context(), w.Dir, day(3).Add(time.Hour), func(r Record) { got = append(got, r.ID) }); err != nil {
		t.Fatal(err)
	}
	if s := strings.Join(got, " "); s != "B3 A4 B4" {
		t.Errorf("%s", s)
	}
}
