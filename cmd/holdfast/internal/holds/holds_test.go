package holds

import (
	"os"
	"testing"
	"time"
)

func TestHolds(t *testing.T) {
	d := Dir{t.TempDir() + "/holds"}
	if all, err := d.All(); err != nil || len(all) != 0 {
		t.Fatalf("before the first: %v, %v", all, err)
	}
	at := time.Now().UTC().Truncate(time.Second)
	for _, h := range []Hold{
		{Queue: "a", Dir: "/x", ID: "1", Ino: 5, By: "root", At: at, Why: "court"},
		{Queue: "a", Dir: "/y", ID: "1", Ino: 6, By: "root", At: at},
		{Queue: "b", Dir: "/x", ID: "../..\x1b", Ino: 7, By: "root", At: at},
		{Queue: "a", Dir: "/x", ID: "1", Ino: 8, By: "eva", At: at}, // replaces the first
	} {
		if err := d.Put(h); err != nil {
			t.Fatal(err)
		}
	}
	all, err := d.All()
	if err != nil || len(all) != 3 {
		t.Fatalf("%v, %v", all, err)
	}
	if n, err := d.End("b", "1"); n != 0 || err != nil {
		t.Errorf("ended %d, %v", n, err)
	}
	if n, err := d.End("", "../..\x1b"); n != 1 || err != nil {
		t.Errorf("ended %d, %v", n, err)
	}
	if n, err := d.End("a", "1"); n != 2 || err != nil {
		t.Errorf("ended %d, %v", n, err)
	}
	if err := os.WriteFile(d.Path+"/a.2.0", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.All(); err == nil {
		t.Error("a damaged hold was passed over: its message would be taken")
	}
}
