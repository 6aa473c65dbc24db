# `make demo` trains a small Transformer on this machine; `make test` checks everything.
# Each first makes .venv when there is none, from the pins in constraints/. Any Python from 3.11 to 3.13:
#     make demo PYTHON=python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test goldens constraints clean

PYTHON ?= python3
WORKERS ?= 2
EXTRAS := hf,plots,quantization,tracking,translation,test,dev
# The JAX line of each Python version: JAX ended its support of Python 3.11 with 0.10.
PINS_3.11 := constraints/jax-0.10.txt
PINS_3.12 := constraints/jax-0.12.txt
PINS_3.13 := constraints/jax-0.12.txt
comma := ,
INSTALLED := .venv/installed
BIN := .venv/bin

help:
	@echo 'make demo   train on the Python standard library, then evaluate and sample (minutes)'
	@echo 'make test   lint, types and tests'
	@echo 'make goldens   write the layouts and collectives that tests compare with'

install: $(INSTALLED)

# Made from nothing each time, and the stamp last: a .venv that was half made or that pins have left behind goes.
$(INSTALLED): pyproject.toml $(wildcard constraints/*.txt)
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
	  || { echo 'No Python found. Install Python 3.11, 3.12 or 3.13, or name one: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }; \
	case $$version in \
	  3.11) pins=$(PINS_3.11) ;; 3.12) pins=$(PINS_3.12) ;; 3.13) pins=$(PINS_3.13) ;; \
	  *) echo "$(PYTHON) is Python $$version; transformer needs 3.11, 3.12 or 3.13. Name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1 ;; \
	esac; \
	if [ -e .venv ] && [ ! -e .venv/made-by-make ]; then \
	  echo '.venv is not one that make made: move it away' >&2; exit 1; \
	fi; \
	rm -rf .venv; \
	echo "Installing into .venv for Python $$version from $$pins (minutes, once)"; \
	if command -v uv >/dev/null; then \
	  export UV_PYTHON_DOWNLOADS=never; \
	  uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
	  touch .venv/made-by-make; \
	  uv pip install --quiet --python .venv --constraint $$pins --editable '.[$(EXTRAS)]'; \
	else \
	  $(PYTHON) -m venv .venv \
	    || { echo 'Python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }; \
	  touch .venv/made-by-make; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $$pins --editable '.[$(EXTRAS)]'; \
	fi; \
	touch $@

# Both commands take up an interrupted run where it was; a finished one is evaluated and sampled again.
demo: $(INSTALLED)
	$(BIN)/python train.py --config configs/stdlib.py --workdir runs/demo
	$(BIN)/transformer evaluate --workdir runs/demo --baseline
	$(BIN)/transformer generate --workdir runs/demo --prompt 'def ' --max-tokens 200

# Types are checked beside the tests: pyright alone would leave all cores but one idle.
test: export JAX_PLATFORMS := cpu
# More threads than cores, or eight simulated devices deadlock in their collectives on JAX 0.10.
test: export NPROC := 16
test: $(INSTALLED)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/pyright & types=$$!; $(BIN)/pytest --quiet --numprocesses $(WORKERS) --dist worksteal $(ARGS) && wait $$types

# Layouts and collectives of recipes, as files in tests/goldens; the collectives are those of the release of libtpu at hand,
# and stay as they are where there is none.
goldens: export REWRITE_GOLDENS := 1
goldens: $(INSTALLED)
	$(BIN)/pytest --quiet -m 'slow or not slow' tests/parallel/test_goldens.py $(ARGS)

# Resolves the pins again (needs uv), keeping those that still fit; the 0.12 line serves Python 3.12 and 3.13.
constraints:
	@for line in '3.11 0.10' '3.12 0.12'; do \
	  read -r python jax <<<"$$line"; \
	  uv pip compile --quiet pyproject.toml --python-version $$python --constraint <(echo "jax==$$jax.*") \
	    $(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) \
	    --no-annotate --custom-compile-command 'make constraints' --output-file constraints/jax-$$jax.txt; \
	done

clean:
	rm -rf .venv build dist *.egg-info
