package conf

import "time"

// The comments of the fields below and their default tags are the source of
// example.yaml: a test writes it from here and fails when the two differ.
// Tags: key is the name in the file; default is text as a user would write
// it; need marks a key without which nothing works; for names the type of queue
// that has the key, if only one does; min and max bound numbers, sizes and
// durations; below is a path's default, under `state`; sample is what the
// example shows for a key that has no default, words what a hint shows for a
// command.

// Config is a whole configuration. Everything in it was checked: paths are
// absolute and clean, numbers are within their bounds, names are unique.
type Config struct {
	// The MTA's queues that Holdfast works on. Queues of several files add up.
	Queues []Queue `key:"queues" need:"yes"`

	// Holdfast's own data. It must survive a reboot (no tmpfs), should be on the
	// file system of the queues, and belongs to Holdfast alone.
	State string `key:"state" kind:"path" default:"/var/lib/holdfast"`

	// Parts of the state that shall live elsewhere.
	Paths Paths `key:"paths"`

	// Workers at a time, each a process of its own: a number, or auto for one
	// per CPU.
	Workers Count `key:"workers" default:"auto" min:"1" max:"1024"`

	// What one worker gets at a time, at most.
	Batch Batch `key:"batch"`

	// The share of the capacity for the newest mail, so that today's does not
	// wait behind the weekend's: 0% to 100%.
	NewestShare Share `key:"newest_share" default:"25%"`

	// How often the queues are looked at when nothing announces new mail.
	Poll time.Duration `key:"poll" default:"2s" min:"100ms" max:"1h"`

	// Claiming stops while a file system that is needed has less free space.
	MinFree Size `key:"min_free" default:"500MB"`

	// The user that workers run as when Holdfast is started as root: a name or
	// a number. It should own nothing.
	User string `key:"user" kind:"name" default:"nobody"`

	// required: a worker that cannot shut itself in refuses to work.
	// best-effort: it works anyway, and says so in the log.
	Sandbox Sandbox `key:"sandbox" enum:"required best-effort" default:"required"`

	// What one message may cost, and how much of it is looked at.
	Limits Limits `key:"limits"`

	// What happens to mail that is not clean: quarantine, hold (it stays in the
	// MTA's inbound queue until somebody decides) or release.
	Policy Policy `key:"policy"`

	// A program of yours that is told of each message that was kept back.
	Notify Notify `key:"notify"`

	// Judge and log, but release everything unmodified.
	Monitor bool `key:"monitor" default:"no"`

	// The ledger, which knows after a crash which message was where.
	Ledger Ledger `key:"ledger"`

	// Mail that waits longer than this in the inbound queue raises an alarm.
	Alarm Alarm `key:"alarm"`

	// How long what is over is kept.
	Keep Keep `key:"keep"`

	// The log on standard error.
	Log Log `key:"log"`

	// How long a stop waits for what is in flight; then it is put back.
	Shutdown time.Duration `key:"shutdown" default:"30s" min:"1s" max:"10m"`

	// The loop counts as stuck, and the service manager is no longer told that
	// it is alive, when one turn of it takes longer.
	Watchdog time.Duration `key:"watchdog" default:"1m" min:"1s" max:"1h"`

	places  map[string]place // dotted path of each key that a file sets
	sources []Source
}

