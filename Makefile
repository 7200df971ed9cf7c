# One virtual environment in .venv; every target makes it when it is missing.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint types bench clean

demo: $(VENV)/.compile
	$(BIN)/staticvl demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python benchmarks/memory_by_buckets.py

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.compile: setup.py | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable '.[compile]'
	touch $@

$(VENV)/.test: setup.py | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.compile

clean:
	rm -rf $(VENV) build dist *.egg-info
