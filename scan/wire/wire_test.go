package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
)

func payload(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

var token = Token{1, 2, 3}

// dialogue is a whole conversation about one message, in order.
func dialogue() []Frame {
	fs := []Frame{
		{Kind: Hello, Payload: payload(Greeting{Version: "1", Lacks: []string{}})},
		{Kind: Stamp, Token: token, Payload: payload(At{Stage: "parse"})},
		{Kind: Part, Token: token, Payload: []byte(`{"path":"1","type":"text/plain","size":5}`)},
		{Kind: Finding, Token: token, Payload: []byte(`{"rule":"signature/eicar","part":"1"}`)},
		{Kind: Done, Token: token, Payload: payload(Summary{Parts: 1, Findings: 1, MessageID: "<x>"})},
		{Kind: Bye},
	}
	for i := range fs {
		fs[i].Seq = uint32(i)
	}
	return fs
}

// talk runs frames through a conversation as the supervisor would.
func talk(fs []Frame) (reports int, bye bool, err error) {
	c := Conversation{MaxParts: 3}
	for _, f := range fs {
		ev, err := c.Accept(f)
		if err != nil {
			return reports, bye, err
		}
		if ev.Report != nil {
			reports++
		}
		bye = bye || ev.Bye
		if c.Ready() {
			if reports == 0 {
				c.Given(token)
			} else {
				c.Ended()
			}
		}
	}
	return reports, bye, nil
}

func TestAnOrderlyConversation(t *testing.T) {
	if n, bye, err := talk(dialogue()); n != 1 || !bye || err != nil {
		t.Fatal(n, bye, err)
	}
}

func TestEachLieIsFound(t *testing.T) {
	other := Token{9}
	for name, lie := range map[string]func([]Frame) []Frame{
		"wrong sequence":     func(f []Frame) []Frame { f[2].Seq = 7; return f },
		"a frame twice":      func(f []Frame) []Frame { f[3] = f[2]; return f },
		"another message":    func(f []Frame) []Frame { f[2].Token = other; return f },
		"done about another": func(f []Frame) []Frame { f[4].Token = other; return f },
		"no hello":           func(f []Frame) []Frame { f[0].Kind, f[0].Token = Stamp, token; return f },
		"hello twice":        func(f []Frame) []Frame { f[1] = f[0]; f[1].Seq = 1; return f },
		"hello with a token": func(f []Frame) []Frame { f[0].Token = token; return f },
		"done without its part": func(f []Frame) []Frame {
			f[2] = Frame{Kind: Stamp, Seq: 2, Token: token, Payload: payload(At{})}
			return f
		},
		"bye in the middle":     func(f []Frame) []Frame { f[2] = Frame{Kind: Bye, Seq: 2}; return f },
		"done twice":            func(f []Frame) []Frame { f[5] = f[4]; f[5].Seq = 5; return f },
		"the supervisor's word": func(f []Frame) []Frame { f[2].Kind = Message; return f },
		"unknown field":         func(f []Frame) []Frame { f[2].Payload = []byte(`{"path":"1","evil":1}`); return f },
		"two objects":           func(f []Frame) []Frame { f[1].Payload = []byte(`{"stage":"a","part":""}{}`); return f },
		"negative size":         func(f []Frame) []Frame { f[2].Payload = []byte(`{"path":"1","size":-1}`); return f },
		"no JSON":               func(f []Frame) []Frame { f[2].Payload = []byte("garbage"); return f },
		"a text too long": func(f []Frame) []Frame {
			f[2].Payload = payload(map[string]string{"path": string(make([]byte, 3000))})
			return f
		},
	} {
		if _, _, err := talk(lie(dialogue())); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := Conversation{MaxParts: 3}
	if _, err := c.Accept(Frame{Kind: Done}); err == nil {
		t.Fatal("done first")
	}
	if _, err := c.Accept(dialogue()[0]); err == nil {
		t.Error("a conversation goes on after an error")
	}
	many := dialogue()[:2]
	for i := range 10 {
		f := dialogue()[2]
		f.Seq = uint32(2 + i)
		many = append(many, f)
	}
	if _, _, err := talk(many); !errors.Is(err, ErrProtocol) {
		t.Errorf("more parts than the limit: %v", err)
	}
}

func TestFramesAreBounded(t *testing.T) {
	if _, err := (Frame{Kind: Part, Payload: make([]byte, MaxFrame)}).Encode(); !errors.Is(err, ErrProtocol) {
		t.Errorf("encode: %v", err)
	}
	for _, n := range []int{0, 1, headerLen - 1, MaxFrame + 1} {
		if _, err := Decode(make([]byte, n)); !errors.Is(err, ErrProtocol) {
			t.Errorf("decode %d bytes: %v", n, err)
		}
	}
	if got := Clip(string(bytes.Repeat([]byte{0xC3, 0xA9}, 5000))); len(got) > maxText {
		t.Errorf("%d bytes", len(got))
	}
}

// FuzzDecode: what decodes encodes to the same bytes.
func FuzzDecode(f *testing.F) {
	for _, fr := range dialogue() {
		b, err := fr.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		fr, err := Decode(b)
		if err != nil {
			return
		}
		if back, err := fr.Encode(); err != nil || !bytes.Equal(back, b) {
			t.Fatalf("%v: %x became %x", err, b, back)
		}
	})
}

// FuzzConversation: whatever a worker sends, nothing is accepted about a
// message that it does not hold, no bound is passed, and after an error
// nothing is accepted.
func FuzzConversation(f *testing.F) {
	var all []byte
	for _, fr := range dialogue() {
		b, err := fr.Encode()
		if err != nil {
			f.Fatal(err)
		}
		all = append(append(all, byte(len(b))), b...)
	}
	f.Add(all)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := Conversation{MaxParts: 3}
		holds, failed, seq := false, false, uint32(0)
		for len(b) > 1 {
			n := min(int(b[0]), len(b)-1)
			fr, err := Decode(b[1 : 1+n])
			b = b[1+n:]
			if err != nil {
				continue
			}
			ev, err := c.Accept(fr)
			if err != nil {
				failed = true
				continue
			}
			if failed {
				t.Fatal("accepted after an error")
			}
			if fr.Seq != seq {
				t.Fatalf("sequence %d accepted for %d", fr.Seq, seq)
			}
			seq++
			about := fr.Kind != Hello && fr.Kind != Bye
			if about && (!holds || fr.Token != token) {
				t.Fatalf("%q accepted about a message that the worker does not hold", fr.Kind)
			}
			if ev.Report != nil {
				holds = false
				if len(ev.Report.Parts) > 3 || len(ev.Report.Findings) > MaxFindings {
					t.Fatal("a bound was passed")
				}
			}
			if c.Ready() && !holds {
				c.Given(token)
				holds = true
			}
		}
	})
}
