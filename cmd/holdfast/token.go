package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"holdfast/poison/ledger"
	"holdfast/queue/durable"
)

const tokenBytes = 16

// installationToken is the name by which we know our own marks in a queue
// again. Without it a decided message would look like somebody else's, so it
// is in a file of its own, with a copy in the ledger: losing one of the two
// costs nothing. The file wins.
func installationToken(path string, led *ledger.Ledger) (string, error) {
	copied, err := led.Token()
	if err != nil {
		return "", err
	}
	token, err := readToken(path)
	switch {
	case err == nil:
	case validToken(copied):
		token = copied // an installation from before the file, or one that lost it
	case errors.Is(err, fs.ErrNotExist):
		b := make([]byte, tokenBytes)
		if _, err := rand.Read(b); err != nil {
			return "", fmt.Errorf("make the installation's token: %w", err)
		}
		token = hex.EncodeToString(b)
	default:
		return "", err
	}
	if err != nil {
		write := func(w io.Writer) error {
			_, err := io.WriteString(w, token+"\n")
			return err
		}
		if err := (&durable.FS{}).ReplaceFile(path, 0o600, write); err != nil {
			return "", fmt.Errorf("keep the installation's token: %w", err)
		}
	}
	if copied != token {
		return token, led.SetToken(token)
	}
	return token, nil
}

func readToken(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read the installation's token: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if !validToken(token) {
		return "", fmt.Errorf("%s is damaged: put it back from a backup; without it decided mail in the queue cannot be told from new mail. If nothing is in the queue, delete it", path)
	}
	return token, nil
}

func validToken(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == tokenBytes
}
