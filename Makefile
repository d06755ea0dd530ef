# `make quickstart` and `make test` each set up everything by themselves: a virtual environment, the pinned
# dependencies, the package. Nothing but Python 3.11 or newer is needed.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help quickstart test test-all check pocket clean

help:
	@echo "make quickstart   the whole study on the embedded pocket family; writes runs/quickstart/report.html"
	@echo "make test         format, lint, types and the tests"
	@echo "make test-all     the same, and the tests that take minutes"
	@echo "make pocket       builds the embedded family again from text (about half an hour)"
	@echo "make clean        remove the virtual environment and caches (not your runs/)"

quickstart: .venv/installed
	$(BIN)/fedgraft quickstart --out runs/quickstart

# two workers with threads of their own would wait for each other
test test-all: export OMP_NUM_THREADS := 1

test: check
	$(BIN)/pytest -n 2 -m "not slow"

test-all: check
	$(BIN)/pytest -n 2

# The embedded family from text, about half an hour; FEDGRAFT_DATA names the folder with the text.
pocket: .venv/installed
	$(BIN)/python -m fedgraft.pocket.recipe --data $${FEDGRAFT_DATA:-../shared/data} --out runs/pocket-family
	rm -rf src/fedgraft/pocket/weights/base src/fedgraft/pocket/weights/instruct
	cp -r runs/pocket-family/base runs/pocket-family/instruct src/fedgraft/pocket/weights/

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -n 2

.venv/installed: pyproject.toml constraints.txt hatch_build.py src/fedgraft/weights/loops.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedgraft needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
