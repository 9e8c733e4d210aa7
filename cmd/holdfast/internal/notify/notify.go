// Package notify tells systemd how the daemon is (sd_notify(3)): one
// datagram to the socket named by NOTIFY_SOCKET.
package notify

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
)

// Socket is where notifications go; the zero value swallows them.
type Socket struct{ addr string }

// FromEnv returns the socket that systemd named, if any.
func FromEnv() Socket { return Socket{addr: os.Getenv("NOTIFY_SOCKET")} }

// Send sends a state such as "READY=1". Without a socket it does nothing.
func (s Socket) Send(state string) error {
	if s.addr == "" {
		return nil
	}
	name := s.addr
	if name[0] == '@' { // abstract socket, unix(7)
		name = "\x00" + name[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// WatchdogInterval is how often WATCHDOG=1 is due, half of what systemd
// allows; 0 if it does not watch us (sd_watchdog_enabled(3)). WATCHDOG_PID
// names the process that systemd started, our keeper, so it is not compared.
func WatchdogInterval() time.Duration {
	us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || us <= 0 {
		return 0
	}
	return time.Duration(us) * time.Microsecond / 2
}
