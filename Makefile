# What one types while working on graphwright. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# To be set on the command line, as in `make venv PYTHON=python3.12` or `make test PYTEST_ARGS='-k conv -x'`.
PYTHON ?= python3.11 python3
EXTRAS ?= cpu,hf,test,dev
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH ?=
SWEEP ?=

TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: venv
venv: $(STAMP) ## Create .venv and install the pinned dependencies and graphwright itself (editable)

# Torch goes in first and alone: the rest then finds it there and never asks for another build.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for candidate in $(PYTHON); do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    if "$$candidate" -m venv --clear $(VENV) >/dev/null 2>&1; then \
	      echo "made $(VENV) with $$("$$candidate" --version) ($$candidate)"; \
	      break; \
	    fi; \
	  done; \
	fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "No Python that is 3.11 or newer and can make a virtual environment; tried: $(PYTHON)." >&2; \
	  echo "Debian and Ubuntu need a package for it: apt install python3-venv (or python3.11-venv)." >&2; \
	  echo "Or name another interpreter: make venv PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Run the demo recipe end to end into out/demo
	$(BIN)/graphwright run demo --out out/demo

# Hypothesis' own `ci` profile has no deadline and draws the same examples every time.
.PHONY: test
test: export OMP_NUM_THREADS := 1
test: export HF_HUB_OFFLINE := 1
test: $(STAMP) ## Run the tests on two processes (PYTEST_ARGS adds arguments)
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal --hypothesis-profile ci --durations 15 $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: export OMP_NUM_THREADS := 1
test-slow: export HF_HUB_OFFLINE := 1
test-slow: $(STAMP) ## Run what `make test` leaves out: many more architectures, and the benchmarks in small
	$(BIN)/pytest -m slow -n 2 --dist worksteal --hypothesis-profile ci --durations 15 $(PYTEST_ARGS)

.PHONY: check
check: $(STAMP) ## Lint, formatting, types, layers and packaging
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -q tests/test_layers.py tests/test_layout.py

.PHONY: format
format: $(STAMP) ## Format the code and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(STAMP) ## Run the benchmarks (BENCH names one, or adds options)
	$(BIN)/graphwright bench $(BENCH)

.PHONY: sweep
sweep: $(STAMP) ## Sweep the model zoo and report operator coverage (SWEEP adds options)
	$(BIN)/python -m graphwright.tools.sweep $(SWEEP)

.PHONY: clean
clean: ## Remove build products, caches and out/demo; .venv and other results stay
	rm -rf build dist src/graphwright.egg-info graphwright.egg-info out/demo
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
