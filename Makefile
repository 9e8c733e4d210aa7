# See README.md; the budgets of these targets are for 2 cores.

GO      ?= go
GOFLAGS := -trimpath
T       ?= FuzzControlFile
FUZZTIME ?= 60s
HOLDFAST_ROUNDS ?= 1

export CGO_ENABLED = 0

.PHONY: all test e2e torture-ci torture bench fuzz lint demo clean

all: bin/holdfast

bin/holdfast: FORCE
	$(GO) build $(GOFLAGS) -o $@ ./cmd/holdfast

bin/holdfast-faults: FORCE
	$(GO) build $(GOFLAGS) -tags faults -o $@ ./cmd/holdfast

.PHONY: FORCE
FORCE:

# Unit tests, fixtures, transcripts, testscript, seeds of the fuzz targets, and
# a smoke run through the real sendmail. .ci/setup installs strace and m4.
test:
	.ci/setup >/dev/null
	$(GO) test ./...
	$(GO) test -count=1 -tags e2e -run E2EQuarantineRelease ./queue/sendmail

# Everything with real servers; .ci/setup unpacks them.
e2e:
	.ci/setup
	$(GO) test -count=1 -p 1 -tags e2e -run E2E ./...

# A fault at every operation, kills, power loss: a bounded part.
torture-ci:
	HOLDFAST_ROUNDS=1 $(GO) test -count=1 -p 1 -tags torture -run Torture -v ./... | grep -v '^?'

# The same, much longer.
torture:
	HOLDFAST_ROUNDS=20 $(GO) test -count=1 -p 1 -timeout 2h -tags torture -run Torture -v ./... | grep -v '^?'

bench:
	$(GO) test -run '^$$' -bench . ./...

# make fuzz T=FuzzControlFile
fuzz:
	@p=$$(grep -rl "func $(T)(" --include='*_test.go' . | head -n 1); test -n "$$p" || { echo "no fuzz target $(T)"; exit 2; }; \
	$(GO) test -run '^$$' -fuzz "^$(T)$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./$$(dirname $$p)

lint:
	.ci/lint

demo: bin/holdfast bin/holdfast-faults
	bin/holdfast-faults demo

clean:
	rm -rf bin
