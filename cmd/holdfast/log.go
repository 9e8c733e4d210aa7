package main

import (
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"holdfast/cmd/holdfast/internal/gateway"
	"holdfast/cmd/holdfast/internal/safe"
	"holdfast/conf"
)

// newLogger makes the one logger, for standard error.
func newLogger(c conf.Log, w io.Writer) (*logrus.Logger, error) {
	level, err := logrus.ParseLevel(string(c.Level))
	if err != nil {
		return nil, err
	}
	l := logrus.New()
	l.SetOutput(w)
	l.SetLevel(level)
	var f logrus.Formatter = &logrus.JSONFormatter{TimestampFormat: time.RFC3339Nano, DisableHTMLEscape: true}
	if c.Format != conf.LogJSON {
		f = &logrus.TextFormatter{
			DisableColors: true, FullTimestamp: true, TimestampFormat: time.RFC3339,
			DisableTimestamp: underJournal(),
		}
	}
	if underJournal() {
		f = priority{f}
	}
	l.SetFormatter(f)
	return l, nil
}

// underJournal says that journald reads our standard error, and stamps each
// line itself (systemd.exec(5), JOURNAL_STREAM).
func underJournal() bool { return os.Getenv("JOURNAL_STREAM") != "" }

// priority puts the syslog level before each line, as sd-daemon(3) reads it.
type priority struct{ logrus.Formatter }

// Format formats one entry.
func (p priority) Format(e *logrus.Entry) ([]byte, error) {
	text, err := p.Formatter.Format(e)
	if err != nil {
		return nil, err
	}
	level := 6
	switch e.Level {
	case logrus.DebugLevel, logrus.TraceLevel:
		level = 7
	case logrus.WarnLevel:
		level = 4
	case logrus.ErrorLevel:
		level = 3
	case logrus.FatalLevel, logrus.PanicLevel:
		level = 2
	}
	return append([]byte("<"+strconv.Itoa(level)+">"), text...), nil
}

// logEvent writes one event as one line: the name is the message, everything
// else is a field. Hostile text is escaped, so that no message can write
// lines of its own.
func logEvent(l *logrus.Logger, e gateway.Event) {
	f := logrus.Fields{}
	for k, v := range e.Fields {
		f[strings.ReplaceAll(k, " ", "_")] = escaped(v)
	}
	if e.ID.Name != "" {
		f["queue"], f["id"] = e.ID.Queue, safe.Text(e.ID.Name)
	}
	if e.Err != nil {
		f["error"] = safe.Text(e.Err.Error())
	}
	if e.Record != nil {
		messageFields(f, e)
	}
	l.WithFields(f).Log(levelOf(e), e.Name)
}

func escaped(v any) any {
	switch v := v.(type) {
	case string:
		return safe.Text(v)
	case []string:
		out := make([]string, len(v))
		for i, s := range v {
			out[i] = safe.Text(s)
		}
		return strings.Join(out, "; ")
	}
	return v
}

func messageFields(f logrus.Fields, e gateway.Event) {
	r := e.Record
	f["verdict"] = r.Verdict
	f["new_id"] = safe.Text(strings.Join(r.NewIDs, ","))
	f["from"] = safe.Text(r.From)
	f["recipients"] = r.Recipients
	f["size"] = r.Size
	f["message_id"] = safe.Text(r.MessageID)
	f["client"] = safe.Text(r.ClientAddr)
	var reasons []string
	for _, why := range r.Reasons {
		text := why.Rule
		if why.Text != "" {
			text += ": " + why.Text
		}
		if why.Source != "" {
			text += " (" + why.Source + ")"
		}
		reasons = append(reasons, safe.Text(text))
	}
	if len(reasons) > 0 {
		f["reasons"] = strings.Join(reasons, "; ")
	}
	for _, st := range r.Stages {
		f["ms_"+st.Name] = float64(st.Duration.Microseconds()) / 1000
	}
	if r.Note != "" {
		f["note"] = safe.Text(r.Note)
	}
}

// levelOf is the level of an event: an error is for a person to look at now.
func levelOf(e gateway.Event) logrus.Level {
	if e.Quiet {
		return logrus.DebugLevel
	}
	if e.Trouble {
		return logrus.ErrorLevel
	}
	switch e.Name {
	case gateway.EventMessage, gateway.EventLeftAlone, gateway.EventStopping, gateway.EventSwept, gateway.EventPaused, gateway.EventResumed,
		gateway.EventRetry, gateway.EventStarted, gateway.EventReloading, gateway.EventReloaded, gateway.EventOpened, gateway.EventPurged:
		return logrus.InfoLevel
	case gateway.EventProblem, gateway.EventConvicted, gateway.EventAside, gateway.EventCrash, gateway.EventAlarm, gateway.EventReloadFailed,
		gateway.EventClosed:
		return logrus.ErrorLevel
	}
	return logrus.WarnLevel
}