// Queue is one queue of an MTA.
type Queue struct {
	// A name for logs and commands; no two queues have the same.
	Name string `key:"name" need:"yes" kind:"label" sample:"mta"`

	// The MTA: sendmail or postfix. What follows up to lock is for sendmail.
	Type QueueType `key:"type" need:"yes" enum:"sendmail postfix" sample:"sendmail"`

	// Where the MTA puts mail that is not scanned yet: one directory, or a list.
	// Shell patterns are allowed: /var/spool/mqueue.in/q*
	In List `key:"in" need:"yes" for:"sendmail" kind:"path" sample:"/var/spool/mqueue.in"`

	// Where the MTA's queue runners take scanned mail from: as above, and on the
	// same file system.
	Out List `key:"out" need:"yes" for:"sendmail" kind:"path" sample:"/var/spool/mqueue"`

	// How the MTA locks its files: flock (what Debian's sendmail does), or ofd
	// for builds that use fcntl.
	Lock Lock `key:"lock" for:"sendmail" enum:"flock ofd" default:"flock"`

	// Postfix's queue directory (postconf queue_directory). Mail is taken from
	// hold in it, and handed back to incoming.
	Dir string `key:"dir" need:"yes" for:"postfix" kind:"path" sample:"/var/spool/postfix"`

	// Postfix's configuration directory, for its commands.
	Config string `key:"config" for:"postfix" kind:"path" default:"/etc/postfix"`

	// How mail that is not changed is released: rename (to incoming), or
	// postsuper (Postfix's own commands only; costs a process per batch).
	Release PostfixRelease `key:"release" for:"postfix" enum:"rename postsuper" default:"rename"`

	// How mail that is changed is released: reinject (by SMTP to a listener that
	// holds it: holdfast setup postfix prints its lines), rewrite (its queue file is
	// written by Holdfast: keeps all of the envelope, but is no public interface;
	// only for versions of Postfix that are known), or none. What cannot be
	// changed follows policy.unchangeable.
	Modify PostfixModify `key:"modify" for:"postfix" enum:"reinject rewrite none" default:"reinject"`

	// The listener for modify: reinject.
	Reinject string `key:"reinject" for:"postfix" kind:"hostport" default:"127.0.0.1:10027"`

	// What a milter of Postfix's has quarantined is on hold, too: scan it like
	// other mail, or leave it there. For leave, log is needed: only Postfix's log
	// tells such mail from other mail.
	MilterHeld MilterHeld `key:"milter_held" for:"postfix" enum:"scan leave" default:"scan"`

	// Postfix's log, for milter_held: leave. A message is taken only after the log
	// has told of it.
	MailLog string `key:"log" for:"postfix" kind:"path" default:"/var/log/mail.log"`

	// How the MTA is told to deliver what was released: auto, none (its own
	// queue runs find it), or a command as a list of words. For sendmail, -qI and
	// the queue id are appended once per message: [/usr/sbin/sendmail, -C, /etc/mail/out.cf]
	Kick Command `key:"kick" default:"auto" words:"/usr/sbin/sendmail, -C, /etc/mail/out.cf"`
}

// Paths are the places of Holdfast's own data. After loading, none is empty.
type Paths struct {
	// The database of messages in work, suspects and convictions: a file.
	Ledger string `key:"ledger" kind:"path" below:"ledger.db"`
	// Files of the batches in work.
	Work string `key:"work" kind:"path" below:"work"`
	// Notices and other effects that wait for their message's decision.
	Outbox string `key:"outbox" kind:"path" below:"outbox"`
	// Messages that were kept back.
	Quarantine string `key:"quarantine" kind:"path" below:"quarantine"`
	// The trail of each message: what was found, and what was done with it.
	History string `key:"history" kind:"path" below:"history"`
	// What is known of messages that killed a worker.
	Evidence string `key:"evidence" kind:"path" below:"evidence"`
	// The socket by which the commands reach the daemon: a file.
	Control string `key:"control" kind:"path" below:"control.sock"`
}

// Batch bounds what one worker gets at a time.
type Batch struct {
	// Messages.
	Messages int `key:"messages" default:"30" min:"1" max:"1000"`
	// Their size together. A message that is larger goes alone.
	Bytes Size `key:"bytes" default:"50MB" min:"1kB"`
}

// Limits bound one message. Those up to Decoded end in policy.incomplete or
// policy.unscannable, those of the process in its death and the isolation of
// the message; none ends in silence.
type Limits struct {
	// Size of a message. A larger one is not parsed: policy.unscannable.
	Message Size `key:"message" default:"150MB" min:"1kB"`
	// Control file (envelope) of a message. A larger one is left in the queue.
	ControlFile Size `key:"control_file" default:"16MiB" min:"1kB" max:"1GiB"`
	// Recipients of a message. With more it is left in the queue.
	Recipients int `key:"recipients" default:"50000" min:"1" max:"10000000"`
	// Header of a message or of one part; beyond, policy.incomplete.
	Header Size `key:"header" default:"1MiB" min:"1kB" max:"1GiB"`
	// Parts, counted over all depths; beyond, policy.incomplete.
	Parts int `key:"parts" default:"1000" min:"1" max:"1000000"`
	// Depth of parts within parts; beyond, policy.incomplete.
	Depth int `key:"depth" default:"30" min:"1" max:"1000"`
	// Sum of all decoded parts; beyond, policy.incomplete.
	Decoded Size `key:"decoded" default:"256MiB" min:"1kB"`

	// Memory of a worker (RLIMIT_DATA). Its runtime alone takes 50 MB.
	Memory Size `key:"memory" default:"512MiB" min:"100MB"`
	// Memory of the one further try that a message gets for which it was too
	// little. Not below `memory`.
	MemoryRetry Size `key:"memory_retry" default:"1GiB" min:"100MB"`
	// CPU time of a worker for one message.
	CPU time.Duration `key:"cpu" default:"30s" min:"1s" max:"1h"`
	// Time by the clock for one message. Not below `cpu`.
	Wall time.Duration `key:"wall" default:"2m" min:"1s" max:"1d"`
	// Size of a file that a worker writes (RLIMIT_FSIZE).
	FileSize Size `key:"file_size" default:"300MB" min:"1kB"`
	// A message up to this size is handed to the worker in memory, a larger one
	// as a file in the work directory.
	RenderInMemory Size `key:"render_in_memory" default:"8MiB"`
}

