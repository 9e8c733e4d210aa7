// Package setup prints how an MTA on this machine hands its mail to Holdfast
// and takes it back. It changes nothing: the lines are for a person, who may pipe
// them to a shell. Sources: the MTAs' manuals (postconf(5), master(5), the
// sendmail operations guide), tried with Debian 12's packages.
package setup

import (
	"fmt"
	"io"
	"strings"
)

// Postfix is what the lines for Postfix depend on.
type Postfix struct {
	Config       string // configuration directory
	QueueDir     string
	Listener     string   // host:port for changed mail
	HeaderChecks string   // as they are set now
	DataChecks   string   // smtpd_data_restrictions, as they are set now
	Chroot       string   // of the smtpd that is there: y, n or -
	ByClient     bool     // hold by smtpd instead of header_checks
	Unchecked    []string // services (name/type) that skip header checks
}

// Listener options: a second smtpd on loopback that holds what it accepts, and
// does to it nothing that was done the first time.
var listenerOptions = []string{
	"syslog_name=postfix/rehold", "content_filter=", "smtpd_milters=",
	"receive_override_options=no_header_body_checks,no_unknown_recipient_checks,no_milters,no_address_mappings",
	"smtpd_client_restrictions=", "smtpd_helo_restrictions=", "smtpd_sender_restrictions=",
	"smtpd_relay_restrictions=permit_mynetworks,reject", "smtpd_recipient_restrictions=permit_mynetworks,reject",
	"smtpd_data_restrictions=check_client_access,static:HOLD", "smtpd_end_of_data_restrictions=", "mynetworks=127.0.0.0/8",
	"smtpd_authorized_xforward_hosts=127.0.0.0/8", "local_header_rewrite_clients=", "smtpd_error_sleep_time=0",
	"smtpd_client_connection_count_limit=0", "smtpd_client_connection_rate_limit=0", "smtpd_tls_security_level=none",
	"smtpd_delay_reject=yes", "smtpd_helo_required=no", "smtpd_sasl_auth_enable=no", "smtpd_discard_ehlo_keywords=",
}

// Print writes the lines.
func (p Postfix) Print(w io.Writer) error {
	var b strings.Builder
	c := "postconf -c " + quote(p.Config)
	if p.ByClient {
		b.WriteString("# Postfix puts on hold what comes by SMTP. Local programs' mail is not held.\n")
		fmt.Fprintf(&b, "%s -e %s\n", c, quote("smtpd_data_restrictions = "+first("check_client_access static:HOLD", p.DataChecks)))
	} else {
		table := p.Config + "/holdfast_header_checks"
		b.WriteString("# Postfix puts all mail on hold, from SMTP and from local programs.\n")
		fmt.Fprintf(&b, "printf '%%s\\n' '/^Received:/ HOLD' >%s\n", quote(table))
		fmt.Fprintf(&b, "%s -e %s\n", c, quote("header_checks = "+first("regexp:"+table, p.HeaderChecks)))
		for _, service := range p.Unchecked {
			fmt.Fprintf(&b, "# %s skips header checks (receive_override_options): its mail would pass by Holdfast.\n", service)
			fmt.Fprintf(&b, "%s -P %s\n", c, quote(service+"/smtpd_data_restrictions=check_client_access,static:HOLD"))
		}
		b.WriteString("# Bounces and mail that local aliases or .forward files send on are not held.\n# To hold them, too:\n")
		fmt.Fprintf(&b, "# %s -e 'internal_mail_filter_classes = bounce, notify'\n", c)
	}
	b.WriteString("\n# A second listener, for mail that Holdfast has changed: it holds that again.\n")
	service := p.Listener + "/inet"
	fmt.Fprintf(&b, "%s -M %s\n", c, quote(fmt.Sprintf("%s = %s inet n - %s - - smtpd", service, p.Listener, p.Chroot)))
	for _, option := range listenerOptions {
		fmt.Fprintf(&b, "%s -P %s\n", c, quote(service+"/"+option))
	}
	fmt.Fprintf(&b, "\npostfix -c %s check\npostfix -c %s reload\n", quote(p.Config), quote(p.Config))
	b.WriteString("\n# /etc/holdfast/holdfast.yaml:\n#\n# queues:\n")
	fmt.Fprintf(&b, "#   - name: mta\n#     type: postfix\n#     dir: %s\n", p.QueueDir)
	if p.Config != "/etc/postfix" {
		fmt.Fprintf(&b, "#     config: %s\n", p.Config)
	}
	if p.Listener != "127.0.0.1:10027" {
		fmt.Fprintf(&b, "#     reinject: %q\n", p.Listener)
	}
	b.WriteString("#\n# Then: holdfast check, and holdfast run\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// first puts a rule before those that there are, unless it is one of them.
func first(rule, rules string) string {
	switch {
	case rules == "":
		return rule
	case strings.Contains(rules, rule):
		return rules
	}
	return rule + ", " + rules
}

// Sendmail is what the lines for sendmail depend on.
type Sendmail struct {
	Program string // the MTA
	CF      string // its configuration file; empty: the program's own
	In, Out string
	Debian  bool // /etc/mail/sendmail.conf is there
}

// Print writes the lines.
func (s Sendmail) Print(w io.Writer) error {
	var b strings.Builder
	parms := "-ODeliveryMode=queueonly -OQueueDirectory=" + s.In + " -OPrivacyOptions=noetrn"
	fmt.Fprintf(&b, "# The queue that only Holdfast takes mail from. It must be on the file system of\n# %s.\n", s.Out)
	if s.Debian {
		fmt.Fprintf(&b, "install -d -o smmta -g smmsp -m 2750 %s\n", quote(s.In))
		b.WriteString("\n# Two daemons: one listens and only queues, and ETRN is off, or clients could have\n# unscanned mail delivered; the other delivers what Holdfast hands back. In\n# /etc/mail/sendmail.conf, in place of the lines that there are:\n#\n")
		fmt.Fprintf(&b, "# DAEMON_PARMS=\"%s\";\n# QUEUE_MODE=\"daemon\";\n# QUEUE_INTERVAL=\"10m\";\n# QUEUE_PARMS=\"\";\n#\n", parms)
		b.WriteString("# Then: sendmailconfig, and /etc/init.d/sendmail restart\n")
	} else {
		cf := ""
		if s.CF != "" {
			cf = " -C" + quote(s.CF)
		}
		fmt.Fprintf(&b, "install -d -m 0700 %s\n", quote(s.In))
		b.WriteString("\n# Two daemons: one listens and only queues, and ETRN is off, or clients could have\n# unscanned mail delivered; the other delivers what Holdfast hands back.\n")
		fmt.Fprintf(&b, "%s%s -L sm-in -bd %s -OPidFile=/run/sendmail.in.pid\n", quote(s.Program), cf, parms)
		fmt.Fprintf(&b, "%s%s -L sm-que -q10m -OQueueDirectory=%s -OPidFile=/run/sendmail.que.pid\n", quote(s.Program), cf, s.Out)
	}
	b.WriteString("\n# /etc/holdfast/holdfast.yaml:\n#\n# queues:\n")
	fmt.Fprintf(&b, "#   - name: mta\n#     type: sendmail\n#     in: %s\n#     out: %s\n", s.In, s.Out)
	if !s.Debian {
		kick := []string{s.Program}
		if s.CF != "" {
			kick = append(kick, "-C"+s.CF)
		}
		fmt.Fprintf(&b, "#     kick: [%s]\n", strings.Join(kick, ", "))
	}
	b.WriteString("#\n# Then: holdfast check, and holdfast run\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// quote makes one word of a shell's.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:=,+-") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
