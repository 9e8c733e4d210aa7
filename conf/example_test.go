package conf

import (
	"bytes"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite example.yaml and the golden files")

const exampleHead = `# Configuration of Holdfast: every key with its default. Only the queues are
# needed; delete what you do not change.
#
# Files conf.d/*.yaml beside this one are read too, in the order of their
# names: sections merge, queues add up, any other key may be set once.
# Check a change with: holdfast check -c FILE
#
# Sizes: 10MB is 10,000,000 bytes, 10MiB is 10,485,760. Durations: 90s, 5m,
# 1h30m, 7d. Paths are absolute.
`

// schemaDocs returns the comment of each field in schema.go, by type and
// field: "Config.Queues".
func schemaDocs(t *testing.T) map[string][]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "schema.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	docs := map[string][]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if st, ok := spec.Type.(*ast.StructType); ok {
			for _, f := range st.Fields.List {
				if text := strings.TrimSpace(f.Doc.Text()); text != "" {
					docs[spec.Name.Name+"."+f.Names[0].Name] = strings.Split(text, "\n")
				}
			}
		}
		return false
	})
	return docs
}

// writeExample writes the example from the schema.
func writeExample(t *testing.T) []byte {
	docs := schemaDocs(t)
	var c Config
	setDefaults(reflect.ValueOf(&c).Elem())
	c.Queues = make([]Queue, 1)
	setDefaults(reflect.ValueOf(&c.Queues[0]).Elem())
	c.Queues[0].Type = Sendmail
	out := bytes.NewBufferString(exampleHead)
	w := writer{out: out}
	w.before = func(st reflect.Type, f field, indent string) {
		lines := docs[st.Name()+"."+f.name]
		if len(lines) == 0 {
			t.Errorf("%s.%s has no comment", st.Name(), f.name)
		}
		if st == reflect.TypeFor[Config]() && f.key == "state" {
			out.Write(postfixExample(t, docs))
		}
		if indent == "" {
			out.WriteString("\n")
		}
		if st == reflect.TypeFor[Queue]() && f.key == "name" {
			indent = strings.TrimSuffix(indent, "  ")
		}
		for _, line := range lines {
			out.WriteString(strings.TrimRight(indent+"# "+line, " ") + "\n")
		}
	}
	w.value = func(f field, v reflect.Value) (text, prefix string) {
		switch {
		case f.below != "":
			return c.State + "/" + f.below, "#"
		case f.sample != "":
			return f.sample, ""
		}
		return f.def, ""
	}
	w.section(reflect.ValueOf(&c).Elem(), "")
	return out.Bytes()
}

// postfixExample is a queue of Postfix's, commented out.
func postfixExample(t *testing.T, docs map[string][]string) []byte {
	q := Queue{}
	setDefaults(reflect.ValueOf(&q).Elem())
	q.Type = Postfix
	var block bytes.Buffer
	w := writer{out: &block}
	w.before = func(_ reflect.Type, f field, indent string) {
		for _, line := range docs["Queue."+f.name] {
			if f.mta == "postfix" {
				block.WriteString(indent + "# " + line + "\n")
			}
		}
	}
	w.value = func(f field, _ reflect.Value) (text, prefix string) {
		switch {
		case f.key == "type":
			return "postfix", ""
		case f.sample != "":
			return f.sample, ""
		}
		return f.def, ""
	}
	w.section(reflect.ValueOf(q), "  ")
	out := []byte("\n  # For Postfix instead:\n")
	for line := range strings.Lines(block.String()) {
		out = append(out, "  #"+line...)
	}
	return out
}

func TestExampleOfPostfixIsTheDefaults(t *testing.T) {
	_, block, ok := strings.Cut(string(Example()), "  # For Postfix instead:\n")
	if !ok {
		t.Fatal("there is none")
	}
	text := "queues:\n"
	for line := range strings.Lines(block) {
		rest, ok := strings.CutPrefix(line, "  #")
		if !ok {
			break
		}
		text += rest
	}
	c := mustParse(t, text)
	want := mustParse(t, "queues: [{name: mta, type: postfix, dir: /var/spool/postfix}]")
	if !reflect.DeepEqual(values(c), values(want)) {
		t.Errorf("%s", diff(c.YAML(), want.YAML()))
	}
	for _, f := range fieldsOf(reflect.TypeFor[Queue]()) {
		if f.mta != "sendmail" && c.Pos("queues.mta."+f.key) == "default" {
			t.Errorf("%s is not in it", f.key)
		}
	}
}

