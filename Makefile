# The two commands of the README are `make quickstart` and `make test`. All paths are relative, so that the project may
# live in a folder with a space in its name.
PYTHON ?= python3
RUN := .venv/bin/python -m
# What a run needs from the outside world is nothing; make sure that nobody tries.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quickstart test test-all bench check format clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\): .*## /  make \1	/p' Makefile

setup: .venv/installed  ## install into .venv

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"moeprune needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report,dev]'
	@touch $@

quickstart: setup  ## the main job on embedded data: train, prune, score, compare; ends with a table and a report
	$(RUN) moeprune compare --config recipes/compare/quickstart.yaml

test: setup  ## the tests that take less than half a minute each
	$(RUN) pytest -m 'not slow' --hypothesis-profile=ci  # the same examples at every call

test-all: setup  ## all tests, the quick start itself among them
	$(RUN) pytest

bench: setup  ## the benchmarks at their small settings, under ten minutes: benchmarks/results.md
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench.py

check: setup  ## lint, format, types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: setup  ## make `check` pass where a tool can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:  ## remove what `make` made, not the runs
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
