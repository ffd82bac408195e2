# Two commands: `make demo` and `make test`. Everything goes into .venv and out/.
.DEFAULT_GOAL := help
.PHONY: help install demo test lint readme bench-merge mutants clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

help:
	@echo "make demo         train a base and experts, merge them with every method, compare"
	@echo "make test         run the tests"
	@echo "make lint         ruff, and mypy on the package"
	@echo "make readme       write the table of methods into README.md"
	@echo "make bench-merge  time merges of 1.1B-parameter models against plain reading and writing"
	@echo "make mutants      mutation testing of the core (slow)"
	@echo "make clean        remove .venv, out and caches"
	@echo "PYTHON=python3.12 make ...   uses that interpreter (3.11 or newer)"

install: $(STAMP)

# One installation, repeated when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is not one:" \
	    "$$($(PYTHON) --version 2>&1 || true)" >&2; \
	  echo "  fix: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fusewright demo -o out/demo

# One thread for each of the two workers: the tests are many and small.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/mypy

# The table of methods comes from their cards.
readme: $(STAMP)
	$(BIN)/python tools/readme.py

bench-merge: $(STAMP)
	$(BIN)/python benchmarks/merge.py $(ARGS)

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py $(ARGS)

clean:
	rm -rf $(VENV) out build dist mutants .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
