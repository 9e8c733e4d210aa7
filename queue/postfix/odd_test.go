package postfix

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"holdfast/queue"
)

const postcatText = `*** ENVELOPE RECORDS hold/DA3659EA277 ***
message_size:             332             823               2              12             332               0
message_arrival_time: Wed Nov 25 04:36:04 2026
create_time: Wed Nov 25 04:36:04 2026
named_attribute: log_client_address=192.0.2.1
sender: 
named_attribute: notify_flags=6
original_recipient: b@example.net
recipient: b2@example.net
done_recipient: c@example.net
*** MESSAGE CONTENTS hold/DA3659EA277 ***
*** HEADER EXTRACTED hold/DA3659EA277 ***
named_attribute: encoding=8bit
*** MESSAGE FILE END hold/DA3659EA277 ***
`

func TestWhatPostcatPrintsIsAnEnvelope(t *testing.T) {
	f, err := parsePostcat([]byte(postcatText))
	if err != nil {
		t.Fatal(err)
	}
	want := queue.Envelope{
		Recipients: []queue.Recipient{{Address: "b2@example.net", Original: "b@example.net", Notify: "SUCCESS,FAILURE"}},
		ClientAddr: "192.0.2.1", Body8Bit: true, Arrived: time.Date(2026, 11, 25, 4, 36, 4, 0, time.Local),
	}
	got := f.envelope()
	got.Arrived = got.Arrived.In(time.Local)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"", "*** x ***\n", "unknown_record_type: abc\n" + postcatText, "message_arrival_time: yesterday\n"} {
		if _, err := parsePostcat([]byte(bad)); !errors.Is(err, queue.ErrDamaged) {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

func FuzzPostcat(f *testing.F) {
	f.Add([]byte(postcatText))
	f.Fuzz(func(t *testing.T, text []byte) {
		x, err := parsePostcat(text)
		if err != nil {
			return
		}
		size := 0
		for _, r := range x.env {
			size += len(r.data)
		}
		if size > 2*len(text)+64 {
			t.Errorf("%d bytes became %d", len(text), size)
		}
	})
}
