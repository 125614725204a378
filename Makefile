# Every target sets up what it needs by itself, in .venv/ (see .ci/prepare.py). All it takes is make, python3 and git.

PYTHON   ?= python3
DURATION ?= 5m

# Given to `soak run` only when set; what it does else is told by: python3 -m soak run --help
SOAK_VARIABLES := PRODUCERS CONSUMERS PAYLOAD INTERVAL MAX_BATCH_BYTES MAX_BUFFERED_BYTES CONSUMER_DELAY \
                  ON_FULL BULK SINK OUT JSON BASELINE SETTINGS DISPLAY

# MAX_BATCH_BYTES=1MiB becomes --max-batch-bytes '1MiB'
lower   = $(shell echo '$(1)' | tr 'A-Z_' 'a-z-')
options = $(foreach variable,$(SOAK_VARIABLES),$(if $($(variable)),--$(call lower,$(variable)) '$($(variable))'))

# $(call with,EXTRAS) sets $$py to an interpreter that has them.
with = py=$$($(PYTHON) .ci/prepare.py $(1))

.DEFAULT_GOAL := help
.PHONY: help soak soak-pi soak-sinks tune stress baseline report test bench compare overhead instructions hostile interleave mutants test-all coverage lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'PYTHON=python3.12 takes another interpreter, ARGS="..." is given on as it stands.'
	@echo 'make soak also takes DURATION=$(DURATION) and'
	@echo '  $(wordlist 1,7,$(SOAK_VARIABLES))'
	@echo '  $(wordlist 8,99,$(SOAK_VARIABLES))'
	@echo 'for example: make soak DURATION=30s PRODUCERS=8 PAYLOAD=10KiB JSON=result.json'

soak: ## sustained load on this machine: is every event delivered once, how fast, in how much memory
	@$(call with,--optional live $(if $(findstring //,$(SINK)),sinks)) && exec "$$py" -m soak run --duration '$(DURATION)' $(options) $(ARGS)

soak-pi: ## the same on a Raspberry Pi's processor: here if this is one, else emulated (Debian's arm64 packages, qemu)
	@exec $(PYTHON) -m soak pi run --duration '$(DURATION)' $(options) $(ARGS)

tune: ## which limits fit this machine: make tune PAYLOAD=10KiB; make soak then uses them
	@$(call with,--optional live) && exec "$$py" -m soak tune $(if $(PAYLOAD),--payload '$(PAYLOAD)') $(ARGS)

soak-sinks: ## Redis, PostgreSQL, NATS, HTTP and a file behind it: faults under load, every event read back
	@$(call with,--optional sinks) && exec "$$py" -m soak sinks --duration '$(DURATION)' $(ARGS)

stress: ## 256 producers, 2,000 payloads each: are all of them delivered
	@$(call with,--optional live) && exec "$$py" -m soak stress $(ARGS)

baseline: ## record this machine's figures, for make soak to compare with (ARGS="--runs 9 --duration 30s")
	@exec $(PYTHON) -m soak baseline $(ARGS)

report: ## one HTML page and one picture of the last soak (ARGS="--run soak/out/latest.json")
	@$(call with,--optional soak) && exec "$$py" -m soak report $(ARGS)

test: ## the tests
	@$(call with,test) && exec "$$py" -m pytest $(ARGS)

# The peers are looked at beside tempo; what cannot be installed is left out with a line.
peers = $(PYTHON) .ci/prepare.py --optional bench peers >/dev/null

bench: ## tempo beside queues, other batchers and the least that is possible, in one run
	@$(call with,bench) && $(peers) && exec "$$py" -m soak bench $(ARGS)

compare: ## the same, and fail when a ratio is worse than recorded by more than its noise
	@$(call with,bench) && exec "$$py" -m soak bench --compare auto $(ARGS)

overhead: ## what the harness's own looking takes of the rate that it measures (ARGS="--rounds 40")
	@$(call with,--optional live) && exec "$$py" -m soak overhead $(ARGS)

instructions: ## machine instructions a payload (needs valgrind), and fail when they are more than recorded
	@exec $(PYTHON) -m soak instructions $(ARGS)

test-all: ## the tests on every interpreter found, and which were not
	@exec .ci/test-all

interleave: ## stop calls at each of their bytecodes while others run: all pairs, and the broken twins
	@exec $(PYTHON) -m soak interleave $(ARGS)

mutants: ## change tempo.py in a thousand ways: does a test fail each time?
	@$(call with,test mutants) && exec "$$py" -m soak mutants $(ARGS)

hostile: ## try to break it: hostile callers, fork and exit, other worlds, misuse (ARGS="--family forks")
	@$(call with,--optional hostile) && exec "$$py" -m soak hostile $(ARGS)

# The one place that says how much must be covered.
define COVERED
import json, sys
total = json.load(sys.stdin)["totals"]
lines = 100 * total["covered_lines"] / total["num_statements"]
branches = 100 * total["covered_branches"] / max(1, total["num_branches"])
print(f"covered: lines {lines:.1f}% (100% needed), branches {branches:.1f}% (98% needed)")
sys.exit(lines < 100 or branches < 98)
endef
export COVERED

coverage: ## the tests, and how much of tempo.py they run
	@$(call with,test coverage) && "$$py" -m coverage erase && \
	"$$py" -m coverage run -m pytest $(ARGS) && \
	"$$py" -m coverage combine -q && \
	"$$py" -m coverage report && \
	"$$py" -m coverage json -q -o - | "$$py" -c "$$COVERED"

lint: ## ruff and mypy
	@$(call with,test lint soak sinks) && "$$py" -m ruff check . && "$$py" -m mypy

clean: ## remove environments, caches and builds (not the results in soak/out)
	rm -rf .venv .cache build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
