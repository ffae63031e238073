# make demo | test | bench | lint each set up what they need, once; the second time they start at once.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two at a time; then, with the machine to themselves, those that compare times. `make test TESTS=tests/test_plan.py`: some.
SUITE = $(if $(TESTS),$(1) -m pytest $(TESTS),OMP_NUM_THREADS=1 $(1) -m pytest -n 2 --dist loadfile -m "not alone" && $(1) -m pytest -m alone)

.PHONY: help setup demo test test-oldest bench lint format clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## / : /'

setup: $(VENV)/.ready  ## a virtual environment in .venv with the pinned versions of constraints.txt

demo: $(VENV)/.ready  ## distil a student on real digits: teacher, cache, three students, one table, one picture
	$(RUN) tools/demo.py

test: $(VENV)/.ready-test  ## every test, every backend
	$(call SUITE,$(RUN))

test-oldest: .venv-oldest/.ready  ## the same with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(call SUITE,.venv-oldest/bin/python)

bench: $(VENV)/.ready  ## what has been measured, what has not, and the command of each
	@$(RUN) benchmarks/run_gpu.py --list

lint: $(VENV)/.ready-test  ## style, formatting, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff check --preview --select PLW1514 fastdcd pipelines tools benchmarks  # files name their encoding
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.ready-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove the virtual environment and everything that runs wrote
	rm -rf $(VENV) .venv-oldest runs data build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: constraints.txt pyproject.toml | $(VENV)/bin/python
	@echo "setting up $(VENV): torch and what it needs are about 5 GB, this takes some minutes"
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready tools/system_packages.sh pipelines/images/jpeg_box.c
	sh tools/system_packages.sh
	$(PIP) -e '.[all,dev]'
	@touch $@

.venv-oldest/.ready: constraints-oldest.txt pyproject.toml tools/system_packages.sh pipelines/images/jpeg_box.c
	$(PYTHON) -m venv .venv-oldest
	sh tools/system_packages.sh
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[all,dev]'
	@touch $@
