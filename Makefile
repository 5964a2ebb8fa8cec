# Two commands: `make quickstart` runs the main job on embedded data, `make test` the tests. Both set up .venv first.

# The first interpreter that is new enough; name another with `make PYTHON=...`.
PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)
# Relative, so that the path of the clone may hold spaces.
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint types format clean

quickstart: $(VENV)/installed
	$(RUN) -m experiments.quickstart

test: $(VENV)/installed
	$(RUN) -m pytest -q -n 2

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Reads the types and the examples of right and wrong uses in tests/typing. pyright comes as a Python package, and needs node.
types: $(VENV)/installed
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "kdjax needs Python 3.11 or newer, and none was found: install one, or make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
