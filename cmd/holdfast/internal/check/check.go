// Package check reads a configuration and the machine, and says what is
// fine, what is not, and what to do. It changes nothing.
package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"holdfast/conf"
)

// Level says how much a finding matters.
type Level string

// The levels. Holdfast can run with warnings; with a failure mail would stop
// or a promise would not hold.
const (
	OK      Level = "ok"
	Warning Level = "warning"
	Failure Level = "failure"
)

// Finding is one line of the answer.
type Finding struct {
	Level Level  `json:"level"`
	Topic string `json:"topic"`
	Text  string `json:"text"`
	Do    string `json:"do,omitempty"` // what to do about it
}

// Host is where the machine is looked at, and how.
type Host struct {
	Proc    string                                            // /proc
	MailDir string                                            // /etc/mail
	SMTP    string                                            // host:port of the queue-only listener; empty: do not ask it
	UID     int                                               // who Holdfast would run as
	Sandbox func(context.Context) (lacks []string, err error) // what workers could not be kept from
	Daemon  func(context.Context) (Daemon, error)             // the running one
	Paused  string                                            // who paused, and when; empty: nobody

	PidFiles []string                                    // patterns of sendmail's pid files
	Kick     func(conf.Command) []string                 // what a kick resolves to
	Statfs   func(path string, buf *unix.Statfs_t) error // nil: the system's
	Lookup   func(name string) (*user.User, error)       // nil: the system's

	// Postfix's own commands, with the configuration directory they read.
	Postconf  func(ctx context.Context, config string, args ...string) (lines []string, err error)
	Postmap   func(ctx context.Context, config, key, table string) (answer string, err error)
	Postsuper func(ctx context.Context, config string, args ...string) error
	Sendmail  func(ctx context.Context, config, message string) (mark string, err error)
	SendTest  bool // send messages of our own through each route, and remove them
}

// Daemon is what the running daemon tells of itself.
type Daemon struct {
	PID           int    // 0: none runs
	Blocked       string // why it takes no mail
	ReloadRefused string // why the last SIGHUP changed nothing
}

type checker struct {
	Host
	conf *conf.Config
	out  []Finding
}

// Run does all checks, in the order in which a person would read them.
func Run(ctx context.Context, c *conf.Config, h Host) []Finding {
	k := &checker{Host: h, conf: c}
	if k.Statfs == nil {
		k.Statfs = unix.Statfs
	}
	if k.Lookup == nil {
		k.Lookup = user.Lookup
	}
	for i := range c.Queues {
		if q := &c.Queues[i]; q.Type == conf.Postfix {
			k.postfix(ctx, q)
		} else {
			k.queue(q)
		}
	}
	for i := range c.Queues {
		k.kick(&c.Queues[i])
	}
	k.state()
	k.ledger()
	k.switches()
	k.notify()
	k.rights()
	k.worker(ctx)
	k.daemon(ctx)
	if slices.ContainsFunc(c.Queues, func(q conf.Queue) bool { return q.Type == conf.Sendmail }) {
		k.waysAround(ctx)
	}
	return k.out
}

// Worst is the highest level among the findings.
func Worst(all []Finding) Level {
	worst := OK
	for _, f := range all {
		if f.Level == Failure || f.Level == Warning && worst == OK {
			worst = f.Level
		}
	}
	return worst
}

func (k *checker) say(l Level, topic, do, format string, args ...any) {
	k.out = append(k.out, Finding{Level: l, Topic: topic, Text: fmt.Sprintf(format, args...), Do: do})
}

// queue checks the directories of one queue.
func (k *checker) queue(q *conf.Queue) {
	topic := "queue " + q.Name
	in := k.directories(topic, "in", q.In)
	out := k.directories(topic, "out", q.Out)
	if len(in) == 0 || len(out) == 0 {
		return
	}
	bad := false
	for _, a := range in {
		if !slices.ContainsFunc(out, func(b dir) bool { return a.dev == b.dev }) {
			bad = true
			k.say(Failure, topic, "move one of them: a message is released by renaming it, which never copies",
				"%s is on another file system than every out directory", a.path)
		}
	}
	if !bad {
		k.say(OK, topic, "", "%d inbound and %d outbound directories, on one file system", len(in), len(out))
	}
}

type dir struct {
	path string
	dev  uint64
}

// directories expands patterns and checks what they name.
func (k *checker) directories(topic, key string, patterns conf.List) []dir {
	var found []dir
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil || len(paths) == 0 {
			k.say(Failure, topic, "create it, or correct the path in the configuration", "%s: %s does not exist", key, pattern)
			continue
		}
		for _, p := range paths {
			if dev, ok := k.directory(topic, key, p); ok {
				found = append(found, dir{p, dev})
			}
		}
	}
	return found
}

func (k *checker) directory(topic, key, path string) (dev uint64, ok bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		k.say(Failure, topic, "check the path and the rights of the directories above it", "%s: %s: %v", key, path, err)
		return 0, false
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		k.say(Failure, topic, "name the directory", "%s: %s is not a directory", key, path)
		return 0, false
	}
	if st.Mode&0o002 != 0 {
		k.say(Failure, topic, "chmod o-w "+path, "%s: everybody may write to %s, so anybody could plant or remove mail", key, path)
	}
	fd, err := unix.Open(path, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		k.say(Failure, topic, "put the queue on ext4, xfs or btrfs", "%s: the file system of %s has no unnamed files (O_TMPFILE)", key, path)
		return st.Dev, true
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.EROFS):
		k.say(Failure, topic, "run Holdfast as root, and the file system writable", "%s: %s cannot be written: %v", key, path, err)
		return st.Dev, true
	case err != nil:
		k.say(Failure, topic, "see the error", "%s: %s: %v", key, path, err)
		return st.Dev, true
	}
	unix.Close(fd)
	k.fileSystem(topic, path, Failure, mailLost, false)
	return st.Dev, true
}

