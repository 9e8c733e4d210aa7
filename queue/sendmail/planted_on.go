//go:build torture

package sendmail

// planted is the bug that a test has put into the commit, "" for none. The
// harness must report each, or it would not report a real one either.
var planted string

const (
	swapDecide  = "decided before it is prepared: control file before data file"
	swapPublish = "published control file before data file"
)

// plantedDecide decides before anything is prepared.
func (q *Queue) plantedDecide(jobs []*job) {
	if planted == swapDecide {
		q.phase(jobs, func(j *job) error {
			if j.kind == rewritten {
				return nil // there is nothing yet to exchange
			}
			return q.decide(j)
		})
	}
}

// plantedPublish publishes control files before their data files.
func (q *Queue) plantedPublish(jobs []*job) {
	if planted != swapPublish {
		return
	}
	for _, last := range []bool{false, true} {
		q.phase(jobs, func(j *job) error {
			if j.kind != rewritten {
				return nil
			}
			return q.publishControls(j, last)
		})
	}
}
