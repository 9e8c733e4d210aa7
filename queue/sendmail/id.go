package sendmail

import (
	"fmt"
	"os"
	"sync"
	"time"
)

const idAlphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// idSource makes queue ids as sendmail does (reference: A1): the time in
// base 60, a sequence number, our process id. One second serves 3600 ids.
type idSource struct {
	mu   sync.Mutex
	base int64 // unix seconds of the ids being made
	seq  int
}

func (s *idSource) next(now time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	sec := now.Unix()
	switch {
	case sec > s.base:
		s.base, s.seq = sec, 0
	case s.seq == 3600:
		s.base, s.seq = s.base+1, 0 // ahead of the clock, but never twice
	}
	seq := s.seq
	s.seq++
	t := time.Unix(s.base, 0).UTC()
	a := func(n int) byte { return idAlphabet[n] }
	head := []byte{
		a((t.Year() - 1900) % 60), a(int(t.Month()) - 1), a(t.Day()), a(t.Hour()), a(t.Minute()), a(t.Second()), a(seq / 60), a(seq % 60),
	}
	return fmt.Sprintf("%s%06d", head, os.Getpid())
}
