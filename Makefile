# make demo    install into .venv and run the quickstart       make bench   the measured claims of benchmarks/
# make test    the whole test suite, JOBS files at a time       make docs    the documentation, into docs/_build/html
# make check   style, types, floors, docs, no torchvision      make clean   remove everything made here
# make readme-ledger   run the quickstart from nothing and put its ledger into README.md; wants a quiet machine
PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test check bench docs readme-ledger clean

demo: $(VENV)/.installed
	$(BIN)/sparing run quickstart

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile $(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -c "import importlib.util, sys; sys.exit('torchvision is installed: something declares it' if importlib.util.find_spec('torchvision') else 0)"
	$(BIN)/python -m pip check
	$(MAKE) docs

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed-dev
	set -e; for script in benchmarks/[a-z]*.py; do echo "$$script"; $(BIN)/python "$$script"; done

readme-ledger: $(VENV)/.installed-dev
	rm -rf build/readme
	$(BIN)/sparing run quickstart --store build/readme/store --out build/readme/run
	$(BIN)/python docs/_ext/ledger_table.py build/readme/run

clean:
	rm -rf $(VENV) docs/_build docs/api build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# A stamp is newer than what it was made from, so a second call runs no pip.
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard src/sparing/engine/native/*)

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Sparing needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Say which: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@
