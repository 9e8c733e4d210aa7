// Package history keeps the trail of each message: daily files of JSON
// lines. It is no part of custody: a line that is lost loses no mail.
package history

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"
)

// MaxAddresses is how many recipients of a message are written down by name.
const MaxAddresses = 20

// Record is what became of one message.
type Record struct {
	Time       time.Time `json:"time"`
	Queue      string    `json:"queue"`
	Dir        string    `json:"dir"`
	ID         string    `json:"id"`
	NewIDs     []string  `json:"new_ids,omitempty"` // outbound queue ids, or quarantine items
	T          int64     `json:"t"`                 // creation, unix seconds
	MessageID  string    `json:"message_id,omitempty"`
	From       string    `json:"from"`
	Recipients int       `json:"recipients"`
	Addresses  []string  `json:"addresses,omitempty"`
	Size       int64     `json:"size"`
	ClientAddr string    `json:"client,omitempty"`
	Verdict    string    `json:"verdict"`
	Reasons    []Reason  `json:"reasons,omitempty"`
	Stages     []Stage   `json:"stages,omitempty"`
	Note       string    `json:"note,omitempty"`

	// What a person did with a quarantine item.
	Item string `json:"item,omitempty"`
	By   string `json:"by,omitempty"`
}

// The verdicts of people.
const (
	Released = "released" // from quarantine, as the new id
	Deleted  = "deleted"  // from quarantine, for good
)

// about says that the record tells of something by that name.
func (r Record) about(what string) bool {
	return what != "" && (r.ID == what || r.Item == what || r.MessageID != "" && strings.Trim(r.MessageID, "<>") == strings.Trim(what, "<>") || slices.Contains(r.NewIDs, what))
}

// Reason is one rule of a verdict.
type Reason struct {
	Rule   string `json:"rule"`
	Text   string `json:"text,omitempty"`
	Part   string `json:"part,omitempty"`
	Source string `json:"source,omitempty"`
}

// Stage is how long one step took, in nanoseconds.
type Stage struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"ns"`
}

const (
	suffix  = ".jsonl"
	maxLine = 1 << 20
)

// Writer appends records, one file a day (UTC).
type Writer struct {
	Dir string
	mu  sync.Mutex
	day string
	f   *os.File
}

// Append writes records with one call per day that they fall on. A line that
// an earlier death cut off is ended first.
func (w *Writer) Append(_ context.Context, recs []Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := 0; i < len(recs); {
		day := recs[i].Time.UTC().Format("20060102")
		var b bytes.Buffer
		for ; i < len(recs) && recs[i].Time.UTC().Format("20060102") == day; i++ {
			e := json.NewEncoder(&b)
			e.SetEscapeHTML(false)
			if err := e.Encode(recs[i]); err != nil {
				return fmt.Errorf("encode history: %w", err)
			}
		}
		if err := w.open(day); err != nil {
			return err
		}
		if _, err := w.f.Write(b.Bytes()); err != nil {
			return fmt.Errorf("write history: %w", err)
		}
	}
	return nil
}

func (w *Writer) open(day string) error {
	if w.f != nil && w.day == day {
		return nil
	}
	if err := w.close(); err != nil {
		return err
	}
	if err := os.MkdirAll(w.Dir, 0o700); err != nil {
		return fmt.Errorf("make history directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(w.Dir, day+suffix), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open history: %w", err)
	}
	w.f, w.day = f, day
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return err
	}
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, st.Size()-1); err != nil {
		return fmt.Errorf("read history: %w", err)
	}
	if last[0] != '\n' {
		_, err = f.WriteString("\n")
	}
	return err
}

func (w *Writer) close() error {
	if w.f == nil {
		return nil
	}
	f := w.f
	w.f = nil
	return errors.Join(f.Sync(), f.Close())
}

// Close makes the last day durable and closes it.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.close()
}

// Result is what a search found.
type Result struct {
	Records []Record // newest first
	Damaged int      // lines that could not be read
}

// Find returns the records about a queue id (old or new), a message-id or a
// quarantine item, at most limit of them.
func Find(ctx context.Context, dir, what string, limit int) (Result, error) {
	return FindAny(ctx, dir, []string{what}, limit)
}

// FindAny is Find for several names at once.
func FindAny(ctx context.Context, dir string, names []string, limit int) (Result, error) {
	var res Result
	days, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		return res, fmt.Errorf("list history: %w", err)
	}
	sort.Sort(sort.Reverse(sort.StringSlice(days)))
	for _, path := range days {
		recs, damaged, err := search(ctx, path, names)
		res.Damaged += damaged
		if err != nil {
			return res, err
		}
		slices.Reverse(recs)
		res.Records = append(res.Records, recs...)
		if len(res.Records) >= limit {
			res.Records = res.Records[:limit]
			break
		}
	}
	return res, nil
}

// Since yields the records that were written at a time or later, oldest first.
func Since(ctx context.Context, dir string, at time.Time, yield func(Record)) error {
	days, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		return fmt.Errorf("list history: %w", err)
	}
	sort.Strings(days)
	first := at.UTC().Format("20060102") + suffix
	for _, path := range days {
		if filepath.Base(path) < first {
			continue
		}
		if _, err := each(ctx, path, nil, func(r Record) {
			if !r.Time.Before(at) {
				yield(r)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// search finds what is about one of the names in one day.
func search(ctx context.Context, path string, names []string) (found []Record, damaged int, err error) {
	needles, err := quoted(names)
	if err != nil {
		return nil, 0, err
	}
	damaged, err = each(ctx, path, needles, func(r Record) {
		if slices.ContainsFunc(names, r.about) {
			found = append(found, r)
		}
	})
	return found, damaged, err
}

// each reads one day. A line that holds none of the needles, if there are any, is
// not decoded.
func each(ctx context.Context, path string, needles [][]byte, yield func(Record)) (damaged int, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // purged meanwhile
	}
	if err != nil {
		return 0, fmt.Errorf("open history: %w", err)
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 64<<10)
	for {
		line, err := readLine(in)
		if len(line) > 0 && (needles == nil || slices.ContainsFunc(needles, func(n []byte) bool { return bytes.Contains(line, n) })) {
			var r Record
			if json.Unmarshal(line, &r) == nil {
				yield(r)
			} else {
				damaged++
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return damaged, nil
		case err != nil:
			return damaged, fmt.Errorf("read history %s: %w", path, err)
		case ctx.Err() != nil:
			return damaged, ctx.Err()
		}
	}
}

// quoted are names as the lines have them.
func quoted(names []string) ([][]byte, error) {
	var out [][]byte
	for _, name := range names {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false) // as the lines were written
		if err := e.Encode(strings.Trim(name, "<>")); err != nil {
			return nil, fmt.Errorf("search history: %w", err)
		}
		out = append(out, bytes.Trim(b.Bytes(), "\"\n"))
	}
	return out, nil
}

// readLine reads a line; of one over the bound nothing is kept.
func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		piece, err := in.ReadSlice('\n')
		if len(line)+len(piece) <= maxLine {
			line = append(line, piece...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// Purge removes days that ended before the given time.
func Purge(dir string, before time.Time) (removed []string, err error) {
	days, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		return nil, fmt.Errorf("list history: %w", err)
	}
	for _, path := range days {
		day, err := time.Parse("20060102", strings.TrimSuffix(filepath.Base(path), suffix))
		if err != nil || !day.AddDate(0, 0, 1).Before(before) {
			continue
		}
		if err := os.Remove(path); err != nil {
			return removed, fmt.Errorf("purge history: %w", err)
		}
		removed = append(removed, path)
	}
	return removed, nil
}
