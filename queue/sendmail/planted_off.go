//go:build !torture

package sendmail

// plantedDecide and plantedPublish do nothing in a normal build.
func (q *Queue) plantedDecide([]*job)  {}
func (q *Queue) plantedPublish([]*job) {}
