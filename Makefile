# Every target sets up what it needs: an environment is built once and again only when its pins change.
#
#   PYTHON=python3.12   the Python to build the environments with (3.11 to 3.13); the first one found otherwise
#   TORCH_INDEX=URL     a package index that has CPU builds of torch. pip's own index gives Linux a build that carries
#                       CUDA: it works without a GPU too, but takes 5 GB on disk instead of 1.3
#   JOBS=0              in how many processes the quick tests run, 0: in pytest's own; the slow ones run alone
#   ARGS="-k resume"    handed to pytest
#   RUNS=500 SEED=7     how often `make crash` kills a run, and which draw of moments it repeats

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
RUNS ?= 500
SEED ?=
# More than a small machine has CPUs: most tests wait for processes that they have started.
JOBS ?= 3
ARGS ?=

export PIP_QUIET ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# LMDeploy's processes are started over and over, and each would compile what it imports anew.
unexport PYTHONDONTWRITEBYTECODE
# Unused modules of packages like torch need no .pyc; halves the time of an installation.
INSTALL = -m pip install --no-compile
# Two OpenMP threads on two busy cores spin against each other: up to ten times slower than one.
export OMP_NUM_THREADS ?= 1

MAIN := .venv
LMDEPLOY := .venv-lmdeploy
at-once = -n $(JOBS) --dist worksteal
PINS := requirements/base.txt requirements/dev.txt requirements/transformers.txt

.PHONY: help demo test lint unit test-all test-slow test-lmdeploy crash clean

help:  ## this list
	@echo 'make TARGET; the first use of a target builds its environment'
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(MAIN)/.installed  ## a small run from pictures to answers, on the CPU
	@rm -rf build/demo
	$(MAIN)/bin/python -m batchvl demo build/demo

test: lint unit  ## lint, types and the quick tests

lint: $(MAIN)/.installed  ## ruff and mypy --strict
	$(MAIN)/bin/ruff check .
	$(MAIN)/bin/ruff format --check .
	$(MAIN)/bin/mypy

unit: $(MAIN)/.installed
	$(MAIN)/bin/python -m pytest $(at-once) -m 'not slow and not crash and not lmdeploy and not gpu' $(ARGS)

test-all: test test-slow test-lmdeploy  ## everything, in both environments
	@cat $(MAIN)/not-run.* 2>/dev/null || echo 'test-all: every mark was run; a test that skipped is named above with its reason'

# A mark that no test carries yet is said, and not an error (pytest's own exit code for it is 5).
marked = grep -rqE --include='*.py' 'mark\.($(1))\b' tests
not-run = { echo 'test-all: NOT RUN: $(1)' | tee $(MAIN)/not-run.$@; exit 0; }

test-slow: $(MAIN)/.installed
	@rm -f $(MAIN)/not-run.$@
	@$(call marked,slow|crash) || $(call not-run,slow and crash: no test carries these marks yet); \
	$(MAIN)/bin/python -m pytest -m '(slow or crash) and not lmdeploy and not gpu' $(ARGS)

# LMDeploy allows no torch as new as the main environment's, hence the second one: one engine code, two torches, so the
# engines' tests run in both.
# In CI it must install; on a machine of one's own that can't have it, the other tests still count.
test-lmdeploy: $(MAIN)/.installed
	@rm -f $(MAIN)/not-run.$@
	@test "$$(uname -sm)" = 'Linux x86_64' || $(call not-run,lmdeploy: it has wheels for Linux on x86-64 only); \
	$(MAKE) --no-print-directory $(LMDEPLOY)/.installed || { test -z "$${CI:-}" || exit 1; \
		$(call not-run,lmdeploy: its environment could not be installed (see above)); }; \
	$(LMDEPLOY)/bin/python -m pytest $(at-once) -m 'not slow and not crash' tests/engines tests/test_gpu_speed.py $(ARGS)

crash: $(MAIN)/.installed  ## kill -9 in RUNS runs and at every call to the disk; power failures, full disks
	$(MAIN)/bin/python -m tests.crash --kills $(RUNS) $(if $(SEED),--seed $(SEED))
	$(MAIN)/bin/python -m pytest -m crash tests/crash --ignore tests/crash/test_kills.py --ignore tests/crash/test_seam.py $(ARGS)

clean:  ## remove the environments and everything built
	rm -rf $(MAIN) $(LMDEPLOY) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call python,ENV): the environment's Python, made if it isn't there.
define python
@test -n '$(PYTHON)' || { echo 'batchvl needs Python 3.11, 3.12 or 3.13: install one, or name it: make PYTHON=...' >&2; exit 1; }
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { rm -rf $(1); exit 1; }
endef

$(MAIN)/.installed: $(PINS) requirements/torch-cpu.txt pyproject.toml
	$(call python,$(MAIN))
	@echo 'installing into $(MAIN): 1.3 GB and a minute or two; 5 GB if torch comes with CUDA (see the top of the Makefile)'
	@$(MAIN)/bin/python $(INSTALL) $(PINS:%=-r %)
	@$(MAIN)/bin/python $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch-cpu.txt
	@$(MAIN)/bin/python $(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(LMDEPLOY)/.installed: requirements/lmdeploy.txt pyproject.toml
	$(call python,$(LMDEPLOY))
	@echo 'installing into $(LMDEPLOY): 5.4 GB and a few minutes'
	@$(LMDEPLOY)/bin/python $(INSTALL) --no-deps -r requirements/lmdeploy.txt
	@$(LMDEPLOY)/bin/python $(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@
