// Package layers holds the project's rules about which package may use what,
// each with its reason. They are checked by its test.
package layers

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// File is one parsed source file.
type File struct {
	Path    string // relative to the top, with slashes
	Test    bool
	Imports []string
	AST     *ast.File
	Set     *token.FileSet
}

// Load parses every Go file below root.
func Load(root string) ([]File, error) {
	var out []File
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f, err := Parse(filepath.ToSlash(rel), nil, path)
		if err != nil {
			return err
		}
		out = append(out, f)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load sources: %w", err)
	}
	return out, nil
}

// Parse reads one file, from src or the disk.
func Parse(rel string, src any, path string) (File, error) {
	f := File{Path: rel, Test: strings.HasSuffix(rel, "_test.go"), Set: token.NewFileSet()}
	var err error
	if f.AST, err = parser.ParseFile(f.Set, path, src, parser.ParseComments); err != nil {
		return f, fmt.Errorf("parse %s: %w", rel, err)
	}
	for _, im := range f.AST.Imports {
		p, err := strconv.Unquote(im.Path.Value)
		if err != nil {
			return f, fmt.Errorf("import in %s: %w", rel, err)
		}
		f.Imports = append(f.Imports, p)
	}
	return f, nil
}

func under(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return path == d || strings.HasPrefix(path, d+"/") })
}

// only says who alone may import a package.
var only = []struct {
	pkg     string
	allowed []string
	reason  string
}{
	{"gopkg.in/yaml.v3", []string{"conf"}, "the upstream is archived: one place to change when it is replaced"},
	{"go.etcd.io/bbolt", []string{"poison/ledger"}, "losing the ledger must lose no mail: nothing else keeps data in it"},
	{"github.com/sirupsen/logrus", []string{"cmd"}, "libraries report events; exactly one place logs each"},
	{"github.com/spf13/cobra", []string{"cmd"}, "commands are the program's face"},
	{"github.com/landlock-lsm/go-landlock", []string{"scan/sandbox"}, "one place says what a parser may do"},
	{"github.com/elastic/go-seccomp-bpf", []string{"scan/sandbox"}, "one place says what a parser may do"},
	{"os/exec", []string{"cmd", "poison/proc", "queue/sendmail/kick.go", "queue/postfix/command.go"}, "what parses hostile bytes starts no program"},
	{"net", []string{"cmd", "conf", "scan/worker/conn.go", "queue/postfix/smtp.go"}, "what parses hostile bytes speaks to nobody; the exceptions are the supervisor's end of the worker's socket, and Postfix's listener for changed mail"},
	{"holdfast/conf", []string{"cmd"}, "libraries get their settings from their caller"},
}

// ours says what each layer may import of ours.
var ours = []struct {
	layer   string
	allowed []string
	reason  string
}{
	{"queue", []string{"holdfast/queue"}, "messages at rest know nothing of judging or isolation"},
	{"scan", []string{"holdfast/scan", "holdfast/queue"}, "judging needs the envelope and nothing else"},
	{"poison", []string{"holdfast/poison"}, "isolation knows items, runs and deaths, not mail"},
	{"conf", nil, "the configuration describes the others and is used by none of them"},
}

// Imports checks the import rules.
func Imports(files []File) (broken []string) {
	for _, f := range files {
		if f.Test {
			continue
		}
		for _, im := range f.Imports {
			for _, r := range only {
				if under(im, r.pkg) && (im == r.pkg || strings.Contains(r.pkg, ".")) && !under(f.Path, r.allowed...) {
					broken = append(broken, fmt.Sprintf("%s imports %s: %s", f.Path, im, r.reason))
				}
			}
			for _, r := range ours {
				if under(f.Path, r.layer) && under(im, "holdfast") && !under(im, r.allowed...) {
					broken = append(broken, fmt.Sprintf("%s imports %s: %s", f.Path, im, r.reason))
				}
			}
			if under(f.Path, "scan") && under(im, "holdfast/queue") && im != "holdfast/queue" {
				broken = append(broken, fmt.Sprintf("%s imports %s: judging needs the envelope and nothing else", f.Path, im))
			}
		}
	}
	return broken
}

