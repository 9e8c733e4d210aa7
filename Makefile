# See README.md; the budgets of these targets are for 2 cores.

GO      ?= go
GOFLAGS := -trimpath
T       ?= FuzzControlFile
FUZZTIME ?= 60s
HOLDFAST_ROUNDS ?= 1

export CGO_ENABLED = 0

.PHONY: all test e2e torture-ci torture bench bench-weekend soak fuzz lint demo clean

all: bin/holdfast

bin/holdfast: FORCE
	$(GO) build $(GOFLAGS) -o $@ ./cmd/holdfast

bin/holdfast-faults: FORCE
	$(GO) build $(GOFLAGS) -tags faults -o $@ ./cmd/holdfast

.PHONY: FORCE
FORCE:

# Unit tests, fixtures, transcripts, testscript, seeds of the fuzz targets, and
# a smoke run through the real sendmail and Postfix. .ci/setup installs what
# they need. V=-v says more.
V ?=
test:
	.ci/setup >/dev/null
	$(GO) test -count=1 -timeout 20m $(V) ./...
	$(GO) test -count=1 $(V) -tags e2e -run 'E2EQuarantine' ./queue/sendmail ./queue/postfix

# Everything with real servers, one after another.
e2e: bin/holdfast
	.ci/setup
	$(GO) test -count=1 -p 1 -timeout 20m $(V) -tags e2e -run E2E ./...
	.ci/stranger postfix
	.ci/stranger sendmail

# A fault at every operation, kills, power loss: a bounded part, and its tables.
torture-ci:
	HOLDFAST_ROUNDS=1 $(GO) test -count=1 -p 1 -timeout 30m -tags torture -run Torture -v ./queue/...

# The same, much longer.
torture:
	HOLDFAST_ROUNDS=20 $(GO) test -count=1 -p 1 -timeout 12h -tags torture -run Torture -v ./queue/...

# Ratios, measured side by side in one run; the second is about Postfix's routes.
bench:
	$(GO) test -run '^$$' -bench . -benchtime 1x ./...
	$(GO) test -tags e2e -run '^$$' -bench Routes -benchtime 1x ./queue/postfix

# The weekend of 2008: mail with and without messages that kill their worker.
# make bench-weekend N=66000
N ?= 2000
bench-weekend:
	HOLDFAST_WEEKEND=$(N) $(GO) test -run '^$$' -bench Weekend -benchtime 1x -timeout 4h ./cmd/holdfast

# Kills and an administrator, again and again. make soak MINUTES=600
MINUTES ?= 60
soak:
	end=$$(( $$(date +%s) + $(MINUTES) * 60 )); while [ $$(date +%s) -lt $$end ]; do \
		$(GO) test -count=1 -run 'KilledInTheMiddle|AnAdministratorMeanwhile|KilledAtSystemCalls' ./cmd/holdfast || exit 1; done

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
