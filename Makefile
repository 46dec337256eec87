# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs; Python 3.11 or newer is enough.

PYTHON ?= python3
# A Python that is named has an environment of its own: PYTHON=python3.12 has .venv-3.12, unless VENV names another.
VENV := .venv$(patsubst python%,-%,$(filter-out python python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
TPU := $(VENV)/tpu

# Tests start hundreds of programs, each of which would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo study test test-python test-formats test-programs test-recipes test-long bench parity formats plan plan-check docs lint format

demo: $(VENV)/installed
	$(BIN)/python -m train.demo configs/demo/demo.py $(ARGS)

# When does contrastive guidance pay: hours on two cores, in as many pieces as you like. Writes docs/evidence.md;
# make study ARGS='--only main' does one cell, ARGS=--quick a little of everything.
study: $(VENV)/installed
	$(BIN)/python -m train.study configs/demo/study.py --results docs/evidence $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The tests that show whether a Python and its JAX will do, in a few minutes: make test-python PYTHON=python3.13.
test-python:
	@if $(RUN_PYTHON) -c '' 2>/dev/null; then $(MAKE) test ARGS='$(CORE_TESTS)'; \
	else echo 'skipped: there is no $(PYTHON) on this machine'; fi

CORE_TESTS := tests/models tests/diffusion

# Every command of the README and every config, with less work.
test-recipes: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m recipe

# Whole programs that are killed, or run on other meshes and hosts: they come to what one undisturbed run does. Also the
# notebooks, and the steps of the Docker images.
test-programs: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m program

# Every kind of file that docs/formats.md lists: made, read, written and damaged.
test-formats: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m formats tests/formats

# What takes too long for every change: a run that is killed twenty times.
test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest -m long

# Every bench at a small size. A line of ratios to torch joins bench/history.jsonl, whose last ten are printed.
bench: $(VENV)/installed-test
	$(BIN)/python -m bench all --history bench/history.jsonl --json runs/bench.json $(ARGS)

# Networks of full size against torch; needs 24 GB of memory, takes a quarter of an hour, and writes docs/parity.md.
parity: $(VENV)/installed-test
	$(BIN)/python -m tests.parity.full_size

# A file of every kind by the libraries that write it, read and compared: a minute or two. Writes the matrix in
# docs/formats.md.
formats: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.formats

# Every config, compiled for slices of TPU pods that are not there: hours on two cores, 22 GB of memory. Writes each plan
# into a table in docs/performance.md; make plan ARGS=--missing goes on, ARGS='--only sd15 --slices v5e:16x16' does a part.
plan: $(VENV)/installed-tpu
	PYTHONPATH=$(TPU) $(BIN)/python -m tests.plans $(ARGS)

# Whether a training step and a sampler of full size still fit a TPU chip and are as fast as recorded.
plan-check: $(VENV)/installed-tpu
	PYTHONPATH=$(TPU) $(BIN)/python -m pytest -m plan tests/test_plans.py tests/planning

# The pages of docs/ with an API reference, into site/; a link or a name that leads nowhere is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pyenv runs the versions that are selected; one that is installed but not selected is selected here.
RUN_PYTHON = $(if $(shell $(PYTHON) -c 'print(1)' 2>/dev/null),,PYENV_VERSION=$(lastword $(shell pyenv whence $(PYTHON) 2>/dev/null))) $(PYTHON)

$(VENV)/bin/python:
	$(RUN_PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make demo PYTHON=python3.12 VENV=.venv")'
	$(RUN_PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $(VENV)/installed $@

$(VENV)/installed-docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $(VENV)/installed $@

# The compiler of TPUs, 200 MB more than most need: the version that JAX asks for. It lies apart, for where it is installed
# JAX looks for TPUs at every start, and says at length that there are none.
LIBTPU := from importlib.metadata import requires; print(*(r.partition(";")[0] for r in requires("jax") if "libtpu" in r))
$(VENV)/installed-tpu: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TPU) \
		"$$($(BIN)/python -c '$(LIBTPU)')"
	touch $@
