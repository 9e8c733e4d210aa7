package fault

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"sort"
	"strconv"

	"golang.org/x/sys/unix"

	"holdfast/queue/durable"
)

// Power is a hook that remembers what is not yet durable, and can then put
// a directory tree into a state that a power loss could have left. Inode
// numbers stay, since decisions name inodes.
//
// The model: an fsync of a file makes its content durable, not its names; an
// fsync of a directory makes every change of names in it durable, and with
// it the other side of a rename; a change of names that is not durable may
// survive or not, each by itself and in any order; rename and exchange are
// atomic, across directories too; content that is not durable may be there,
// be missing, or be cut in half.
type Power struct {
	roots   []string
	shadow  string // a directory of the same file system outside the roots
	base    map[slot]node
	pending []change
	unsafe  map[uint64]bool // inodes with content that is not durable
	dirs    map[uint64]string
}

// slot is one name in one directory.
type slot struct {
	dir  uint64
	name string
}

type node struct {
	ino uint64
	dir bool
}

// change is one operation on names: all of it survives, or nothing.
type change struct {
	what  string
	edits []edit
}

type edit struct {
	at slot
	to node // zero: no such name
}

// NewPower starts watching the trees below roots, all of which is durable.
func NewPower(shadow string, roots ...string) (*Power, error) {
	p := &Power{roots: roots, shadow: shadow, base: map[slot]node{}, unsafe: map[uint64]bool{}, dirs: map[uint64]string{}}
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if path == root {
				return nil
			}
			s, n, err := p.look(path)
			if err != nil {
				return err
			}
			p.base[s] = n
			return p.keep(path, n)
		})
		if err != nil {
			return nil, fmt.Errorf("watch %s: %w", root, err)
		}
	}
	return p, nil
}

// look says which name and inode a path is.
func (p *Power) look(path string) (slot, node, error) {
	var dir, st unix.Stat_t
	if err := unix.Stat(filepath.Dir(path), &dir); err != nil {
		return slot{}, node{}, err
	}
	s := slot{dir.Ino, filepath.Base(path)}
	if err := unix.Lstat(path, &st); err != nil {
		return s, node{}, err
	}
	return s, node{st.Ino, st.Mode&unix.S_IFMT == unix.S_IFDIR}, nil
}

// keep holds on to a file's inode by a name in the shadow directory.
func (p *Power) keep(path string, n node) error {
	if n.dir {
		return nil
	}
	err := os.Link(path, p.kept(n.ino))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func (p *Power) kept(ino uint64) string { return filepath.Join(p.shadow, strconv.FormatUint(ino, 10)) }

// Before never refuses.
func (p *Power) Before(durable.Op) error { return nil }

// After takes note of what has happened.
func (p *Power) After(op durable.Op, err error) {
	if err != nil {
		return
	}
	switch op.Kind {
	case durable.TmpFile, durable.Write:
		p.unsafe[inode(op.File)] = true
	case durable.Fsync:
		delete(p.unsafe, inode(op.File))
	case durable.FsyncDir:
		p.fsyncDir(op.Path)
	case durable.Create, durable.Mkdir:
		p.changed(op, op.Path)
	case durable.Link:
		p.changed(op, op.Path2)
	case durable.Rename, durable.Exchange:
		p.changed(op, op.Path, op.Path2)
	case durable.Unlink, durable.Rmdir:
		p.changed(op, op.Path)
	}
}

func inode(f *os.File) uint64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		panic(err) // an open file of a test
	}
	return st.Ino
}

func (p *Power) changed(op durable.Op, paths ...string) {
	c := change{what: Name(op)}
	for _, path := range paths {
		s, n, err := p.look(path)
		if err == nil {
			if err := p.keep(path, n); err != nil {
				panic(err)
			}
			if op.Kind == durable.Create {
				p.unsafe[n.ino] = true
			}
		}
		c.edits = append(c.edits, edit{s, n})
	}
	p.pending = append(p.pending, c)
}