// changing are functions of os that change what is on a disk.
var changing = []string{
	"Rename", "Remove", "RemoveAll", "Link", "Symlink", "WriteFile", "Create", "CreateTemp", "Mkdir", "MkdirAll", "MkdirTemp", "Chmod", "Chown", "Truncate", "Chtimes",
}

// Disk checks that mail is changed through queue/durable only, so that the
// fault harness reaches every operation.
func Disk(files []File) (broken []string) {
	for _, f := range files {
		if f.Test || !under(f.Path, "queue") || under(f.Path, "queue/durable", "queue/history") {
			continue
		}
		ast.Inspect(f.AST, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := s.X.(*ast.Ident); ok && (x.Name == "os" && slices.Contains(changing, s.Sel.Name) ||
				x.Name == "unix" && slices.Contains([]string{"Rename", "Renameat2", "Unlink", "Linkat", "Mkdir"}, s.Sel.Name)) {
				broken = append(broken, fmt.Sprintf("%s: %s.%s: operations on mail go through queue/durable", f.Set.Position(s.Pos()), x.Name, s.Sel.Name))
			}
			return true
		})
	}
	return broken
}

// Shape checks what keeps code readable: no init, no log.Fatal, no exported
// variable, a sentence for every package, functions of bounded length.
func Shape(files []File) (broken []string) {
	documented, packages := map[string]bool{}, map[string]string{}
	for _, f := range files {
		if f.Test {
			continue
		}
		dir := filepath.ToSlash(filepath.Dir(f.Path))
		packages[dir] = f.Path
		documented[dir] = documented[dir] || f.AST.Doc != nil
		for _, d := range f.AST.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.Name == "init" {
					broken = append(broken, f.Path+": func init: wiring belongs into main")
				}
				if n := f.Set.Position(d.End()).Line - f.Set.Position(d.Pos()).Line; n > maxFunction {
					broken = append(broken, fmt.Sprintf("%s: %s has %d lines, more than %d", f.Path, d.Name.Name, n, maxFunction))
				}
				if d.Name.IsExported() && d.Doc == nil && d.Recv == nil {
					broken = append(broken, fmt.Sprintf("%s: %s has no docstring", f.Path, d.Name.Name))
				}
			case *ast.GenDecl:
				broken = append(broken, variables(f, d)...)
			}
		}
		ast.Inspect(f.AST, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && !slices.Contains(f.Imports, "testing") && slices.Contains([]string{"Fatal", "Fatalf", "Fatalln"}, s.Sel.Name) {
				broken = append(broken, f.Path+": "+s.Sel.Name+": errors become exit codes in one place")
			}
			return true
		})
	}
	for dir, ok := range documented {
		if !ok {
			broken = append(broken, packages[dir]+": the package has no sentence")
		}
	}
	return broken
}

const maxFunction = 120

func variables(f File, d *ast.GenDecl) (broken []string) {
	if d.Tok != token.VAR {
		return nil
	}
	for _, s := range d.Specs {
		for _, name := range s.(*ast.ValueSpec).Names {
			if name.IsExported() && !strings.HasPrefix(name.Name, "Err") {
				broken = append(broken, fmt.Sprintf("%s: exported variable %s: no global state", f.Path, name.Name))
			}
		}
	}
	return broken
}

// top is the fixed top level, besides dot-files.
var top = []string{"cmd", "queue", "scan", "poison", "conf", "testdata", "go.mod", "go.sum", "Makefile", "README.md", "LICENSE", "bin"}

// Top checks the names at the top level.
func Top(names []string) (broken []string) {
	for _, n := range names {
		if !strings.HasPrefix(n, ".") && !slices.Contains(top, n) {
			broken = append(broken, n+": the top level is fixed")
		}
	}
	return broken
}