const mailLost = "mail in it would not survive a reboot: put the queue on a disk"

// File system types whose rename is atomic across directories and survives
// as documented (statfs(2), linux/magic.h).
var known = map[int64]string{0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs"}

func (k *checker) fileSystem(topic, path string, memory Level, inMemory string, stops bool) {
	var st unix.Statfs_t
	if err := k.Statfs(path, &st); err != nil {
		k.say(Failure, topic, "see the error", "file system of %s: %v", path, err)
		return
	}
	switch t := int64(st.Type); {
	case t == unix.TMPFS_MAGIC || t == unix.RAMFS_MAGIC:
		if memory != OK {
			k.say(memory, topic, inMemory, "%s is in memory (tmpfs)", path)
		}
	case t == unix.NFS_SUPER_MAGIC:
		k.say(Failure, topic, "use a local file system", "%s is on NFS, where locks and renames cannot be relied on", path)
	case known[t] == "":
		k.say(Warning, topic, "use ext4, xfs or btrfs, on which Holdfast is tested", "the file system of %s (type %#x) is not one that Holdfast is tested on", path, t)
	}
	if free := int64(st.Bavail) * st.Bsize; free < int64(k.conf.MinFree) {
		then := ""
		if stops {
			then = ": no mail would be taken"
		}
		k.say(Failure, topic, "make room, or lower min_free", "%s has %s free, and min_free is %s%s", path, conf.Size(free), k.conf.MinFree, then)
	}
}

// notify checks the program that is told of kept mail, if there is one.
func (k *checker) notify() {
	words := k.conf.Notify.Command.Words
	if len(words) == 0 {
		return
	}
	st, err := os.Stat(words[0])
	switch {
	case err != nil:
		k.say(Failure, "notify", "correct notify.command", "%v", err)
	case !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0:
		k.say(Failure, "notify", "chmod +x "+words[0], "%s is not a program that can be run", words[0])
	case st.Mode().Perm()&0o022 != 0:
		k.say(Failure, "notify", "chmod go-w "+words[0], "%s runs with Holdfast's rights, and others may write to it", words[0])
	default:
		k.say(OK, "notify", "", "%s is told of each message that is kept back", words[0])
	}
}

// rights checks whether we can act on the MTA's files.
func (k *checker) rights() {
	if k.UID == 0 {
		k.say(OK, "rights", "", "runs as root, of whose capabilities it needs DAC_OVERRIDE, CHOWN, FOWNER, SETUID, SETGID and KILL; workers run as %s", k.conf.User)
		return
	}
	if !slices.ContainsFunc(k.conf.Queues, func(q conf.Queue) bool { return q.Type == conf.Sendmail }) {
		return // Postfix's queues can have another owner: see postfixDirs
	}
	k.say(Warning, "rights", "start Holdfast as root", "runs as uid %d: workers get the same uid, and only queues whose files belong to it can be served", k.UID)
}

// worker checks the user and the sandbox of workers.
func (k *checker) worker(ctx context.Context) {
	if k.UID == 0 {
		k.workerUser()
	}
	lacks, err := k.Sandbox(ctx)
	level, do := Failure, "use a kernel with Landlock (5.13 or later) and seccomp, or set sandbox: best-effort and accept the risk"
	if k.conf.Sandbox == conf.SandboxBestEffort {
		level, do = Warning, "use a kernel with Landlock (5.13 or later) and seccomp"
	}
	switch {
	case err != nil:
		k.say(level, "sandbox", do, "a worker could not shut itself in: %v", err)
	case len(lacks) > 0:
		k.say(level, "sandbox", do, "workers could not be kept from: %v", lacks)
	default:
		k.say(OK, "sandbox", "", "a worker can reach neither files, network, programs nor other processes")
	}
}

func (k *checker) workerUser() {
	uid, err := strconv.Atoi(k.conf.User)
	if err != nil {
		u, lerr := k.Lookup(k.conf.User)
		if err = lerr; err == nil {
			uid, err = strconv.Atoi(u.Uid)
		}
	}
	if err != nil {
		k.say(Failure, "user", "create the user, or set user to an existing one", "the workers' user %q does not exist: %v", k.conf.User, err)
		return
	}
	if uid == 0 {
		k.say(Failure, "user", "set user to one that owns nothing, for example nobody", "workers would run as root")
		return
	}
	k.say(OK, "user", "", "workers run as %s (uid %d)", k.conf.User, uid)
}

func (k *checker) daemon(ctx context.Context) {
	d, err := k.Daemon(ctx)
	switch {
	case err != nil:
		k.say(Warning, "daemon", "see the error; holdfast run tells more", "the daemon's socket does not answer: %v", err)
		return
	case d.PID == 0:
		k.say(OK, "daemon", "", "not running")
		return
	}
	k.say(OK, "daemon", "", "running as process %d", d.PID)
	if d.Blocked != "" {
		k.say(Warning, "daemon", "see the reason", "it takes no mail: %s", d.Blocked)
	}
	if d.ReloadRefused != "" {
		k.say(Warning, "daemon", "correct the configuration, and send SIGHUP again", "it runs with an older configuration: the last SIGHUP was refused: %s", d.ReloadRefused)
	}
}
