# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv/ first, and only once.
PYTHON ?= python3
# Another environment: make test VENV=FOLDER CONSTRAINTS=FILE
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-lm measure mutants test test-slow test-oldest test-newest lint setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	# deepspeed's own script cannot start in a path with spaces: its first line names the interpreter unquoted
	printf '%s\n' '#!/bin/sh' 'exec "$$(dirname "$$0")/python" -m deepspeed.launcher.runner "$$@"' > $(BIN)/deepspeed
	touch $(VENV)/.installed

demo: setup
	$(BIN)/python -m demo.run

demo-lm: setup
	$(BIN)/python -m demo.run_lm

# two test files side by side: their processes mostly wait for each other
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# with the lowest versions that setup.py allows
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# with what the package registry has today, resolved anew each time
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# sizes, types, docs, cycles of the source tree
measure: setup
	$(BIN)/python benchmarks/house.py --offenders

# breaks chosen lines one by one: a test must fail for each (about ten minutes; MUTANTS="--only 3,7" for some)
mutants: setup
	$(BIN)/python tests/mutants.py $(MUTANTS)

clean:
	rm -rf runs build *.egg-info
