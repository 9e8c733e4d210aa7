package postfix

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Long queue ids: seconds and microseconds in base 52, "z", the inode in base
// 51 (reference: B1; Postfix mail_queue.h).
const (
	alphabet    = "0123456789BCDFGHJKLMNPQRSTVWXYZbcdfghjklmnpqrstvwxyz"
	inodeBase   = 51
	usecDigits  = 4
	minLongTime = 10 // digits before the "z"
	shortUsec   = 5  // hexadecimal digits before the inode of a short id
	maxID       = 100
)

// validID says that s can be a queue id: what has a dot is a file in the
// making, which every program of Postfix ignores.
func validID(s string) bool {
	if len(s) <= shortUsec || len(s) > maxID {
		return false
	}
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && c != '_' {
			return false
		}
	}
	return true
}

// timePart is the part of an id before the inode, with the "z" of a long id.
func timePart(id string) (part string, long bool) {
	if i := strings.LastIndexByte(id, 'z'); i >= minLongTime {
		return id[:i+1], true
	}
	return id[:shortUsec], false
}

// withInode is the id that a file with that inode must have, if it is to keep
// the time of id: two files that exist never get one name.
func withInode(id string, ino uint64) string {
	part, long := timePart(id)
	if !long {
		return part + fmt.Sprintf("%X", ino)
	}
	var digits []byte
	for {
		digits = append([]byte{alphabet[ino%inodeBase]}, digits...)
		if ino /= inodeBase; ino == 0 {
			return part + string(digits)
		}
	}
}

// hashName is what the sub-directories of a hashed queue are made of: the
// short id, or the microseconds of a long one as five hexadecimal digits.
func hashName(id string) string {
	part, long := timePart(id)
	if !long {
		return id
	}
	usec := 0
	for _, c := range part[len(part)-1-usecDigits : len(part)-1] {
		usec = usec*len(alphabet) + strings.IndexRune(alphabet, c)
	}
	return fmt.Sprintf("%05X", usec)
}

// hashed is the directory of an id in a queue of the given depth.
func hashed(dir, id string, depth int) string {
	name := hashName(id)
	for i := range min(depth, len(name)) {
		dir = filepath.Join(dir, name[i:i+1])
	}
	return dir
}
