// Package conf reads the configuration: one YAML file and the conf.d
// directory beside it, checked against one schema, with every mistake named
// by its place.
package conf

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Source is one file of a configuration.
type Source struct {
	Name string // as it is to appear in errors
	Data []byte
}

//go:embed example.yaml
var example []byte

// Example returns the commented example, which holds every key with its
// default.
func Example() []byte { return slices.Clone(example) }

// maxFiles bounds conf.d.
const maxFiles = 1000

// Load reads a configuration from a file and from conf.d/*.yaml beside it,
// in the order of their names. Names that begin with a dot are left out. It
// returns Errors for what is wrong in the files, or a wrapped error of the
// file system.
func Load(path string) (*Config, error) {
	names := []string{path}
	dir := filepath.Join(filepath.Dir(path), "conf.d")
	entries, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "."):
		case strings.HasSuffix(name, ".yaml"):
			names = append(names, name)
		case strings.HasSuffix(name, ".yml"):
			return nil, fmt.Errorf("read configuration: %s would be left out: rename it to end in .yaml", printable(name))
		}
	}
	if len(names) > maxFiles {
		return nil, fmt.Errorf("read configuration: %s has %d files, more than %d", printable(dir), len(names)-1, maxFiles-1)
	}
	files := make([]Source, len(names))
	for i, name := range names {
		if files[i].Data, err = readFile(name); err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		files[i].Name = name
	}
	return Parse(files)
}

// readFile reads a regular file, up to one byte more than is allowed. It
// does not wait for the writer of a pipe.
func readFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", printable(name))
	}
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// Parse reads a configuration from the text of its files: sections merge,
// queues add up, and any other key may be set by one file only. The error,
// if any, is of type Errors and holds everything that is wrong.
func Parse(files []Source) (*Config, error) {
	d := &decoder{conf: &Config{places: map[string]place{}}}
	v := reflect.ValueOf(d.conf).Elem()
	setDefaults(v)
	broken := false
	if len(files) == 0 {
		files = []Source{{Name: "configuration"}} // an error needs a place
	}
	for _, src := range files {
		tree, t := parseText(src)
		d.files = append(d.files, t)
		broken = broken || tree == nil || tree.kind != mapNode
		if tree != nil {
			d.section(tree, v, "")
		}
	}
	d.finish(broken)
	if err := d.report(); err != nil {
		return nil, err
	}
	d.conf.sources = files
	return d.conf, nil
}

// Sources returns the files that the configuration was read from: the same
// configuration can be made of them by Parse.
func (c *Config) Sources() []Source { return slices.Clone(c.sources) }

// Pos says where a key is set, as file:line, or "default". Keys are written
// as policy.infected and queues.NAME.in.
func (c *Config) Pos(key string) string {
	if p, ok := c.places[key]; ok {
		return p.String()
	}
	return "default"
}
