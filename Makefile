# make run | test | lint: each builds .venv first when it is missing or out of date.
PYTHON ?= python3
# A CPU build serves every check here; a plain `torch` would pull gigabytes of CUDA. On a GPU machine: make TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: run test lint clean

run: .venv/.ok
	$(BIN)/gripvlm quickstart

test: .venv/.ok
	$(BIN)/python -m pytest -q

lint: .venv/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ok: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev,lab]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
