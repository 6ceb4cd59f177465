# make run | test | lint: each builds .venv first when it is missing or out of date.
PYTHON ?= python3
# A CPU build serves every check here; a plain `torch` would pull gigabytes of CUDA. On a GPU machine: make TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: run test lint clean test-transformers test-lmms

run: .venv/.ok
	$(BIN)/gripvlm quickstart

test: .venv/.ok
	$(BIN)/python -m pytest -q

# The tests that touch transformers, on another version of it, in front of the one in .venv: make test-transformers VERSION=5.19.0
VERSION ?= 5.19.0
test-transformers: .venv/.ok
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/transformers-$(VERSION) "transformers==$(VERSION)"
	PYTHONPATH=.venv/transformers-$(VERSION) $(BIN)/python -m pytest -q -p no:cacheprovider tests/test_families.py \
		tests/test_video.py tests/test_decoding.py tests/test_windows.py tests/test_any_prompt.py \
		tests/test_attention.py tests/test_vision.py tests/test_layers.py tests/test_layered.py tests/test_seam.py

# gripvlm as a model of lmms-eval, in an environment of its own, as lmms-eval brings some fifty packages. A torchvision
# that was built for another torch cannot be loaded, and nothing here needs it.
LMMS ?= lmms-eval==0.7.3
test-lmms:
	test -x .venv/lmms/bin/python || $(PYTHON) -m venv .venv/lmms
	.venv/lmms/bin/python -m pip install --quiet "$(TORCH)" "$(LMMS)" -e . pytest hypothesis
	.venv/lmms/bin/python -c "import torchvision" 2>/dev/null || .venv/lmms/bin/python -m pip uninstall --quiet --yes torchvision
	.venv/lmms/bin/python -m pytest -q -m "slow or not slow" tests/test_lmms.py

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
