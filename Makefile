# Two commands do all of their own set-up: `make benchmark` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := results

.PHONY: benchmark test lint types tests docs wheel clean

# Measured anew each time: what an earlier version of the code said is no answer.
benchmark: $(VENV)/.installed
	rm -rf $(RESULTS)/cells/shift-digits
	$(BIN)/python benchmarks/shift.py --data digits --methods deterministic,mc_dropout,deep_ensemble --out $(RESULTS)

test: lint types tests docs

lint: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developing
	$(BIN)/mypy

tests: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --doctest-modules tests bayesguard

docs: $(VENV)/.developing
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# The wheel, installed into an empty environment outside the repository, has to run the quick start by itself.
wheel: $(VENV)/.developing
	$(BIN)/python tests/run_wheel.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'bayesguard needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[tables,benchmarks]"
	touch $@

clean:
	rm -rf $(VENV) $(RESULTS) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
