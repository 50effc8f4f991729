# Every target does all its own set-up in .venv; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
# Several small processes beat one with many threads; more than one thread each would only make them fight.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-faults test-fuzz lint tables wheel notebook docs clean

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(THREADS) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# Kills, tears and fills up real runs, and prints what came of it: a few minutes.
test-faults: $(READY)
	PYTHONPATH=tests $(THREADS) $(BIN)/python tests/integration/faults.py

# New forged and damaged checkpoints, in place of the same few hundred of `make test`: a few minutes.
test-fuzz: $(READY)
	FUZZ=4000 $(THREADS) $(BIN)/python -m pytest -q tests/utils/test_unpickling_fuzz.py -k makes_data

lint: $(READY)
	$(BIN)/ruff check .

# Tables, generated pages, metafiles and pictures, a few minutes; `make tables CHECK=1` only says what is out of date.
tables: $(READY)
	$(THREADS) $(BIN)/python maintenance/make_all.py $(if $(CHECK),--check)

# dist/adala_mm-*.whl: package, configs and tools in one file; an earlier build leaves nothing in it.
wheel:
	rm -rf build/lib build/bdist.*
	$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps -w dist .
	@ls dist/*.whl

# Outputs of the notebook, after a change of its code.
notebook: $(DOCS_READY)
	$(THREADS) PATH=$(BIN):$$PATH $(BIN)/python maintenance/run_notebook.py

# Pages in build/docs, from docs/, the READMEs and the docstrings; a warning is an error.
docs: $(DOCS_READY)
	rm -rf build/docs
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs
	@echo "build/docs/index.html"

$(READY): pyproject.toml $(filter-out requirements/docs.txt, $(wildcard requirements/*.txt))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "adala_mm needs Python >= 3.10; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes, once) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -e '.[onedl,tests]'
	@touch $(READY)

$(DOCS_READY): $(READY) requirements/docs.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -r requirements/docs.txt
	@touch $(DOCS_READY)

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache *.egg-info
