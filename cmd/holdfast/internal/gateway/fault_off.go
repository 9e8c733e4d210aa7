//go:build !faults

package gateway

import "holdfast/queue"

// faultAt does nothing in a normal build.
func faultAt(string, *message) {}

// faultPlan does nothing in a normal build.
func faultPlan(_ *message, groups []queue.Group) []queue.Group { return groups }
