# Each target does its own set-up in .venv, which is quick when nothing has changed. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
EXTRAS := bench,demo,lint,test,train
# The stamp's name holds the torch that was asked for, so another TORCH installs anew.
TORCH_STAMP := $(VENV)/.stamp-$(shell echo '$(TORCH)' | tr -c 'a-zA-Z0-9.\n' '-')
INSTALL_STAMP := $(VENV)/.stamp-installed
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard build_backend/*.py csrc/cuda/*.cu.in)
NATIVE_FILES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu')
FORMATTED := $(NATIVE_FILES) $(shell find tests/cuda tests/ptxsim tools -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help setup demo demo-train test test-all fuzz soak sanitize compatibility compatibility-all bench gpu-pack gpu-check quality quality-all lint format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is required (diffusers needs it; the package alone takes 3.10), got {v[0]}.{v[1]}: run `make PYTHON=python3.12`")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV) ..."
	@$(PIP) install '$(TORCH)'
	@rm -f $(VENV)/.stamp-*
	@touch $@

$(INSTALL_STAMP): $(TORCH_STAMP) $(BUILD_FILES) $(NATIVE_FILES)
	@echo "Building and installing lesa-kernels (the first time compiles every kernel and takes some minutes) ..."
	@$(PIP) install -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'import lesa_kernels; print(lesa_kernels.status())'
	@touch $@

setup: $(INSTALL_STAMP) ## Create .venv with torch, the compiled package and every extra
	@:

demo: setup ## Fit the learned solver to a small SD3, compare it with its rivals: table, pictures, JSON; 3 minutes
	@$(BIN)/python -m examples.emoji $(ARGS)

demo-train: setup ## Train the demo's diffusion transformer again (half an hour)
	@$(BIN)/python -m examples.emoji.train_emoji $(ARGS)

# One process a core and one thread a process: threads of small models that wait for each other cost more than they do.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: setup ## Run the tests
	@$(TESTS)

test-all: setup ## Run the tests that take long as well
	@$(TESTS) -m ''

fuzz: setup ## Call ops and functions with anything, open damaged files, 10,000 times each; sample 1,000 loops of any kind
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -m '' --hypothesis-profile=long $(ARGS)

soak: setup ## Kill trainings and repeat calls and runs for long, with figures
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/soak -m '' $(ARGS)

sanitize: setup ## Run the CPU library's tests under AddressSanitizer, UBSan and ThreadSanitizer; 15 minutes
	@$(BIN)/python -m tools.sanitize $(ARGS)

# What meets the most of torch: ops, autograd, opcheck, torch.compile, hooks.
SLICE := tests/ops tests/core $(patsubst %,tests/integrations/test_%.py,compiled models pipeline_source pipelines runs tail)

compatibility: setup ## Run a part of the tests with the other torches that pip finds CPU builds of
	@$(BIN)/python -m tools.compatibility env $(TESTS) $(SLICE)

compatibility-all: setup ## Run all tests with the other torches
	@$(BIN)/python -m tools.compatibility env $(TESTS)

bench: setup ## Time the kernels against their baselines
	@$(BIN)/python -m benchmarks $(ARGS)
	@$(BIN)/python -m benchmarks.hooks

# Into a file of its own: the committed rows are those of the whole.
SLICE_OF_QUALITY := --data digits --seed 0 --calls 8 --out build/quality/rows.csv --plot build/quality/quality.png

quality: setup ## Compare the images of all methods on a small model: minutes; ARGS= names another part
	@$(BIN)/python -m benchmarks.quality $(if $(ARGS),$(ARGS),$(SLICE_OF_QUALITY))

quality-all: setup ## Compare them on three data sets, three models each, and renew the pages: a night; goes on where it was
	@$(BIN)/python -m benchmarks.quality --page docs/quality.md --readme README.md

gpu-pack: setup ## Collect what a machine with a GPU needs; prints the commands to run there
	@$(BIN)/python -m tools.gpu_check.pack $(ARGS)

gpu-check: ## Check and measure on the GPU here, with the packages of PYTHON and no network; writes a report
	@$(PYTHON) -m tools.gpu_check $(ARGS)

lint: setup ## Check style, types and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: setup ## Format Python and C++
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(FORMATTED)

clean: ## Remove what builds and tests leave; .venv stays
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@rm -f lesa_kernels/*.so lesa_kernels/_build_info.json $(INSTALL_STAMP)
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