func TestExampleIsWrittenFromTheSchema(t *testing.T) {
	want := writeExample(t)
	if *update {
		if err := os.WriteFile("example.yaml", want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got := Example(); !bytes.Equal(got, want) {
		t.Errorf("example.yaml is not what the schema says; run go test ./conf -update and read the diff\n%s", diff(got, want))
	}
}

const least = "queues: [{name: mta, type: sendmail, in: /var/spool/mqueue.in, out: /var/spool/mqueue}]\n"

func TestExampleIsTheDefaults(t *testing.T) {
	text := Example()
	uncommented := regexp.MustCompile(`(?m)^( *)#([a-z_]+:)`).ReplaceAll(text, []byte("$1$2"))
	if bytes.Equal(text, uncommented) {
		t.Fatal("the example has no key that is commented out")
	}
	want := values(mustParse(t, least))
	for name, text := range map[string][]byte{"as it is": text, "with every key": uncommented} {
		if got := values(mustParse(t, string(text))); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the example is not the defaults:\n%s", name, diff(got.YAML(), want.YAML()))
		}
	}
	// Every key of the schema is one of the example's.
	c := mustParse(t, string(uncommented))
	for _, key := range schemaKeys(reflect.TypeFor[Config](), "") {
		if c.Pos(key) == "default" {
			t.Errorf("%s is not in the example", key)
		}
	}
}

// schemaKeys returns the path of every key, in the queue named mta.
func schemaKeys(t reflect.Type, path string) []string {
	var keys []string
	for _, f := range fieldsOf(t) {
		ft, key := t.Field(f.index).Type, join(path, f.key)
		if f.mta == "postfix" {
			continue // see TestExampleOfPostfixIsTheDefaults
		}
		keys = append(keys, key)
		if ft == reflect.TypeFor[[]Queue]() {
			ft, key = ft.Elem(), key+".mta"
		}
		if section(ft) {
			keys = append(keys, schemaKeys(ft, key)...)
		}
	}
	return keys
}

// Every default and bound of the schema must be text that a user could have
// written, and each default within its bounds.
func TestSchemaTagsParse(t *testing.T) {
	var walk func(st reflect.Type)
	walk = func(st reflect.Type) {
		for _, f := range fieldsOf(st) {
			ft := st.Field(f.index).Type
			switch {
			case ft == reflect.TypeFor[[]Queue]():
				walk(ft.Elem())
				continue
			case section(ft):
				walk(ft)
				continue
			case f.def == "" && !f.need && f.below == "":
				t.Errorf("%s.%s has no default", st, f.name)
			}
			for _, text := range []string{f.def, f.min, f.max} {
				target := reflect.New(ft).Interface()
				if text == "" {
					continue
				}
				if err := setText(target, text); err != nil {
					t.Errorf("%s.%s: %v", st, f.name, err)
				} else if message := f.outside(target); message != "" {
					t.Errorf("%s.%s: %s %s", st, f.name, text, message)
				}
			}
		}
	}
	walk(reflect.TypeFor[Config]())
}

// values is a configuration without where it comes from.
func values(c *Config) *Config {
	plain := *c
	plain.places, plain.sources = nil, nil
	return &plain
}

func mustParse(t *testing.T, texts ...string) *Config {
	t.Helper()
	c, err := Parse(sources(texts...))
	if err != nil {
		t.Fatalf("not loaded:\n%v", err)
	}
	return c
}

// sources names texts holdfast.yaml, conf.d/1.yaml, conf.d/2.yaml ...
func sources(texts ...string) []Source {
	files := make([]Source, len(texts))
	for i, text := range texts {
		files[i] = Source{Name: "holdfast.yaml", Data: []byte(text)}
		if i > 0 {
			files[i].Name = "conf.d/" + string(rune('0'+i)) + ".yaml"
		}
	}
	return files
}

// diff shows the first lines that differ.
func diff(got, want []byte) string {
	g, w := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(g), len(w)) {
		var a, b string
		if i < len(g) {
			a = g[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			return "got:  " + a + "\nwant: " + b
		}
	}
	return ""
}
