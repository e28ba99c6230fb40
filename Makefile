# One command installs and trains (make demo), one tests (make test). Everything is in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The newest that the set installs on (one may lack its headers, or be free-threaded); without any, the
# newest that runs (shims are there, and fail), else python3, says what is wrong with it.
PYTHON ?= $(or $(shell runs=; for python in python3.13 python3.12 python3.11; do \
    $$python -c "" 2>/dev/null || continue; \
    if $$python $(INSTALL) --dry-run >/dev/null 2>&1; then echo $$python; exit; fi; \
    runs=$${runs:-$$python}; done; echo $$runs),python3)
PYTHON312 ?= python3.12
UV ?= $(shell uv --version >/dev/null 2>&1 && command -v uv)
VENV := .venv
PY := $(VENV)/bin/python
SFPO := $(VENV)/bin/sfpo-megatron
STAMP := $(VENV)/.installed

SEED ?= 0
RUN ?= runs/demo
RESULTS ?= results

# Two OpenMP threads beside any other busy process ran 10x slower than one.
export OMP_NUM_THREADS := 1
# Byte code is written on first import: without it each process compiles thousands of modules.
export PYTHONDONTWRITEBYTECODE :=
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1

PYTEST := $(PY) -m pytest -q

# .venv has the CPU set, whose engines know no GPU: the trainer leaves one that is here alone too.
demo _demo-smollm2 test-unit test-dist test-e2e test-slurm test-te: export CUDA_VISIBLE_DEVICES :=

.PHONY: help venv lock demo demo-smollm2 study lint format test test-unit test-dist test-e2e test-slurm \
        test-te test-mcore-latest test-full bench gpu slurm-deps clean _test-alone _test-served

help: ## show this
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# ---- install ------------------------------------------------------------------------------------

venv: $(STAMP) ## install everything into .venv (once): [PYTHON=python3.12] [UV=, for pip]

# Asked before there is a venv: whether this system and this Python will do.
INSTALL = -m sfpo_megatron.commands.install cpu $(if $(UV),,--pip)
$(STAMP): $(wildcard requirements/cpu-*.lock) requirements/torch.txt setup.py
	@test -x $(PY) || $(PYTHON) $(INSTALL) --dry-run > /dev/null
	test -x $(PY) || $(PYTHON) -m venv --without-pip $(VENV)
	$(PY) $(INSTALL)
	$(PY) -m pip install -q --disable-pip-version-check --no-compile --no-deps --no-build-isolation -e .
	touch $@

# Versions with the hashes of all their files, for each Python: of everything but torch.
lock: ## renew requirements/*.lock (needs uv)
	for python in 3.11 3.12 3.13; do \
	    uv pip compile -q --config-file requirements/uv.toml --upgrade --generate-hashes \
	        --no-emit-package torch --python-version $$python --python-platform linux \
	        --custom-compile-command "make lock" -o requirements/cpu-$$python.lock requirements/cpu.in; \
	done
	uv $(LOCK_GPU) --upgrade -o requirements/gpu-3.12.lock requirements/gpu.in

# Torch and its CUDA as well: vLLM and TransformerEngine are built for just these.
LOCK_GPU = pip compile -q --config-file requirements/uv-gpu.toml --generate-hashes \
    --no-emit-package transformer-engine-torch --python-version 3.12 \
    --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock"

# ---- run ----------------------------------------------------------------------------------------

demo: venv ## warm-start a small policy, train it with SFPO: [SEED=0] [RUN=runs/demo]
	$(SFPO) demo --run $(RUN) --seed $(SEED)

demo-smollm2: venv ## two SFPO steps on a real pretrained model: [SEED=0] [RUN=runs/smollm2]
	$(MAKE) _demo-smollm2 RUN=$(if $(filter runs/demo,$(RUN)),runs/smollm2,$(RUN))

_demo-smollm2:
	$(PY) tools/get_smollm2.py --out $(RUN)/model
	$(SFPO) train examples/smollm2/config.yaml --fresh output_dir=$(RUN) model.path=$(RUN)/model seed=$(SEED)

