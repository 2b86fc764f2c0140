# Everything a person types. `make` alone prints this list.
# The environment lives in .venv and is rebuilt only when pyproject.toml or constraints.txt change.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch comes first and pinned: an unpinned torch can drag in gigabytes of CUDA libraries of another version.
TORCH := torch==2.13.0
FLOORS := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,kernels workbench models probes case_studies app)))
ARGS  ?=
# Every worker computes on one thread. More than two help little: a few long tests decide.
WORKERS ?= 2

IN_RANGE := import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
find_python = $(shell for candidate in python3 python3.11 python3.12 python3.13; do \
	if $$candidate -c '$(IN_RANGE)' >/dev/null 2>&1; then echo $$candidate; break; fi; done)
PYTHON ?= $(find_python)

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow bench lint format check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found; install one or say: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable . --group dev
	@touch $@

install: $(STAMP)  ## create .venv and install the workbench into it

run: $(STAMP)  ## open the dashboard (ARGS="--port 8060" passes options on)
	$(BIN)/workbench serve $(ARGS)

# pytest comes last so that its summary is the last line.
test: $(STAMP) lint check  ## lint, type check, dependency check and every test that is not slow
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(STAMP)  ## the slow tests alone
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(STAMP)  ## the benchmark table: measured ratios beside their limits (ARGS="--only NAME --json")
	@$(BIN)/python -m tests.benchmarks $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy $(FLOORS)

check: $(STAMP)  ## the installed packages fit together
	$(BIN)/python -m pip check

format: $(STAMP)  ## sort imports, apply the safe fixes and reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build leftovers (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
