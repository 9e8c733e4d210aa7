package check

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// options are what a sendmail was told, by its .cf file and its command line.
type options struct {
	dir     string // QueueDirectory: a directory or a pattern
	mode    string // DeliveryMode
	privacy string // PrivacyOptions
	pidFile string
	cf      string // another .cf file than the usual one
	runner  bool   // it runs its queue
	daemon  bool   // it accepts mail
	submit  bool   // it is the submission program, which reads submit.cf
}

func (o *options) set(name, value string) {
	value = strings.Trim(strings.TrimSpace(value), `"`)
	switch strings.ToLower(strings.TrimSpace(name)) {
	case "queuedirectory", "q":
		o.dir = value
	case "deliverymode", "d":
		o.mode = value
	case "privacyoptions", "p":
		o.privacy += "," + value
	case "pidfile":
		o.pidFile = value
	}
}

// over is what a command line and its .cf file amount to: privacy options add
// up (reference: queue-formats.md, A7), of others the command line's count.
func (o options) over(cf options) options {
	if o.dir == "" {
		o.dir = cf.dir
	}
	if o.mode == "" {
		o.mode = cf.mode
	}
	o.privacy += "," + cf.privacy
	return o
}

func (o options) queueOnly() bool { return strings.HasPrefix(strings.ToLower(o.mode), "q") }

func (o options) noETRN() bool { return strings.Contains(strings.ToLower(o.privacy), "noetrn") }

// among says that one of the directories is the queue's.
func (o options) among(dirs []string) bool {
	for _, d := range dirs {
		if ok, err := filepath.Match(filepath.Clean(o.dir), d); ok && err == nil {
			return true
		}
	}
	return false
}

const maxCF = 4 << 20

// readCF reads the options of a .cf file: "O Name=value", or "Oxvalue".
func readCF(path string) (options, error) {
	var o options
	f, err := os.Open(path)
	if err != nil {
		return o, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxCF))
	if err != nil {
		return o, err
	}
	for line := range strings.Lines(string(text)) {
		rest, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "O")
		if !ok || rest == "" {
			continue
		}
		if name, value, ok := strings.Cut(rest, "="); ok && rest[0] == ' ' {
			o.set(name, value)
		} else if rest[0] != ' ' {
			o.set(rest[:1], rest[1:])
		}
	}
	return o, nil
}

var runnerOption = regexp.MustCompile(`^-q(p?[0-9]+[smhdw]?.*|[GIRSLQ!].*|f?|p)$`)

// readCommand reads the options of a command line.
func readCommand(words []string) options {
	var o options
	for i, w := range words {
		switch {
		case w == "-O" || w == "-o":
			if i+1 < len(words) {
				o.option(w, words[i+1])
			}
		case strings.HasPrefix(w, "-O") || strings.HasPrefix(w, "-o"):
			o.option(w[:2], w[2:])
		case w == "-C":
			if i+1 < len(words) {
				o.cf = words[i+1]
			}
		case strings.HasPrefix(w, "-C"):
			o.cf = w[2:]
		case w == "-bd" || w == "-bD":
			o.daemon = true
		case w == "-Ac":
			o.submit = true
		case runnerOption.MatchString(w):
			o.runner = true
		}
	}
	return o
}

// option is one of -OName=value and -oxvalue.
func (o *options) option(kind, text string) {
	if kind == "-o" {
		if text != "" {
			o.set(text[:1], text[1:])
		}
		return
	}
	if name, value, ok := strings.Cut(text, "="); ok {
		o.set(name, value)
	}
}

// process is one running sendmail: its command line, or the title that
// replaced it.
type process struct {
	pid   int
	title string
	words []string // nil if only the title is known
}

// processes lists those of sendmail.
func processes(proc string) ([]process, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
		if err != nil {
			continue // it ended meanwhile
		}
		words := strings.Split(string(bytes.TrimRight(line, "\x00 ")), "\x00")
		program, _, titled := strings.Cut(words[0], ": ")
		if !strings.Contains(filepath.Base(program), "sendmail") {
			continue
		}
		p := process{pid: pid, title: strings.Join(words, " "), words: words}
		if titled {
			p.words = nil
		}
		out = append(out, p)
	}
	return out, nil
}

// pidFiles reads sendmail's pid files: the first line is the process, the
// second its command line, which the title has replaced.
func pidFiles(patterns []string) map[int][]string {
	out := map[int][]string{}
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			continue
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				continue
			}
			first, rest, _ := strings.Cut(string(text), "\n")
			second, _, _ := strings.Cut(rest, "\n")
			if pid, err := strconv.Atoi(strings.TrimSpace(first)); err == nil && second != "" {
				out[pid] = strings.Fields(second)
			}
		}
	}
	return out
}

// runs says that a title is that of a runner of a directory.
func (p process) runs(dir string) bool {
	if _, rest, ok := strings.Cut(p.title, "running queue: "); ok {
		return strings.TrimSpace(rest) == dir
	}
	_, rest, ok := strings.Cut(p.title, " for ")
	return ok && strings.Contains(p.title, "ueue runner") && strings.TrimSpace(rest) == dir
}

var standing = regexp.MustCompile(`(accepting|rejecting) connections|Queue control`)
