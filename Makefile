# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs; Python 3.11 or newer is enough.

PYTHON ?= python3
BIN := .venv/bin
TPU := .venv/tpu

.PHONY: demo test test-recipes test-long parity plan plan-check lint format

demo: .venv/installed
	$(BIN)/python -m train.demo configs/demo/demo.py $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Every command of the README and every config, with less work.
test-recipes: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m recipe

# What takes too long for every change: a run that is killed twenty times.
test-long: .venv/installed-test
	$(BIN)/python -m pytest -m long

# Networks of full size against torch; needs 24 GB of memory, takes a quarter of an hour, and writes docs/parity.md.
parity: .venv/installed-test
	$(BIN)/python -m tests.parity.full_size

# Every config, compiled for slices of TPU pods that are not there: hours on two cores, 22 GB of memory. Writes each plan
# into a table in docs/performance.md; make plan ARGS=--missing goes on, ARGS='--only sd15 --slices v5e:16x16' does a part.
plan: .venv/installed-tpu
	PYTHONPATH=$(TPU) $(BIN)/python -m tests.plans $(ARGS)

# Whether a training step and a sampler of full size still fit a TPU chip and are as fast as recorded.
plan-check: .venv/installed-tpu
	PYTHONPATH=$(TPU) $(BIN)/python -m pytest -m plan tests/test_plans.py tests/planning

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch .venv/installed $@

# The compiler of TPUs, 200 MB more than most need: the version that JAX asks for. It lies apart, for where it is installed
# JAX looks for TPUs at every start, and says at length that there are none.
LIBTPU := from importlib.metadata import requires; print(*(r.partition(";")[0] for r in requires("jax") if "libtpu" in r))
.venv/installed-tpu: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TPU) \
		"$$($(BIN)/python -c '$(LIBTPU)')"
	touch $@
