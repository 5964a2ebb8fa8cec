# `make quickstart` runs the main job on embedded data, `make test` the tests that are quick, `make test-all` all of them.
# `make test-slow` is what CI runs beside `make test`: the slow ones but for the longest.
# Each sets up .venv first.

# The first interpreter that is new enough; name another with `make PYTHON=...`.
PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)
# Relative, so that the path of the clone may hold spaces.
VENV := .venv
RUN := $(VENV)/bin/python
# A file's tests stay in one process, where they share what is compiled and what a fixture has trained.
PYTEST := $(RUN) -m pytest -q -n 2 --dist loadfile

.PHONY: quickstart test test-slow test-all lint types format docs clean

quickstart: $(VENV)/installed
	$(RUN) -m experiments.quickstart

test: $(VENV)/installed
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/installed
	$(PYTEST) -m 'slow and not long'

test-all: $(VENV)/installed
	$(PYTEST)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Reads the types and the examples of right and wrong uses in tests/typing. pyright comes as a Python package, and needs node.
types: $(VENV)/installed
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/installed-docs
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(VENV)/installed-docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[docs]'
	@touch $(VENV)/installed-docs

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "kdjax needs Python 3.11 or newer, and none was found: install one, or make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist docs/_build docs/reference
