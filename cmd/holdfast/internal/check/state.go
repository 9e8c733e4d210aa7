package check

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/conf"
)

// own is one place of Holdfast's own data.
type own struct {
	topic  string
	path   string // the directory, or that of the file
	shared bool   // only a file in it is ours
	memory Level  // how much it matters if it is in memory
	stops  bool   // without room on it no mail is taken
}

const lost = "it would not survive a reboot: set %s to a directory on a disk"

// state checks Holdfast's own directory, or the one it would be made in, and
// what of it lives elsewhere.
func (k *checker) state() {
	p := k.conf.Paths
	k.place(own{topic: "state", path: k.conf.State, memory: Failure, stops: true})
	for _, o := range []own{
		{topic: "paths.ledger", path: filepath.Dir(p.Ledger), shared: true, memory: Failure},
		{topic: "paths.work", path: p.Work, memory: Warning},
		{topic: "paths.outbox", path: p.Outbox, memory: Failure},
		{topic: "paths.quarantine", path: p.Quarantine, memory: Failure, stops: true},
		{topic: "paths.history", path: p.History, memory: Failure},
		{topic: "paths.evidence", path: p.Evidence, memory: Failure},
		{topic: "paths.control", path: filepath.Dir(p.Control), shared: true, memory: OK},
	} {
		if at, _, err := nearest(o.path); err == nil && within(k.conf.State, at) {
			continue // the state's own directory, or one above it: it was checked
		}
		k.place(o)
	}
}

// within says that path is dir or above it.
func within(dir, path string) bool {
	return dir == path || strings.HasPrefix(dir, strings.TrimSuffix(path, "/")+"/")
}

// nearest is a path, or the directory in which it would be made.
func nearest(path string) (string, fs.FileInfo, error) {
	st, err := os.Stat(path)
	for errors.Is(err, fs.ErrNotExist) && path != "/" {
		path = filepath.Dir(path)
		st, err = os.Stat(path)
	}
	return path, st, err
}

func (k *checker) place(o own) {
	path, st, err := nearest(o.path)
	before := len(k.out)
	switch {
	case err != nil:
		k.say(Failure, o.topic, "see the error", "%s: %v", path, err)
		return
	case !st.IsDir():
		k.say(Failure, o.topic, "remove it, or choose another directory", "%s is not a directory", path)
		return
	case path != o.path && unix.Access(path, unix.W_OK) != nil:
		k.say(Failure, o.topic, "create it, or run Holdfast as root", "%s does not exist and cannot be made", o.path)
	case path == o.path && !o.shared && st.Mode().Perm()&0o077 != 0:
		k.say(Failure, o.topic, "chmod 700 "+path, "%s is open to others (mode %04o); it holds mail", path, st.Mode().Perm())
	case path == o.path && unix.Access(path, unix.W_OK) != nil:
		k.say(Failure, o.topic, "give it to the user that runs Holdfast, on a file system that can be written", "%s cannot be written", path)
	}
	k.fileSystem(o.topic, path, o.memory, strings.Replace(lost, "%s", o.topic, 1), o.stops)
	if len(k.out) == before {
		k.say(OK, o.topic, "", "%s is on a disk, with room", o.path)
	}
}

// ledger tells of ledgers that were found damaged.
func (k *checker) ledger() {
	found, err := filepath.Glob(k.conf.Paths.Ledger + ".damaged-*")
	if err != nil || len(found) == 0 {
		return
	}
	k.say(Warning, "ledger", "look for the reason (disk, memory) in the system's log; then remove it",
		"a damaged ledger was moved aside, and with it what was held and convicted: %s", strings.Join(found, ", "))
}

// switches tells of settings that are meant for a while, and of pause.
func (k *checker) switches() {
	if k.Paused != "" {
		k.say(Warning, "pause", "holdfast resume", "no mail is taken: %s", k.Paused)
	}
	if k.conf.Monitor {
		k.say(Warning, "monitor", "set monitor: no once you trust it", "monitor: yes (%s): all mail is released unmodified, infected mail, too", k.conf.Pos("monitor"))
	}
	p := k.conf.Policy
	if p.DeliverUnscanned && (p.Unscannable == conf.Release || p.Convicted == conf.Release) {
		k.say(Warning, "policy", "set deliver_unscanned: no unless you mean it",
			"deliver_unscanned: yes (%s): mail is delivered that nothing has looked at", k.conf.Pos("policy.deliver_unscanned"))
	}
}

// kick says how the MTA is told of released mail.
func (k *checker) kick(q *conf.Queue) {
	topic := "kick"
	if q.Type == conf.Postfix && q.Kick.Auto {
		k.say(OK, topic, "", "queue %s: Postfix's queue manager is told of released mail", q.Name)
		return
	}
	words := k.Kick(q.Kick)
	switch {
	case len(words) == 0 && q.Kick.Auto:
		k.say(Warning, topic, "set kick of the queue to the command that delivers, or to none", "queue %s: kick: auto finds no sendmail: released mail waits for the MTA's own queue runs", q.Name)
	case len(words) == 0:
		k.say(OK, topic, "", "queue %s: kick: none: released mail waits for the MTA's own queue runs", q.Name)
	default:
		if _, err := exec.LookPath(words[0]); err != nil {
			k.say(Failure, topic, "correct kick of the queue", "queue %s: released mail cannot be kicked: %v", q.Name, err)
			return
		}
		k.say(OK, topic, "", "queue %s: released mail is delivered by %s", q.Name, strings.Join(words, " "))
	}
}