func (p *Power) fsyncDir(path string) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return
	}
	var rest []change
	for _, c := range p.pending {
		hit := false
		for _, e := range c.edits {
			hit = hit || e.at.dir == st.Ino
		}
		if hit {
			p.apply(p.base, c)
		} else {
			rest = append(rest, c)
		}
	}
	p.pending = rest
}

func (p *Power) apply(names map[slot]node, c change) {
	for _, e := range c.edits {
		if e.to.ino == 0 {
			delete(names, e.at)
		} else {
			names[e.at] = e.to
		}
	}
}

// Pending is how many changes of names are not durable.
func (p *Power) Pending() int { return len(p.pending) }

// Content is what becomes of content that is not durable.
type Content int

// The fates of such content.
const (
	Whole Content = iota
	Missing
	Half
)

// Choices are sets of pending changes that survive: none, all, each alone
// lost, each alone kept, and some at random; all sets if there are few.
func Choices(pending int, seed int64) [][]bool {
	var out [][]bool
	if pending <= 4 {
		for m := range 1 << pending {
			set := make([]bool, pending)
			for i := range set {
				set[i] = m>>i&1 == 1
			}
			out = append(out, set)
		}
		return out
	}
	fill := func(f func(int) bool) {
		set := make([]bool, pending)
		for i := range set {
			set[i] = f(i)
		}
		out = append(out, set)
	}
	fill(func(int) bool { return false })
	fill(func(int) bool { return true })
	for k := range pending {
		fill(func(i int) bool { return i != k })
		fill(func(i int) bool { return i == k })
	}
	r := rand.New(rand.NewSource(seed))
	for range 8 {
		fill(func(int) bool { return r.Intn(2) == 0 })
	}
	return out
}

// Lose rewrites the trees to what a power loss leaves when just the given
// pending changes survive. All files of the program must be closed.
func (p *Power) Lose(survive []bool, content Content) error {
	names := map[slot]node{}
	for s, n := range p.base {
		names[s] = n
	}
	for i, c := range p.pending {
		if survive[i] {
			p.apply(names, c)
		}
	}
	if err := p.clear(); err != nil {
		return fmt.Errorf("clear the tree: %w", err)
	}
	for _, root := range p.roots {
		var st unix.Stat_t
		if err := unix.Stat(root, &st); err != nil {
			return err
		}
		if err := p.fill(root, st.Ino, names); err != nil {
			return fmt.Errorf("rebuild %s: %w", root, err)
		}
	}
	for ino := range p.unsafe {
		if err := damage(p.kept(ino), content); err != nil {
			return err
		}
	}
	return os.RemoveAll(p.shadow) // link counts are right again
}

// clear takes every name away; directories move into the shadow, for their
// inode numbers cannot be made again.
func (p *Power) clear() error {
	var dirs []string
	for _, root := range p.roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case path == root:
				return nil
			case d.IsDir():
				dirs = append(dirs, path)
				return nil
			}
			return os.Remove(path)
		})
		if err != nil {
			return err
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(dirs))) // the deepest first
	for _, dir := range dirs {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return err
		}
		p.dirs[st.Ino] = p.kept(st.Ino)
		if err := os.Rename(dir, p.kept(st.Ino)); err != nil {
			return err
		}
	}
	return nil
}

func (p *Power) fill(path string, ino uint64, names map[slot]node) error {
	for s, n := range names {
		if s.dir != ino {
			continue
		}
		to := filepath.Join(path, s.name)
		if !n.dir {
			if err := os.Link(p.kept(n.ino), to); err != nil {
				return err
			}
			continue
		}
		if old, ok := p.dirs[n.ino]; ok {
			delete(p.dirs, n.ino)
			if err := os.Rename(old, to); err != nil {
				return err
			}
		} else if err := os.Mkdir(to, 0o700); err != nil { // it was removed: under a new inode number
			return err
		}
		if err := p.fill(to, n.ino, names); err != nil {
			return err
		}
	}
	return nil
}

func damage(path string, c Content) error {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it never got a name
	}
	if err != nil {
		return err
	}
	switch c {
	case Missing:
		return os.Truncate(path, 0)
	case Half:
		return os.Truncate(path, st.Size()/2)
	}
	return nil
}
