# Every target does everything it needs, from a fresh clone.
PYTHON ?= python3
# On Linux without a GPU: PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BIN := .venv/bin
# Options of the quickstart, e.g. QUICKSTART_ARGS="--seeds 1" for a third of its runs.
QUICKSTART_ARGS ?=

# Processes that share the tests, one thread each.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

.PHONY: quickstart readme test test-min slow lint check docs notebooks wheel audit format clean

quickstart: .venv/ready
	$(BIN)/l2l quickstart --overwrite true $(QUICKSTART_ARGS)

# The README's commands, shortened.
readme: .venv/ready
	.ci/readme

test: .venv/ready
	$(PYTEST)

slow: .venv/ready
	$(PYTEST) -m "slow and not gpu"

# The same with every direct dependency at its lowest version.
test-min: .venv/ready
	.ci/minimum

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

# The site, into build/docs. Strict: a dead link or a page outside the navigation fails. Reading it needs no network.
docs: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Notebooks of the examples, written from the scripts and run from top to bottom.
notebooks: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	$(BIN)/python .ci/notebooks --run

# The wheel, built, installed alone, and used outside the repository.
wheel:
	PIP_ARGS="$(PIP_ARGS)" .ci/wheel

# Known vulnerabilities of what is installed; says so where there is no index to ask.
audit: .venv/ready
	.ci/audit

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
