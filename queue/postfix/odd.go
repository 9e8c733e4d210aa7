package postfix

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"holdfast/queue"
)

// maxPostcat bounds the envelope that postcat prints.
const maxPostcat = 64 << 20

// readOdd has Postfix's own program read a file that we do not understand: a
// newer Postfix may have records that we do not know. Such a message is scanned,
// and released as it is, or it stays on hold.
func (c *claim) readOdd(ctx context.Context) (*file, error) {
	var out bounded
	if err := c.q.postcat(ctx, c.fdPath(), &out, "-e"); err != nil {
		return nil, err
	}
	f, err := parsePostcat(out.Bytes())
	if err != nil {
		return nil, err
	}
	return f, f.check(c.q.MaxRecipients)
}

// fdPath names the inode that we hold, whatever its name is by now.
func (c *claim) fdPath() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), c.f.Fd()) }

// bounded is a buffer that refuses to grow beyond maxPostcat.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxPostcat {
		return 0, fmt.Errorf("an envelope of more than %d bytes", maxPostcat)
	}
	return b.Buffer.Write(p)
}

// Labels of postcat -e (Postfix rec_type.c), by record type.
var postcatLabels = map[string]byte{
	"sender": recSender, "recipient": recRcpt, "done_recipient": recDone, "canceled_recipient": recCancel,
	"original_recipient": recOrcpt, "named_attribute": recAttr, "content_filter": recFilter,
	"redirect_to": recRedir, "verp_delimiters": recVerp,
}

// parsePostcat turns what postcat -e prints into records.
func parsePostcat(text []byte) (*file, error) {
	f := &file{}
	for line := range strings.Lines(string(text)) {
		label, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if !ok {
			label, ok = strings.CutSuffix(strings.TrimSuffix(line, "\n"), ":")
		}
		if !ok || strings.HasPrefix(line, "***") {
			continue
		}
		if label == "message_arrival_time" {
			t, err := time.ParseInLocation(time.ANSIC, strings.TrimSpace(value), time.Local)
			if err != nil {
				return nil, damaged("arrival time %.60q by postcat", value)
			}
			f.env = append(f.env, record{recTime, fmt.Sprintf("%d 0", t.Unix())})
			continue
		}
		if label == "unknown_record_type" {
			return nil, damaged("a record that Postfix itself does not know")
		}
		if kind, ok := postcatLabels[label]; ok {
			f.env = append(f.env, record{kind, value})
		}
	}
	if len(f.env) == 0 {
		return nil, fmt.Errorf("%w: postcat printed no envelope", queue.ErrDamaged)
	}
	return f, nil
}

// writeOdd writes the content as postcat prints it.
func (c *claim) writeOdd(ctx context.Context, w io.Writer) error {
	return c.q.postcat(ctx, c.fdPath(), w, "-bh")
}
