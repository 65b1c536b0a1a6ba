# Each target sets up .venv by itself. Needs make and Python >= 3.11; choose one with `make venv PYTHON=/path/to/python3`.
# Where there is no NVIDIA GPU, torch is a build for CPUs, which is much smaller. TORCH_INDEX=URL names another package
# index for torch.

SHELL := /bin/bash
VENV := .venv
RUN := $(VENV)/bin/python
# named after what is asked for, so that an edited pin installs again and a touched file does not
STAMP := $(VENV)/.stamp-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)
PIP := $(RUN) -m pip --disable-pip-version-check install -qq

# idle OpenMP threads that spin would take the cores from each other's processes
export OMP_WAIT_POLICY := passive
# deepspeed compiles its kernels at first use, not at installation
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help venv quickstart quickstart-from-scratch test test-all test-fast lint format bench gpu-check methods soak mutants docs clean distclean

help:
	@echo 'make quickstart   distils the teacher that ships into a causal 2-step student; videos, table, report (5 to 6 minutes on 2 cores)'
	@echo 'make quickstart-from-scratch   trains that teacher first (35 minutes more)'
	@echo 'make test         one test of each kind (9 minutes on 2 cores); make test-fast: without the slow ones'
	@echo 'make test-all     every test (45 minutes at most)'
	@echo 'make lint         ruff and mypy        make format      let ruff rewrite'
	@echo 'make methods      every method from the same teachers, 3 seeds each: docs/methods.md (an hour or more on 2 cores)'
	@echo 'make soak         small runs killed 200 times, on disks that fill, under clocks that jump: nothing differs (half an hour)'
	@echo 'make mutants      changed operators, comparisons and constants of model/, pipeline/ and utils/: how many the tests kill (an hour)'
	@echo 'make bench        cost of a training step, of streaming and of attention; make gpu-check: tests and true sizes on one GPU'
	@echo 'make docs         the site of docs/ with search, in site/'
	@echo 'make venv         only set up .venv    make clean       remove caches (distclean: .venv too)'

venv: $(STAMP)

# a Python that can make virtual environments, and .venv made by it
define make_venv
	@set -e; \
	works() { "$$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	python=; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',python3 python3.13 python3.12 python3.11 python3.14); do \
	  if works "$$candidate"; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no usable Python: $(if $(PYTHON),$(PYTHON),python3) must be >= 3.11 with the venv and ensurepip" \
	    "modules (on Debian: apt-get install python3-venv); name another with PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	if ! $(RUN) -c '' 2>/dev/null; then \
	  echo "==> making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
endef

CPU_BUILDS := https://download.pytorch.org/whl/cpu

# $(call install_torch,OPTIONS OF PIP)
define install_torch
	@index='$(TORCH_INDEX)'; \
	if [ -z "$$index" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(PIP) $(1) --retries 1 --index-url $(CPU_BUILDS) "$$(grep '^torch==' requirements.txt)" 2>/dev/null && exit; \
	  echo "==> no build of torch for CPUs alone at $(CPU_BUILDS): taking the usual one"; \
	fi; \
	$(PIP) $(1) $${index:+--index-url "$$index"} "$$(grep '^torch==' requirements.txt)"
endef

$(STAMP): requirements.txt requirements-dev.txt
	$(make_venv)
	@rm -f $(VENV)/.stamp-*
	@echo "==> installing torch (the longest part; a couple of minutes in all, more on a slow line)"
	$(install_torch)
	@echo "==> installing the rest of requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@
	@echo "==> $(VENV) is ready"

# what the quickstart and the demo import, at the versions of requirements.txt; nothing where all of it is there already
QUICK := numpy einops omegaconf huggingface_hub safetensors tokenizers transformers ftfy av pillow matplotlib tqdm \
  fastapi uvicorn websockets
QUICK_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.quick-$(shell cksum < requirements.txt | cut -d' ' -f1))

$(VENV)/.quick-%: requirements.txt
	$(make_venv)
	@echo "==> installing what the quickstart needs: torch $(QUICK) (about a minute; other commands need make venv)"
	$(call install_torch,--no-compile)
	@$(PIP) --no-compile $$(for name in $(QUICK); do grep "^$$name==" requirements.txt; done)
	@touch $@

# ARGS=--help says what it may be told. The packages came without bytecode, which the first process has to write.
quickstart: $(QUICK_STAMP)
	@PYTHONDONTWRITEBYTECODE= $(RUN) -m scripts.quickstart $(ARGS)

quickstart-from-scratch: $(QUICK_STAMP)
	@PYTHONDONTWRITEBYTECODE= $(RUN) -m scripts.quickstart --from_scratch --root logs/quickstart_from_scratch $(ARGS)

# two workers, each file's tests in one of them, in order: the long files (tests/distributed) begin first
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	@$(PYTEST) -m 'not full'

test-all: $(STAMP)
	@$(PYTEST)

test-fast: $(STAMP)
	@$(PYTEST) -m 'not slow and not full'

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy .

format: $(STAMP)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(STAMP)
	@$(RUN) -m benchmarks.train_step
	@$(RUN) -m benchmarks.streaming
	@$(RUN) -m benchmarks.streaming --size toy
	@$(RUN) -m benchmarks.attention

# Tests and benchmarks on one GPU, within SECONDS (540), or ONLY=tests,train,streaming,attention of them, into OUT (a
# folder). Installs nothing: without .venv it takes python3, which needs torch, einops, omegaconf and safetensors
# (pytest and pytest-xdist for the tests, diffusers and torchao for some options of streaming).
gpu-check:
	@python=$$([ -x $(RUN) ] && echo $(RUN) || echo python3); \
	ONLY='$(ONLY)' OUT='$(OUT)' $$python -m benchmarks.gpu_check $(SECONDS)

# ARGS=--quick is a trial of a few iterations each, ARGS='--only ROW ...' makes some rows
methods: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m scripts.methods $(ARGS)

# ARGS="--kills 20 --ranks 1 2" is a short one
soak: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m tests.soak $(ARGS)

# in an environment of its own; ARGS="--count 20 --seed 1" is a short one
MUTANTS := $(VENV)/mutants
MUTANTS_STAMP := $(MUTANTS)/.stamp-8.7.0

$(MUTANTS_STAMP):
	@$(or $(PYTHON),python3) -m venv --clear $(MUTANTS)
	@$(MUTANTS)/bin/python -m pip --disable-pip-version-check install --quiet cosmic-ray==8.7.0
	@touch $@

mutants: $(STAMP) $(MUTANTS_STAMP)
	@OMP_NUM_THREADS=1 $(MUTANTS)/bin/python tests/mutants.py $(ARGS)

# the site of docs/ in site/, with an environment of its own: it needs no torch
DOCS := $(VENV)/docs
DOCS_STAMP := $(DOCS)/.stamp-$(shell cksum < requirements-docs.txt | cut -d' ' -f1)

$(DOCS_STAMP): requirements-docs.txt
	@$(or $(PYTHON),python3) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-docs.txt
	@touch $@

docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo '==> site/index.html'

clean:
	@rm -rf .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
