# `make lab` opens the course, `make test` checks all of it; both build .venv first, and again only when pyproject.toml changes.
#   make lab   [PORT=8888] [LAB_ARGS=--no-browser]
#   make test | lint | labs | pictures | clean
#   PYTHON=python3.12 chooses the interpreter that .venv is built with, VENV_ARGS=--system-site-packages lets it see that one's torch.

PYTHON ?= python3
VENV_ARGS ?=
PORT ?= 8888
LAB_ARGS ?=
BIN := .venv/bin
# In a container one is often root, and Jupyter then wants to be told that this is meant.
ROOT_ARGS := $(if $(filter 0,$(shell id -u)),--allow-root)

# Some containers forbid it: then every rank's process and every kernel would compile all of torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help lab test lint labs pictures clean
help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

lab: .venv/.lab
	$(BIN)/jupyter lab --ip=127.0.0.1 --port=$(PORT) $(ROOT_ARGS) --ServerApp.root_dir=labs --LabApp.default_url=/lab/tree/00_start_here.ipynb $(LAB_ARGS)

test:
	@start=$$(date +%s) && $(MAKE) --no-print-directory .venv/.test && $(BIN)/python tools/check.py --since $$start

lint: .venv/.test
	$(BIN)/python tools/check.py linters

# Format, run every lab from top to bottom, keep its outputs, drop the widgets' state.
labs: .venv/.test
	$(BIN)/python tools/execute_labs.py

# README's pictures, taken in the Chromium that the machine has: they hold its times, so leave it alone meanwhile.
pictures: .venv/.test
	$(BIN)/python tools/pictures.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON) here: mplab needs Python 3.11 or newer; name one that you have, as in make $(MAKECMDGOALS) PYTHON=/usr/bin/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mplab needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_ARGS) .venv

.venv/.lab: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[lab]'
	$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" >/dev/null
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[lab,test,dev]'
	$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" >/dev/null
	@touch .venv/.lab $@
