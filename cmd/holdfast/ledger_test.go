package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"go.etcd.io/bbolt"
)

// rowsInWork opens a ledger that nobody uses, for reading only, and counts
// the rows of what is in work and of what was decided.
func (s *site) rowsInWork() (n int) {
	s.t.Helper()
	db, err := bbolt.Open(s.dir+"/state/ledger.db", 0o400, &bbolt.Options{ReadOnly: true})
	if err != nil {
		s.t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		for _, table := range []string{"inflight", "journal"} {
			b := tx.Bucket([]byte(table))
			if b == nil {
				return fmt.Errorf("the ledger has no table %s", table)
			}
			n += b.Stats().KeyN
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// TestTheLedgerIsDeletedOrCutMeanwhile: the program is killed at one call
// after the other, and its ledger is deleted, or cut to one of several sizes,
// before the next life. That costs a new scan; each message is in its place,
// once.
func TestTheLedgerIsDeletedOrCutMeanwhile(t *testing.T) {
	// 16384 keeps both meta pages and cuts what they point to.
	for _, size := range []int64{-1, 0, 1, 4096, 8193, 16384} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			kills, cut := 0, 0
			for _, call := range []string{"renameat2", "linkat", "unlinkat", "fdatasync"} {
				for n, quiet := 1, 0; quiet < 2; n++ {
					s, far := strayed(t)
					quiet++
					if s.killAt(call, n, normal, superviseName, "--drain") {
						kills++
						quiet = 0
					}
					point := fmt.Sprintf("killed at %s %d, the ledger cut to %d", call, n, size)
					path := s.dir + "/state/ledger.db"
					spoil := os.Remove
					if size >= 0 {
						spoil = func(path string) error { return os.Truncate(path, size) }
					}
					if err := spoil(path); err == nil {
						cut++
					} else if !errors.Is(err, fs.ErrNotExist) { // killed before it made one
						t.Fatalf("%s: %v", point, err)
					}
					if code, out, errs := s.run(normal, "run", "--drain"); code != 0 {
						t.Fatalf("%s: then exit %d\n%s%s", point, code, out, errs)
					}
					s.account(map[int]bool{1: true}, nil)
					s.arrived(far)
					s.nothingWaits(point, s.in, s.dir+"/far")
					if t.Failed() {
						return
					}
				}
			}
			if kills < 8 {
				t.Errorf("only %d kills", kills)
			}
			t.Logf("killed %d times, the ledger cut %d times; lost 0, doubled 0", kills, cut)
		})
	}
}
