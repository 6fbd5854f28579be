# `make quickstart` and `make test` each set everything up first; the second one finds it done.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test gpu-test lint format report lock

PYTHON := .venv/bin/python
READY := .venv/.ready
# A command may exist and still not run (a version manager's shim), so each one is tried.
CANDIDATES := python3.12 python3 python3.13 python3.14 python
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))
# The cuda13 wheels are 2.5 GB: only where an NVIDIA driver is present.
EXTRAS := experiments,dev$(shell if nvidia-smi >/dev/null 2>&1 || test -e /proc/driver/nvidia/version; then echo ,cuda13; fi)

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1 /' | awk '{printf "%s %-12s", $$1, $$2; $$1=$$2=""; print}'

quickstart: $(READY) ## train a small OPT on real text, measure its sparsity, run it dense and sparse (3 minutes)
	$(PYTHON) -m experiments quickstart

test: $(READY) ## every test that needs no GPU
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not gpu"

gpu-test: $(READY) ## the tests of compiled kernels, on a GPU
	$(PYTHON) -m pytest -m gpu

lint: $(READY) ## ruff (lint and format) and pyright
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m pyright

format: $(READY) ## let ruff put things right
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

report: $(READY) ## README's tables and figures from the result files
	$(PYTHON) -m experiments report

lock: $(READY) ## pin the newest versions that pyproject.toml allows, jax as the results were measured on
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile pyproject.toml --universal --all-extras --python-version 3.12 \
		--no-header --no-annotate --quiet --upgrade --output-file constraints.txt

# The stamp goes first and comes back last: an interrupted set-up starts again from an empty .venv.
$(READY): pyproject.toml constraints.txt
	@python=$$(for candidate in $(CANDIDATES); do \
		if $$candidate -c '$(USABLE)' 2>/dev/null; then echo $$candidate; break; fi; done); \
	if test -z "$$python"; then \
		echo "Python 3.12 or newer is needed, with its venv module (Debian: apt install python3.12-venv): https://www.python.org/downloads" >&2; \
		exit 1; \
	fi; \
	test -e $@ || { echo "making .venv with $$($$python --version)"; $$python -m venv --clear .venv; }; \
	rm -f $@; \
	echo "installing sparsellm[$(EXTRAS)], pinned by constraints.txt"; \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	touch $@
