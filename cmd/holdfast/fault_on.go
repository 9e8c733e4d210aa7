//go:build faults

package main

import "github.com/spf13/cobra"

// addFaultCommands adds the demonstration, which needs a worker that a
// message can kill.
func addFaultCommands(root *cobra.Command, g *global) { root.AddCommand(newDemo(g)) }
