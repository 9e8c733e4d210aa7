package sendmail

import "time"

func fixedNow() time.Time { return time.Unix(1_800_000_000, 0) }
