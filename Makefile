# make demo | test | speculation | meshes | kernels | endurance | compile | portability | notebooks |
# docs | lint | format.  All is in .venv, installed again only when pyproject.toml or constraints.txt
# change.  The compilers that `make compile` needs are in a folder of their own: wherever jax can
# import them, it takes them for devices to run on.  With JAX=newest all is done with
# constraints-newest.txt and compilers-newest.txt, in folders of the same ending.
PYTHON ?= python3
SET := $(JAX:%=-%)
VENV := .venv$(SET)
BIN := $(VENV)/bin
CONSTRAINTS := constraints$(SET).txt
# Bytecode of what is imported comes with the first import, in less time than all of it takes here.
PIP_INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-compile \
  -c $(CONSTRAINTS)
INPUTS := pyproject.toml $(CONSTRAINTS)
COMPILERS := .compilers$(SET)
APART := $(addprefix tests/,speculation meshes pallas_kernels portability endurance)
DEMO := outputs/demo.jsonl
# By file: those of one share what they compile.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test speculation meshes kernels endurance compile portability notebooks \
  docs lint format
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@mkdir -p $(dir $(DEMO))
	@rm -f $(DEMO)
	$(BIN)/python scripts/batch_generate.py examples/prompts.jsonl $(DEMO) --model mimo-tiny

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(APART:%=--ignore %)

speculation: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/speculation

meshes: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/meshes

kernels: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/pallas_kernels

# By test: each takes minutes, and by file one process would get most of them.
endurance: export FUZZED_FILES ?= 10000
endurance: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) --dist worksteal tests/endurance \
	  tests/engine/test_fuzzed_requests.py

compile: $(VENV)/.installed-test $(COMPILERS)/.installed
	JAX_PLATFORMS=cpu PYTHONPATH=$(COMPILERS) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/compiling

# With a part of the study, which fails if something no longer compiles that once did.
portability: $(VENV)/.installed-test $(COMPILERS)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/portability
	$(BIN)/mimo-jax portability --out outputs/portability --targets hopper,hopper:8,v5e:4x8 \
	  --models MiMo-V2.6-Flash-RL,MiMo-V2.5-Pro-FP4-DFlash --layers 4 --no-slices --workers 2 \
	  --compilers $(COMPILERS) --baseline benchmarks/results/portability_part.json

# NOTEBOOKS=--overwrite writes what they show into them.
notebooks: export MIMO_JAX_COMPILATION_CACHE := off
notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python -m pytest $(PYTEST_ARGS) --nbmake --nbmake-timeout=600 $(NOTEBOOKS) notebooks

# The site, in outputs/site, and the examples of README.md and docs.
docs: export NO_MKDOCS_2_WARNING := 1
docs: export MIMO_JAX_COMPILATION_CACHE := off
# The same instructions on every processor, so that texts are the same.
docs: export XLA_FLAGS := --xla_force_host_platform_device_count=8 --xla_cpu_max_isa=AVX2
docs: export COLUMNS := 100
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --quiet --strict
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_site_hooks.py README.md docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 12) and \
	  "%s is Python %d.%d; mimo-jax needs 3.12 or later: make PYTHON=python3.12" % (sys.executable, *v))'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(VENV)/bin/python
	@echo "installing mimo-jax in $(VENV)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(VENV)/bin/python
	@echo "installing mimo-jax with what its tests need in $(VENV)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/bin/python
	@echo "installing mimo-jax with its tests and development tools in $(VENV)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-docs

$(VENV)/.installed-notebooks: $(INPUTS) | $(VENV)/bin/python
	@echo "installing mimo-jax with its tests and what its notebooks need in $(VENV)"
	@$(PIP_INSTALL) -e '.[test,notebooks]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-docs: $(INPUTS) | $(VENV)/bin/python
	@echo "installing mimo-jax with what its documentation needs in $(VENV)"
	@$(PIP_INSTALL) -e '.[test,docs]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(COMPILERS)/.installed: compilers$(SET).txt | $(VENV)/bin/python
	@echo "installing compilers for GPUs and TPUs in $(COMPILERS)"
	@rm -rf $(COMPILERS)
	@$(BIN)/python -m pip -qq --disable-pip-version-check install --no-compile --no-deps \
	  --target $(COMPILERS) -r $<
	@touch $@
