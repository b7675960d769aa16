# Every target does everything it needs, from a fresh clone.
PYTHON ?= python3
# On Linux without a GPU: PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BIN := .venv/bin

# Parts of the tests that take about half of the time; `make test` runs them beside all others, a process each.
HALF := experiments tools estimators meta noise params report tuners world

.PHONY: quickstart test test-half test-others slow lint check docs format clean

quickstart: .venv/ready
	$(BIN)/l2l quickstart --overwrite true

test: .venv/ready
	$(MAKE) -j2 test-half test-others

test-half: .venv/ready
	$(BIN)/python -m pytest $(HALF:%=tests/%)

test-others: .venv/ready
	$(BIN)/python -m pytest tests $(HALF:%=--ignore=tests/%)

slow: .venv/ready
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

# The site, into build/docs. Strict: a dead link or a page outside the navigation fails. Reading it needs no network.
docs: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

.venv/docs-ready: .venv/ready
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[docs]"
	touch .venv/docs-ready

clean:
	rm -rf .venv runs build dist
