# Everything a user or a contributor types. Each target makes the environment it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first of several interpreters that starts: a version manager's stub may be on the path and answer nothing.
first_working = $(shell for candidate in $(1); do "$$candidate" -c '' 2>/dev/null && echo "$$candidate" && break; done)
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
PYTHON ?= $(or $(call first_working,python3.11 python3.12 $(wildcard $(PYENV)/3.11.*/bin/python3.11)),python3)
COMPAT_PYTHON ?= $(or $(call first_working,python3.12 $(wildcard $(PYENV)/3.12.*/bin/python3.12)),python3.12)
COMPAT_MEGATRON := 0.19.2
BIN := .venv/bin
COMPAT_BIN := .venv-compat/bin
QUICKSTART_DATA := data/quickstart
PYTEST := -m pytest -q --durations=10
# These tests are of the CPU, also where there are GPUs; `make test-gpu` has the others.
ON_CPU := CUDA_VISIBLE_DEVICES=

.PHONY: help quickstart browser test test-fast test-full test-compat test-gpu parallelism-table lint format clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.installed: pyproject.toml constraints.txt
	@echo "== making .venv with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"error: PYTHON=$(PYTHON) is Python {v[0]}.{v[1]}; give 3.11 or 3.12: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@echo "== installing the pinned packages (torch first: it is the largest)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.venv-compat/.installed: pyproject.toml constraints.txt
	@echo "== making .venv-compat with $(COMPAT_PYTHON) and megatron-core $(COMPAT_MEGATRON)"
	@$(COMPAT_PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 12) else f"error: COMPAT_PYTHON=$(COMPAT_PYTHON) is Python {v[0]}.{v[1]}; give a Python 3.12: make COMPAT_PYTHON=PATH test-compat")'
	@$(COMPAT_PYTHON) -m venv .venv-compat
	@sed 's/^megatron-core==.*/megatron-core==$(COMPAT_MEGATRON)/' constraints.txt > .venv-compat/constraints.txt
	@$(COMPAT_BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv-compat/constraints.txt torch
	@$(COMPAT_BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv-compat/constraints.txt -e ".[dev]"
	@touch $@

quickstart: .venv/.installed ## Train a small AdaMoE model on this Python's own standard library, to the end
	@if [ ! -f $(QUICKSTART_DATA)/tokenizer/tokenizer.model ]; then \
	  echo "== training the tokenizer"; \
	  $(BIN)/python tools/train_tokenizer.py --input python:stdlib --vocab-size 4096 --output $(QUICKSTART_DATA)/tokenizer; \
	fi
	@if [ ! -f $(QUICKSTART_DATA)/corpus_train.json ]; then \
	  echo "== preparing the data"; \
	  $(BIN)/python tools/prepare_data.py --input python:stdlib --tokenizer $(QUICKSTART_DATA)/tokenizer --output $(QUICKSTART_DATA)/corpus --validation-fraction 0.02; \
	fi
	@ranks=$$($(BIN)/python -c 'import torch; print(min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2)'); \
	resume=$$([ -d runs/quickstart/checkpoints ] && echo checkpoint.resume=auto || true); \
	echo "== deepspeed --quiet --num_accelerators $$ranks launch/pretrain.py --config configs/quickstart.yaml $$resume"; \
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --quiet --num_accelerators $$ranks launch/pretrain.py --config configs/quickstart.yaml $$resume

browser: ## Install Debian's Chromium, in which some tests look at pages (needs root)
	@for program in chromium chromedriver; do command -v $$program >/dev/null || missing=1; done; \
	if [ -z "$${missing:-}" ]; then echo "== Chromium and chromedriver are installed"; exit 0; fi; \
	echo "== installing Chromium and chromedriver"; \
	apt-get update -qq; \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null

test: .venv/.installed ## Run the tests (under 30 minutes on 2 cores)
	@echo "== tests, without those marked slow"
	@$(ON_CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PYTEST) -m "not slow" tests

test-fast: .venv/.installed ## Run the tests that need one process (under 2 minutes)
	@echo "== tests of one process"
	@$(ON_CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PYTEST) -m "not slow and not distributed and not end_to_end" tests

test-full: .venv/.installed ## Run every test, the slow ones too
	@echo "== all tests"
	@$(ON_CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PYTEST) tests

test-gpu: .venv/.installed ## Run what CUDA GPUs can show: one, two, or four of them (says so where there is none)
	@reason=$$($(BIN)/python -m tests.gpu.places); \
	if [ -n "$$reason" ]; then echo "== no GPU tests: $$reason"; exit 0; fi; \
	echo "== GPU tests"; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PYTEST) -m gpu tests/gpu

parallelism-table: .venv/.installed ## Run the whole matrix of layouts and put its table into docs/parallelism.md
	@echo "== every layout, ZeRO stage and precision against one process"
	@$(BIN)/python $(PYTEST) tests/distributed/test_matrix.py --matrix-results .matrix.json
	@$(BIN)/python -m tests.distributed.matrix_table .matrix.json
	@rm .matrix.json

test-compat: .venv-compat/.installed ## Run the tests on Python 3.12 with the newest supported megatron-core
	@echo "== tests with megatron-core $(COMPAT_MEGATRON) on Python 3.12"
	@$(ON_CPU) PATH="$(CURDIR)/$(COMPAT_BIN):$$PATH" $(COMPAT_BIN)/python $(PYTEST) -m "not slow" tests

lint: .venv/.installed ## Check style, types and formatting
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.installed ## Rewrite the sources in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove the environments and caches; runs/ and data/ stay
	@rm -rf .venv .venv-compat .mypy_cache .ruff_cache .pytest_cache
