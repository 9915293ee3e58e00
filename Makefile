# Needs make and Python >= 3.11, nothing else:  make demo   make test   (PYTHON=python3.12 to choose one)
# Both work in an environment of their own, made on first use and brought up to date when its definition
# changes; `make clean` removes it.

PYTHON ?= python3
# Processes that run the tests; each is single-threaded.
WORKERS ?= auto

VENV := .venv-make
WHEEL_VENV := .venv-wheel
BIN := $(VENV)/bin
DEFINITION := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt

export MPLBACKEND := Agg

.PHONY: demo test format lint types layers package unit fuzz clean
.NOTPARALLEL:

demo: $(VENV)/.library
	$(BIN)/python examples/demo.py

test: lint types layers package unit

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.development
	$(BIN)/mypy

layers: $(VENV)/.development
	$(BIN)/lint-imports --no-logo

# Build, check the metadata, then install the wheel where nothing else is and solve with every backend.
package: $(VENV)/.development
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --no-isolation > $(VENV)/build.log || { cat $(VENV)/build.log; exit 1; }
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt dist/*.whl
	$(WHEEL_VENV)/bin/python -I -W error .ci/check_wheel.py

# Last, so that the output of `make test` ends with pytest's own verdict.
unit: export OMP_NUM_THREADS := 1
unit: export OPENBLAS_NUM_THREADS := 1
unit: export MKL_NUM_THREADS := 1
unit: $(VENV)/.development
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 8

# The property-based tests, forty times as many examples and anew each time; SEED=... runs one again. And 20,000
# calls of a layer whose memory must not grow.
SEED ?= $(shell date +%s)
fuzz: export DDN_FUZZ := 40
fuzz: export OMP_NUM_THREADS := 1
fuzz: export OPENBLAS_NUM_THREADS := 1
fuzz: export MKL_NUM_THREADS := 1
fuzz: $(VENV)/.development
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 8 --hypothesis-seed=$(SEED) tests/test_fuzz.py tests/test_fuzz_kinks.py tests/test_fuzz_failures.py tests/test_soak.py

clean:
	rm -rf $(VENV) $(WHEEL_VENV) dist

$(VENV)/.library: $(DEFINITION)
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV) (torch is large: the first time takes minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) --build-constraint constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/.development: $(VENV)/.library
	$(PIP) --group dev
	@touch $@
