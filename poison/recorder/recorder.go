// Package recorder is the supervisor's flight recorder: what it is about to
// do, to which item, in a file that outlives its death.
package recorder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// Recorder is an open recorder. It is written by one goroutine.
type Recorder struct {
	f   *os.File
	buf [size]byte
}

// size of a record: length of step (1), of item (2), deaths (4), both texts,
// CRC-32 at the end. Two slots: the stamp, and the account of deaths.
const (
	size    = 1024
	maxStep = 60
	maxItem = 900
)

// Last is what an earlier life was doing when it ended.
type Last struct {
	Step, Item string
	Deaths     int // in a row on this item and step, that one included
}

// Open opens the recorder at path and says what the last life left. The
// account of deaths is brought up to date: the same item again counts on,
// any other, or an end with nothing stamped, starts anew. An orderly end must
// therefore Clear.
func Open(path string) (*Recorder, Last, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, Last{}, fmt.Errorf("open flight recorder: %w", err)
	}
	r := &Recorder{f: f}
	last, err := r.read(0)
	if err == nil && last.Item != "" {
		before, berr := r.read(1)
		last.Deaths = 1
		if berr == nil && before.Item == last.Item {
			last.Deaths = before.Deaths + 1
		}
	}
	if err == nil {
		err = r.write(1, last) // nothing: what died before did not die in a row
	}
	if err != nil {
		f.Close()
		return nil, Last{}, err
	}
	return r, last, r.Clear()
}

// Stamp says what is about to be done. One write, no fsync: it need survive
// only this process. An item that is too long is named by its beginning.
func (r *Recorder) Stamp(step, item string) error {
	return r.write(0, Last{Step: step, Item: item})
}

// Clear says that nothing dangerous is being done.
func (r *Recorder) Clear() error { return r.write(0, Last{}) }

// Forget ends the account of deaths.
func (r *Recorder) Forget() error { return r.write(1, Last{}) }

// Close closes the file.
func (r *Recorder) Close() error { return r.f.Close() }

func (r *Recorder) write(slot int64, l Last) error {
	step, item := l.Step[:min(len(l.Step), maxStep)], l.Item[:min(len(l.Item), maxItem)]
	b := r.buf[:]
	clear(b)
	b[0] = byte(len(step))
	binary.BigEndian.PutUint16(b[1:], uint16(len(item)))
	binary.BigEndian.PutUint32(b[3:], uint32(l.Deaths))
	copy(b[7:], step)
	copy(b[7+len(step):], item)
	binary.BigEndian.PutUint32(b[size-4:], crc32.ChecksumIEEE(b[:size-4]))
	if _, err := r.f.WriteAt(b, slot*size); err != nil {
		return fmt.Errorf("write flight recorder: %w", err)
	}
	return nil
}

// read returns nothing for a record that is missing or torn.
func (r *Recorder) read(slot int64) (Last, error) {
	var b [size]byte
	n, err := r.f.ReadAt(b[:], slot*size)
	if err != nil && !errors.Is(err, io.EOF) {
		return Last{}, fmt.Errorf("read flight recorder: %w", err)
	}
	if n < size || crc32.ChecksumIEEE(b[:size-4]) != binary.BigEndian.Uint32(b[size-4:]) {
		return Last{}, nil
	}
	s, i := int(b[0]), int(binary.BigEndian.Uint16(b[1:]))
	if 7+s+i > size-4 {
		return Last{}, nil
	}
	return Last{Step: string(b[7 : 7+s]), Item: string(b[7+s : 7+s+i]), Deaths: int(binary.BigEndian.Uint32(b[3:]))}, nil
}
