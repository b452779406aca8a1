# make demo | test | lint | format.  Everything is installed in .venv, and again only when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt
INPUTS := pyproject.toml constraints.txt
DEMO := outputs/demo.jsonl
PYTEST_ARGS ?= -n 2

.PHONY: demo test lint format
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@mkdir -p $(dir $(DEMO))
	@rm -f $(DEMO)
	$(BIN)/python scripts/batch_generate.py examples/prompts.jsonl $(DEMO) --model mimo-tiny

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

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
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