// Policy says what happens to mail that is not clean.
type Policy struct {
	// Malware was found.
	Infected Action `key:"infected" enum:"quarantine hold release" default:"quarantine"`
	// The test string for spam filters was found (GTUBE).
	SpamTest Action `key:"spam_test" enum:"quarantine hold release" default:"quarantine"`
	// A limit ended the inspection: something was not looked at.
	Incomplete Action `key:"incomplete" enum:"quarantine hold release" default:"quarantine"`
	// It could not be scanned, although the scanner works. Release needs
	// deliver_unscanned.
	Unscannable Action `key:"unscannable" enum:"quarantine hold release" default:"quarantine"`
	// It killed what parsed it, alone and repeatedly, while a harmless message
	// passed. Release needs deliver_unscanned.
	Convicted Action `key:"convicted" enum:"quarantine hold release" default:"quarantine"`
	// It had to be changed, or delivered to some recipients only, and there is no
	// way to do that without loss: quarantine or hold, never release.
	Unchangeable Action `key:"unchangeable" enum:"quarantine hold" default:"quarantine"`
	// Allows release to unscannable and convicted: mail is delivered that nothing
	// has looked at.
	DeliverUnscanned bool `key:"deliver_unscanned" default:"no"`
}

// Notify is a program of the operator's. It is told at least once: after a
// crash it may hear of a message again, with the same id.
type Notify struct {
	// none, or the program as a list of words: [/usr/local/bin/tell]. It gets
	// one JSON object on standard input: id, queue, queue_id, item, from,
	// recipients, message_id, verdict, reasons. Exit status 0 means accepted.
	Command Command `key:"command" default:"none" words:"/usr/local/bin/tell"`
	// It is killed after this time, and tried again later.
	Timeout time.Duration `key:"timeout" default:"30s" min:"1s" max:"10m"`
	// What it has not accepted by then is given up, with a line in the log.
	GiveUp time.Duration `key:"give_up" default:"1d" min:"1m" max:"30d"`
}

// Ledger is about what is found in the ledger at claim time.
type Ledger struct {
	// What another machine has left in work counts as abandoned when it is
	// older.
	Age time.Duration `key:"age" default:"10m" min:"10s" max:"30d"`
}

// Alarm says when waiting mail raises an alarm.
type Alarm struct {
	// The first alarm.
	Warning time.Duration `key:"warning" default:"1h" min:"1m" max:"30d"`
	// The second, urgent one. Not below `warning`.
	Urgent time.Duration `key:"urgent" default:"4h" min:"1m" max:"30d"`
}

// Keep says how long what is over is kept.
type Keep struct {
	// The trail of each message.
	History time.Duration `key:"history" default:"90d" min:"1d" max:"3650d"`
	// What is known of messages that killed a worker.
	Evidence time.Duration `key:"evidence" default:"30d" min:"1d" max:"3650d"`
	// All evidence together; the oldest goes first.
	EvidenceSize Size `key:"evidence_size" default:"1GB"`
}

// Log is the form of the log.
type Log struct {
	// For people and grep, or for programs: text or json.
	Format LogFormat `key:"format" enum:"text json" default:"text"`
	// The least that is logged: debug, info, warning or error.
	Level LogLevel `key:"level" enum:"debug info warning error" default:"info"`
}

// Words with a fixed set of values.
type (
	QueueType string // Queue.Type
	Lock      string // Queue.Lock
	// PostfixRelease is Queue.Release.
	PostfixRelease string
	// PostfixModify is Queue.Modify.
	PostfixModify string
	// MilterHeld is Queue.MilterHeld.
	MilterHeld string
	Sandbox    string // Config.Sandbox
	Action     string // the keys of Policy
	LogFormat  string // Log.Format
	LogLevel   string // Log.Level: logrus's names
)

// The values of these words. LogLevel's are used as text only.
const (
	Sendmail QueueType = "sendmail"
	Postfix  QueueType = "postfix"

	ReleaseRename    PostfixRelease = "rename"
	ReleasePostsuper PostfixRelease = "postsuper"

	ModifyReinject PostfixModify = "reinject"
	ModifyRewrite  PostfixModify = "rewrite"
	ModifyNone     PostfixModify = "none"

	MilterScan  MilterHeld = "scan"
	MilterLeave MilterHeld = "leave"

	Flock Lock = "flock"
	OFD   Lock = "ofd"

	SandboxRequired   Sandbox = "required"
	SandboxBestEffort Sandbox = "best-effort"

	Quarantine Action = "quarantine"
	Hold       Action = "hold"
	Release    Action = "release"

	LogText LogFormat = "text"
	LogJSON LogFormat = "json"
)
