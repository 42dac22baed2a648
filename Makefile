# Everything starts from a clone with nothing but Python >= 3.11, make and a network (or a local package index for pip).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
REQUIREMENTS := requirements-dev.txt constraints.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)

# Nothing here looks up a model on a network.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quickstart test bench dist docs clean distclean

help:
	@echo "make quickstart  quantize a real model, run it in transformers, llama.cpp and onnxruntime, print a table"
	@echo "make test        ruff, mypy, pytest"
	@echo "make bench       measure, and write docs/performance.md (takes a while, needs 20 GB of disk)"
	@echo "make dist        wheels and sdists of all distributions, into dist/"
	@echo "make docs        write the generated pages of docs/"
	@echo "make clean       remove build outputs and caches; make distclean removes $(VENV) as well"
	@echo "Each makes $(VENV) first if needed, with PYTHON=$(PYTHON)."

setup: $(VENV)/.installed

# A stamp, so that setting up again costs nothing until a requirement changes.
$(VENV)/.installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): the first time this takes minutes, most of them for torch."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements-dev.txt
	@touch $@

quickstart: setup
	@$(BIN)/python tools/quickstart.py

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks

# Each wheel is built from its sdist, which shows that the sdist is complete.
dist: setup
	@rm -rf dist
	@for project in . plugins/*; do \
	  echo "building $$project"; \
	  said=$$($(BIN)/python -m build --no-isolation --outdir dist $$project 2>&1) || { echo "$$said"; exit 1; }; \
	done
	@ls dist

docs: setup
	$(BIN)/python tools/gen_docs.py

clean:
	rm -rf dist build quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
