# Every target sets up what it needs by itself, in .venv/ (see .ci/prepare.py). All it takes is make, python3 and git.

PYTHON   ?= python3
DURATION ?= 5m

# Given to `soak run` only when set; `python3 -m soak run --help` shows the defaults.
SOAK_VARIABLES := PRODUCERS CONSUMERS PAYLOAD INTERVAL MAX_BATCH_BYTES MAX_BUFFERED_BYTES CONSUMER_DELAY \
                  ON_FULL BULK SINK OUT JSON BASELINE SETTINGS DISPLAY

# MAX_BATCH_BYTES=1MiB becomes --max-batch-bytes '1MiB'
lower   = $(shell echo '$(1)' | tr 'A-Z_' 'a-z-')
options = $(foreach variable,$(SOAK_VARIABLES),$(if $($(variable)),--$(call lower,$(variable)) '$($(variable))'))

# $(call with,GROUPS) sets $$py to an interpreter that has these dependency groups, as far as they can be installed.
with = py=$$($(PYTHON) .ci/prepare.py $(1))

.DEFAULT_GOAL := help
.PHONY: help soak soak-pi soak-sinks tune stress baseline report test worlds interleave coverage mutants lint types wheel \
        test-all check bench compare instructions clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'PYTHON=python3.12 takes another interpreter, ARGS="..." is passed on unchanged.'
	@echo 'make soak also takes DURATION=$(DURATION) and'
	@echo '  $(wordlist 1,7,$(SOAK_VARIABLES))'
	@echo '  $(wordlist 8,99,$(SOAK_VARIABLES))'
	@echo 'for example: make soak DURATION=30s PRODUCERS=8 PAYLOAD=10KiB JSON=result.json'

soak: ## sustained load on this machine: is every event delivered once, how fast, in how much memory
	@$(call with,live $(if $(findstring //,$(SINK)),sinks)) && exec "$$py" -m soak run --duration '$(DURATION)' $(options) $(ARGS)

soak-pi: ## the same on a Raspberry Pi's processor: here if this is one, otherwise emulated (qemu)
	@exec $(PYTHON) -m soak pi run --duration '$(DURATION)' $(options) $(ARGS)

soak-sinks: ## Redis, PostgreSQL, NATS, HTTP and files: faults under load, every event read back
	@$(call with,live sinks) && exec "$$py" -m soak sinks --duration '$(DURATION)' $(ARGS)

tune: ## which limits fit this machine: make tune PAYLOAD=10KiB; make soak then uses them
	@$(call with,live) && exec "$$py" -m soak tune $(if $(PAYLOAD),--payload '$(PAYLOAD)') $(ARGS)

stress: ## 256 producers, 2,000 payloads each: are all of them delivered
	@$(call with,live) && exec "$$py" -m soak stress $(ARGS)

baseline: ## record this machine's figures, for make soak to compare with (ARGS="--runs 9 --duration 30s")
	@exec $(PYTHON) -m soak baseline $(ARGS)

report: ## one HTML page of the last soak (ARGS="--run soak/out/latest.json")
	@$(call with,report) && exec "$$py" -m soak report $(ARGS)

bench: ## tempo and its peers, measured side by side
	@$(call with,bench peers) && exec "$$py" -m soak bench $(ARGS)

compare: ## the same, and fail when even the best round of a ratio is worse than the worst recorded
	@$(call with,bench peers) && exec "$$py" -m soak bench --compare auto $(ARGS)

instructions: ## machine instructions per payload (needs valgrind), and fail when they are more than recorded
	@exec $(PYTHON) -m soak instructions $(ARGS)

test: ## the specification of tempo.py, then the quick tests of soak/ (ARGS="-k flush")
	@$(call with,test report bench) && exec "$$py" -m pytest -m 'not slow' $(ARGS)

worlds: ## forks, exits, signals, servers, other frameworks; REPEAT=10 repeats them
	@$(call with,test report sinks recipes worlds typing) && exec "$$py" -m pytest soak/tests -m slow $(ARGS)

interleave: ## stop calls at each of their bytecodes while others run: all pairs, and the broken twins
	@exec $(PYTHON) -m soak interleave $(ARGS)

mutants: ## change tempo.py in a thousand ways: does a test fail each time? (ARGS="--sample 100")
	@$(call with,mutants) && exec "$$py" .ci/mutants.py $(ARGS)

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

coverage: ## how much of tempo.py its specification runs
	@$(call with,coverage) && "$$py" -m coverage erase && \
	"$$py" -m coverage run -m pytest test_tempo.py $(ARGS) && \
	"$$py" -m coverage combine -q && \
	"$$py" -m coverage report && \
	"$$py" -m coverage json -q -o - | "$$py" -c "$$COVERED"

lint: ## ruff: rules and format
	@$(call with,lint) && "$$py" -m ruff check . && "$$py" -m ruff format --check .

types: ## mypy --strict
	@$(call with,lint) && exec "$$py" -m mypy

wheel: ## the wheel holds tempo.py alone and works outside of the checkout
	@$(call with,test) && exec .ci/wheel "$$py"

test-all: ## make test on every interpreter found, and which were not
	@exec .ci/test-all

check: lint types test coverage worlds interleave wheel test-all ## everything, the real servers and the instructions included
	@$(MAKE) --no-print-directory soak-sinks DURATION=10s
	@$(MAKE) --no-print-directory instructions

clean: ## remove environments, caches and builds (not the results in soak/out)
	rm -rf .venv .cache build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