study: venv ## SFPO against tuned GRPO, the next missing cells: [MINUTES=60]
	$(PY) examples/sfpo_vs_grpo/study.py $(if $(MINUTES),--minutes $(MINUTES))

# ---- check --------------------------------------------------------------------------------------

lint: venv ## ruff and mypy
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --no-cache --check .
	$(PY) -m mypy

format: venv ## rewrite the code as lint wants it
	$(PY) -m ruff check --no-cache --fix .
	$(PY) -m ruff format --no-cache .

# Tests of several processes wait more than they compute: side by side they take two thirds of the
# time. The two halves take about as long.
test: ## all CPU tests
	$(MAKE) -j2 --output-sync=target _test-alone _test-served

_test-alone: test-unit
	$(MAKE) test-dist

_test-served: test-slurm
	$(MAKE) test-e2e

test-unit: venv
	$(PYTEST) tests/unit -m "not full"

test-dist: venv ## torchrun + gloo, real Megatron (its share of test-te too)
	$(PYTEST) tests/dist -m "not full"

test-e2e: venv ## vLLM + Ray
	$(PYTEST) tests/e2e -m "not full"

test-slurm: venv ## jobs on a real Slurm that the tests start (make slurm-deps); else one skip
	$(PYTEST) tests/slurm -m "not full"

test-te: venv ## every case of tests/dist under Megatron's TE layer spec, full ones too
	$(PYTEST) tests/dist -m te_spec

# The newest megatron-core is not for Python 3.11, which .venv may have (.ci/run).
test-mcore-latest: ## the main line, whatever Python .venv has: unit, dist, te and e2e on Python 3.12
	rm -rf .cache/mcore-latest
	@rc=0; for suite in unit dist te e2e; do \
	    PYTEST_ADDOPTS="--junitxml=$(CURDIR)/.cache/mcore-latest/$$suite.xml" \
	        $(MAKE) PYTHON=$(PYTHON312) VENV=.venv-latest test-$$suite || rc=1; \
	done; \
	.venv-latest/bin/python -m benchmarks.common.suites mcore_latest mcore-latest .cache/mcore-latest; \
	exit $$rc

test-full: venv ## every matrix and count; hours; begun again it goes on: [MINUTES=60]
	$(PY) tests/full.py $(if $(MINUTES),--minutes $(MINUTES))
	$(MAKE) test-mcore-latest

# on_gpu.py is `make gpu`; vs_trl.py installs TRL into a venv of its own and races it for hours.
bench: venv ## benchmarks/*.py, results in benchmarks/results/ (not on_gpu.py, not vs_trl.py)
	for file in $(filter-out %/on_gpu.py %/vs_trl.py,$(wildcard benchmarks/*.py)); do $(PY) $$file; done

# The interpreter that is given, nothing installed, no network: a GPU node in a container.
# `make gpu PY=python3 RESULTS=DIR`: pytest is run where that interpreter has it; its exit code 5 (no
# test chosen) is no failure.
gpu: ## stages (at most 8 minutes, 12 with vLLM) and tests on a CUDA device: PY=python3 RESULTS=DIR
	mkdir -p $(RESULTS)
	$(PY) -c 'import torch; assert torch.cuda.is_available(), "no CUDA device for this torch"'
	$(PY) -m sfpo_megatron doctor | tee $(RESULTS)/doctor.txt
	failed=0; $(PY) benchmarks/on_gpu.py --device cuda --results $(RESULTS) || failed=1; \
	if $(PY) -c 'import pytest' 2> /dev/null; then \
	    rc=0; $(PY) -m pytest -q -m gpu --junitxml=$(RESULTS)/gpu.xml tests/gpu || rc=$$?; \
	    test $$rc -eq 0 -o $$rc -eq 5 || failed=1; \
	fi; \
	exit $$failed

slurm-deps: ## Slurm from Debian's packages (root)
	apt-get update -qq
	apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins

clean: ## remove what was built, not .venv and not runs/
	rm -rf build dist .cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
