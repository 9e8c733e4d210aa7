// Package evidence keeps what is known about a death that convicted: what
// died, how, on what, with which versions, and the message. It is purged by
// age and size only, never at start-up.
package evidence

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// A Bundle describes one conviction. It is written as evidence.json beside
// the message.
type Bundle struct {
	Key      string            `json:"key"`
	When     time.Time         `json:"when"`
	Why      string            `json:"why"`
	Deaths   json.RawMessage   `json:"deaths"`
	Versions map[string]string `json:"versions"`
	Stderr   string            `json:"stderr,omitempty"`
	Crash    string            `json:"crash,omitempty"`
}

// Dir is a directory of bundles, one sub-directory each.
type Dir struct{ Root string }

// Save writes a bundle and the message under name (file-name safe, chosen by
// the caller) and returns the bundle's directory. Saving a name again
// replaces what is there: the later conviction knows more.
func (d Dir) Save(name string, b Bundle, message io.Reader) (string, error) {
	if name == "" || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") {
		return "", fmt.Errorf("evidence name %q cannot be a file name", name)
	}
	dir := filepath.Join(d.Root, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make evidence directory: %w", err)
	}
	text, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return "", fmt.Errorf("encode evidence of %s: %w", name, err)
	}
	if message != nil {
		if err := write(filepath.Join(dir, "message"), message); err != nil {
			return "", err
		}
	}
	return dir, write(filepath.Join(dir, "evidence.json"), strings.NewReader(string(text)+"\n"))
}

func write(path string, from io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write evidence: %w", err)
	}
	defer f.Close()
	if _, err := io.Copy(f, from); err != nil {
		return fmt.Errorf("write evidence %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fsync evidence %s: %w", path, err)
	}
	return nil
}

// Purge removes bundles older than age, and then the oldest until the rest
// holds at most size bytes. It returns the names it removed.
func (d Dir) Purge(now time.Time, age time.Duration, size int64) ([]string, error) {
	entries, err := os.ReadDir(d.Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list evidence: %w", err)
	}
	type bundle struct {
		name string
		when time.Time
		size int64
	}
	var all []bundle
	var sum int64
	for _, e := range entries {
		st, err := e.Info()
		if err != nil || !e.IsDir() {
			continue // vanished meanwhile, or not a bundle of ours
		}
		b := bundle{name: e.Name(), when: st.ModTime()}
		files, err := os.ReadDir(filepath.Join(d.Root, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("size evidence %s: %w", e.Name(), err)
		}
		for _, f := range files {
			if st, err := f.Info(); err == nil {
				b.size += st.Size()
			}
		}
		sum += b.size
		all = append(all, b)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].when.Before(all[j].when) })
	var gone []string
	for _, b := range all {
		if now.Sub(b.when) <= age && sum <= size {
			continue
		}
		if err := os.RemoveAll(filepath.Join(d.Root, b.name)); err != nil {
			return gone, fmt.Errorf("purge evidence %s: %w", b.name, err)
		}
		sum -= b.size
		gone = append(gone, b.name)
	}
	return gone, nil
}
