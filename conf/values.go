package conf

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Size is a number of bytes.
type Size int64

// Share is a part of a whole, 0 to 1.
type Share float64

// Count is a number that a machine may know better: 0 means auto.
type Count int

// Or returns the number, or auto's value n.
func (c Count) Or(n int) int {
	if c == 0 {
		return n
	}
	return int(c)
}

// List is one text or a list of texts in the file.
type List []string

// Command is a program with its arguments: auto where the key allows that,
// none, or a list of words in the file.
type Command struct {
	Auto  bool
	Words []string // if not Auto; empty means none
}

// units is a table from unit to factor, largest first.
type units []struct {
	name   string
	factor int64
}

var sizeUnits = units{
	{"TiB", 1 << 40},
	{"TB", 1e12},
	{"GiB", 1 << 30},
	{"GB", 1e9},
	{"MiB", 1 << 20},
	{"MB", 1e6},
	{"KiB", 1 << 10},
	{"kB", 1e3},
	{"B", 1},
}

// Short forms mean what the long ones do: k, M, G and T count in thousands.
var sizeShort = units{
	{"Ti", 1 << 40},
	{"T", 1e12},
	{"Gi", 1 << 30},
	{"G", 1e9},
	{"Mi", 1 << 20},
	{"M", 1e6},
	{"Ki", 1 << 10},
	{"k", 1e3},
}

var durationUnits = units{
	{"d", int64(24 * time.Hour)},
	{"h", int64(time.Hour)},
	{"m", int64(time.Minute)},
	{"s", int64(time.Second)},
	{"ms", int64(time.Millisecond)},
}

func (u units) factor(name string) (int64, bool) {
	for _, e := range u {
		if strings.EqualFold(e.name, name) {
			return e.factor, true
		}
	}
	return 0, false
}

// digits splits s after its leading digits.
func digits(s string) (number, rest string) {
	i := 0
	for i < len(s) && s[i] >= '0' && s[i] <= '9' {
		i++
	}
	return s[:i], s[i:]
}

var errTooLarge = errors.New("too large")

// times multiplies a decimal number of at most 19 digits with a factor.
func times(number string, factor int64) (int64, error) {
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n > math.MaxInt64/factor {
		return 0, errTooLarge
	}
	return n * factor, nil
}

// ParseSize reads a size: 0, or a whole number with a unit (B; kB, MB, GB,
// TB in thousands; KiB, MiB, GiB, TiB in 1024s; k, M, Ki, Mi and so on).
// Letters' case does not matter, and a space may stand before the unit.
func ParseSize(s string) (Size, error) {
	number, unit := digits(s)
	unit = strings.TrimSpace(unit)
	if number == "" {
		return 0, fmt.Errorf("not a size: %s", quote(s))
	}
	if unit == "" {
		if strings.Trim(number, "0") == "" {
			return 0, nil
		}
		return 0, fmt.Errorf("a size needs a unit: %sB, %skB, %sMB or %sMiB", number, number, number, number)
	}
	factor, ok := sizeUnits.factor(unit)
	if !ok {
		factor, ok = sizeShort.factor(unit)
	}
	if !ok {
		return 0, fmt.Errorf("not a size: %s; units are B, kB, MB, GB, TB (thousands) and KiB, MiB, GiB, TiB (1024s)", quote(s))
	}
	n, err := times(number, factor)
	if err != nil {
		return 0, fmt.Errorf("size %s is %w", quote(s), err)
	}
	return Size(n), nil
}

// String writes a size with the unit that needs the fewest digits.
func (n Size) String() string {
	if n == 0 {
		return "0"
	}
	best := ""
	for _, u := range sizeUnits {
		if int64(n)%u.factor != 0 {
			continue
		}
		if s := strconv.FormatInt(int64(n)/u.factor, 10); best == "" || len(s)+len(u.name) < len(best) {
			best = s + u.name
		}
	}
	return best
}

// ParseDuration reads whole numbers with a unit (ms, s, m, h, d), largest
// unit first and each at most once: 90s, 5m, 1h30m, 7d.
func ParseDuration(s string) (time.Duration, error) {
	rest := s
	var sum int64
	last := int64(math.MaxInt64)
	for rest != "" {
		number, tail := digits(rest)
		end := strings.IndexAny(tail, "0123456789")
		if end < 0 {
			end = len(tail)
		}
		unit := tail[:end]
		rest = tail[end:]
		if number != "" && unit == "" {
			return 0, fmt.Errorf("a duration needs a unit: %ss, %sm, %sh or %sd", number, number, number, number)
		}
		factor, ok := durationUnits.factor(unit)
		if number == "" || !ok || factor >= last {
			return 0, fmt.Errorf("not a duration: %s; examples: 90s, 5m, 1h30m, 7d", quote(s))
		}
		last = factor
		n, err := times(number, factor)
		if err != nil || sum > math.MaxInt64-n {
			return 0, fmt.Errorf("duration %s is %w", quote(s), errTooLarge)
		}
		sum += n
	}
	if s == "" {
		return 0, errors.New(`not a duration: ""; examples: 90s, 5m, 1h30m, 7d`)
	}
	return time.Duration(sum), nil
}

// FormatDuration writes a duration as ParseDuration reads it, to the
// millisecond.
func FormatDuration(d time.Duration) string {
	if d <= 0 {
		return "0s"
	}
	var b strings.Builder
	for _, u := range durationUnits {
		if n := int64(d) / u.factor; n > 0 {
			b.WriteString(strconv.FormatInt(n, 10) + u.name)
			d -= time.Duration(n * u.factor)
		}
	}
	return b.String()
}

// ParseShare reads 25% or 0.25.
func ParseShare(s string) (Share, error) {
	number, percent := strings.CutSuffix(s, "%")
	number = strings.TrimSpace(number)
	plain := number != "" && len(number) <= 20 && strings.Trim(number, "0123456789.") == ""
	f, err := strconv.ParseFloat(number, 64)
	if !plain || err != nil {
		return 0, fmt.Errorf("not a share: %s; examples: 25%%, 0.25", quote(s))
	}
	if percent {
		f /= 100
	}
	switch {
	case f <= 1:
		return Share(f), nil
	case !percent && f <= 100:
		return 0, fmt.Errorf("a share above 1 needs a percent sign: %s%%", number)
	}
	return 0, errors.New("a share is at most 100%")
}

func parseCount(s string) (Count, error) {
	if s == "auto" {
		return 0, nil
	}
	n, err := parseInt(s)
	if err != nil {
		return 0, fmt.Errorf("not a number or auto: %s", quote(s))
	}
	if n < 1 {
		return 0, errors.New("must be at least 1, or auto")
	}
	return Count(n), nil
}

func parseInt(s string) (int64, error) {
	if number, rest := digits(s); number == "" || rest != "" {
		return 0, fmt.Errorf("not a whole number: %s", quote(s))
	}
	if len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("not a whole number: %s begins with 0", quote(s))
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n > math.MaxInt32 {
		return 0, fmt.Errorf("number %s is %w", quote(s), errTooLarge)
	}
	return n, nil
}

func parseBool(s string) (bool, error) {
	switch {
	case slices.Contains([]string{"yes", "true", "on"}, s):
		return true, nil
	case slices.Contains([]string{"no", "false", "off"}, s):
		return false, nil
	}
	return false, fmt.Errorf("must be yes or no, not %s", quote(s))
}

// quote shows a value from a file in a message.
func quote(s string) string { return strconv.QuoteToGraphic(cut(s)) }
