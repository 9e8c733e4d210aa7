//go:build !faults

package main

import "github.com/spf13/cobra"

// addFaultCommands adds nothing to a normal build.
func addFaultCommands(*cobra.Command, *global) {}
