// Package fault bends the file operations of queue/durable in tests: it
// stops the program at the n-th operation as SIGKILL would, lets one
// operation fail, and leaves the disk as a power loss could.
package fault

import (
	"errors"
	"fmt"
	"path/filepath"

	"holdfast/queue/durable"
)

// ErrCrashed is what every operation returns once the program is "dead".
var ErrCrashed = errors.New("the program was killed")

// Crash is a hook that kills the program before operation At (counted from
// 0): that one and all later ones do not happen, so that no clean-up code
// has any effect. With a negative At it only counts.
type Crash struct {
	At   int
	N    int // operations so far
	Dead bool
	Name string       // what was about to be done
	Next durable.Hook // told of what does happen; may be nil
}

// Before stops the operation if the program is dead.
func (c *Crash) Before(op durable.Op) error {
	if c.N == c.At && !c.Dead {
		c.Dead = true
		c.Name = Name(op)
	}
	if c.Dead {
		return ErrCrashed
	}
	c.N++
	if c.Next != nil {
		return c.Next.Before(op)
	}
	return nil
}

// After passes on.
func (c *Crash) After(op durable.Op, err error) {
	if c.Next != nil {
		c.Next.After(op, err)
	}
}

// Fail is a hook that lets operation At fail once with Err. Of a write, the
// first half happens.
type Fail struct {
	At   int
	Err  error
	N    int
	Name string
}

// Before fails the chosen operation.
func (f *Fail) Before(op durable.Op) error {
	f.N++
	if f.N-1 != f.At {
		return nil
	}
	f.Name = Name(op)
	if op.Kind == durable.Write {
		if _, err := op.File.WriteAt(op.Data[:len(op.Data)/2], op.Off); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: %w", f.Name, f.Err)
}

// After does nothing.
func (f *Fail) After(durable.Op, error) {}

// Intrude is a hook that does something else just before operation At: an
// administrator, or another program, at the worst moment.
type Intrude struct {
	At   int
	Do   func()
	N    int
	Name string
}

// Before does it.
func (i *Intrude) Before(op durable.Op) error {
	if i.N++; i.N-1 == i.At {
		i.Name = Name(op)
		i.Do()
	}
	return nil
}

// After does nothing.
func (i *Intrude) After(durable.Op, error) {}

// Name describes an operation for a report.
func Name(op durable.Op) string {
	short := func(p string) string { return filepath.Join(filepath.Base(filepath.Dir(p)), filepath.Base(p)) }
	if op.Path2 != "" {
		return fmt.Sprintf("%s %s %s", op.Kind, short(op.Path), short(op.Path2))
	}
	return fmt.Sprintf("%s %s", op.Kind, short(op.Path))
}
