package conf

import (
	"bytes"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// YAML writes the whole configuration, with every key, as Parse reads it.
// Derived defaults are written out.
func (c *Config) YAML() []byte {
	var b bytes.Buffer
	w := writer{out: &b}
	w.section(reflect.ValueOf(c).Elem(), "")
	return b.Bytes()
}

// writer writes sections. The hooks are for the example.
type writer struct {
	out *bytes.Buffer
	// before is called before each key, with its section's type.
	before func(t reflect.Type, f field, indent string)
	// value may give the text of a value and a prefix for its line.
	value func(f field, v reflect.Value) (text, prefix string)
}

func (w *writer) section(v reflect.Value, indent string) {
	first := indent
	if v.Type() == reflect.TypeFor[Queue]() {
		first = strings.TrimSuffix(indent, "  ") + "- "
	}
	of := ""
	if q, ok := v.Interface().(Queue); ok {
		of = string(q.Type)
	}
	for i, f := range fieldsOf(v.Type()) {
		if f.mta != "" && f.mta != of {
			continue
		}
		if w.before != nil {
			w.before(v.Type(), f, indent)
		}
		lead := indent
		if i == 0 {
			lead = first
		}
		w.key(f, v.Field(f.index), lead, indent)
	}
}

func (w *writer) key(f field, v reflect.Value, lead, indent string) {
	if queues, ok := v.Interface().([]Queue); ok {
		w.out.WriteString(lead + f.key + ":\n")
		for i := range queues {
			w.section(reflect.ValueOf(&queues[i]).Elem(), indent+"    ")
		}
		return
	}
	if section(v.Type()) {
		w.out.WriteString(lead + f.key + ":\n")
		w.section(v, indent+"  ")
		return
	}
	text, prefix := "", ""
	if w.value != nil {
		text, prefix = w.value(f, v)
	}
	if text == "" {
		text = valueText(v.Interface())
	}
	w.out.WriteString(lead + prefix + f.key + ": " + text + "\n")
}

// valueText writes one value as its key takes it.
func valueText(value any) string {
	switch x := value.(type) {
	case string:
		return word(x)
	case List:
		return words(x)
	case Command:
		switch {
		case x.Auto:
			return "auto"
		case len(x.Words) == 0:
			return "none"
		}
		return words(x.Words)
	case bool:
		if x {
			return "yes"
		}
		return "no"
	case Count:
		if x == 0 {
			return "auto"
		}
		return strconv.Itoa(int(x))
	case Size:
		return x.String()
	case Share:
		return strconv.FormatFloat(float64(x), 'f', -1, 64)
	case time.Duration:
		return FormatDuration(x)
	case int:
		return strconv.Itoa(x)
	}
	return word(reflect.ValueOf(value).String()) // a word with fixed values
}

// plain is text that no YAML reader takes for anything but text, if it is
// not one of the words and does not begin like a number.
var (
	plain    = regexp.MustCompile(`^[A-Za-z_/][A-Za-z0-9_./-]*$`)
	reserved = regexp.MustCompile(`^(?i:yes|no|on|off|y|n|true|false|null)$`)
)

func word(s string) string {
	if plain.MatchString(s) && !reserved.MatchString(s) {
		return s
	}
	return strconv.QuoteToASCII(s)
}

func words(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = word(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
