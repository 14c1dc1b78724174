# Every target sets up what it needs: an environment is built once, and again only when its pins change.
#
#   PYTHON=python3.12   the Python for the environments (3.11 to 3.13); default: the first one found
#   TORCH_INDEX=URL     a package index with CPU builds of torch. The build for Linux on PyPI carries CUDA: it works
#                       without a GPU too, but takes 5 GB on disk instead of 1.3
#   JOBS=3              how many processes run the quick tests; 0 runs them in pytest's own
#   ARGS="-k resume"    passed to pytest
#   COVERAGE=1          measure coverage in `make test`; on by default in CI
#   FUZZ=50             how many times as many examples as `make test` each property gets in `make fuzz`
#   RUNS=500 SEED=7     how many runs `make crash` kills, and the seed of the moments at which it kills them

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
FUZZ ?= 50
RUNS ?= 500
SEED ?=
# More than a small machine has CPUs: most tests wait for processes that they have started.
JOBS ?= 3
ARGS ?=
CI ?=
COVERAGE ?= $(CI)

export PIP_QUIET ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# Tests start many LMDeploy processes; without .pyc files each of them would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
# Most modules of packages like torch are never imported: without their .pyc files an installation takes half the time.
INSTALL = -m pip install --no-compile
# Two OpenMP threads on two busy cores spin against each other: up to ten times slower than one.
export OMP_NUM_THREADS ?= 1

MAIN := .venv
LMDEPLOY := .venv-lmdeploy
DOCS := .venv-docs
TOOLS := .venv-tools
parallel = -n $(JOBS) --dist worksteal
PINS := requirements/base.txt requirements/dev.txt requirements/transformers.txt

.PHONY: help demo test lint unit coverage test-all test-slow test-lmdeploy crash fuzz docs release azurite hooks clean

help:  ## this list
	@echo 'make TARGET; the first use of a target builds its environment'
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(MAIN)/.installed  ## a small run from images to answers, on the CPU
	@rm -rf build/demo
	$(MAIN)/bin/python -m batchvl demo build/demo

test: lint unit  ## lint, types and the quick tests

lint: $(MAIN)/.installed  ## ruff and mypy --strict
	$(MAIN)/bin/ruff check .
	$(MAIN)/bin/ruff format --check .
	$(MAIN)/bin/mypy

QUICK := -m 'not slow and not crash and not lmdeploy and not gpu'

unit: $(if $(COVERAGE),coverage,$(MAIN)/.installed $(MAIN)/azurite/.installed)
	$(if $(COVERAGE),,$(MAIN)/bin/python -m pytest $(parallel) $(QUICK) $(ARGS))

# Settings, such as the lowest figure accepted, are in pyproject.toml.
coverage: $(MAIN)/.installed $(MAIN)/azurite/.installed  ## the quick tests, and how much of batchvl they execute, child processes included
	@rm -rf build/coverage
	$(MAIN)/bin/coverage run -m pytest $(parallel) $(QUICK) $(ARGS)
	@# A process killed while it writes its data leaves a file that is not a database; combine skips it with a warning.
	$(MAIN)/bin/coverage combine --quiet 2>/dev/null
	$(MAIN)/bin/coverage report

test-all: test test-slow test-lmdeploy docs release  ## everything that runs on one machine
	@cat $(MAIN)/not-run.* 2>/dev/null || echo 'test-all: every mark was run; a test that skipped is named above with its reason'

# A mark that no test carries is reported; pytest itself would exit with code 5.
marked = grep -rqE --include='*.py' 'mark\.($(1))\b' tests
not-run = { echo 'test-all: NOT RUN: $(1)' | tee $(MAIN)/not-run.$@; exit 0; }

test-slow: $(MAIN)/.installed
	@rm -f $(MAIN)/not-run.$@
	@$(call marked,slow|crash) || $(call not-run,slow and crash: no test carries these marks yet); \
	$(MAIN)/bin/python -m pytest -m '(slow or crash) and not lmdeploy and not gpu' $(ARGS)

# LMDeploy needs an older torch than the main environment has, hence a second environment. The engines' tests run in both.
# In CI it must install; on your own machine, the other tests count even if it cannot be installed.
test-lmdeploy: $(MAIN)/.installed
	@rm -f $(MAIN)/not-run.$@
	@test "$$(uname -sm)" = 'Linux x86_64' || $(call not-run,lmdeploy: it has wheels for Linux on x86-64 only); \
	$(MAKE) --no-print-directory $(LMDEPLOY)/.installed || { test -z "$${CI:-}" || exit 1; \
		$(call not-run,lmdeploy: its environment could not be installed (see above)); }; \
	$(LMDEPLOY)/bin/python -m pytest $(parallel) -m 'not slow and not crash' tests/engines tests/test_gpu_speed.py $(ARGS)

crash: $(MAIN)/.installed  ## kill -9 in RUNS runs and at every call to the disk; power failures, full disks
	$(MAIN)/bin/python -m tests.crash --kills $(RUNS) $(if $(SEED),--seed $(SEED))
	$(MAIN)/bin/python -m pytest -m crash tests/crash --ignore tests/crash/test_kills.py --ignore tests/crash/test_seam.py $(ARGS)

fuzz: $(MAIN)/.installed  ## FUZZ times as many examples for each property: manifests, prompts, images, rows
	FUZZ=$(FUZZ) $(MAIN)/bin/python -m pytest $(parallel) --timeout 0 $$(grep -rl --include='test_*.py' '^@given' tests) $(ARGS)

docs: $(DOCS)/.installed  ## the documentation as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --site-dir build/site

release: $(TOOLS)/.installed  ## wheel and source archive in dist/, checked and installed into fresh environments
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' .ci/release $(TOOLS)/bin/python

hooks: $(MAIN)/.installed $(TOOLS)/.installed  ## ruff and mypy before each commit
	$(TOOLS)/bin/pre-commit install

clean:  ## remove the environments and everything built
	rm -rf $(MAIN) $(LMDEPLOY) $(DOCS) $(TOOLS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call python,ENV): the environment's Python, created if it is missing.
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

# The emulator of Azure Blob Storage that tests run against, on the Node.js of the environment.
azurite: $(MAIN)/azurite/.installed

$(MAIN)/azurite/.installed: requirements/azurite/package-lock.json $(MAIN)/.installed
	@echo 'installing Azurite into $(@D)'
	@rm -rf $(@D) && mkdir $(@D) && cp requirements/azurite/*.json $(@D)
	@$(MAIN)/bin/npm ci --prefix $(@D) --omit=dev --ignore-scripts --no-audit --no-fund --silent
	@touch $@

$(LMDEPLOY)/.installed: requirements/lmdeploy.txt pyproject.toml
	$(call python,$(LMDEPLOY))
	@echo 'installing into $(LMDEPLOY): 5.4 GB and a few minutes'
	@$(LMDEPLOY)/bin/python $(INSTALL) --no-deps -r requirements/lmdeploy.txt
	@$(LMDEPLOY)/bin/python $(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(DOCS)/.installed $(TOOLS)/.installed: .venv-%/.installed: requirements/%.txt
	$(call python,.venv-$*)
	@.venv-$*/bin/python $(INSTALL) --no-deps -r $<
	@touch $@
