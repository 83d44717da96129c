# `make demo` and `make test` need Python 3.11 or newer and nothing else; what they need they install into .venv.
PYTHON ?= python3
BIN := .venv/bin
FACE := murmur simulation coordinator clients aggregation privacy web protocol

.PHONY: demo test test-all check format install clean
.DEFAULT_GOAL := test

$(BIN)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.test: $(BIN)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,postgres]'
	touch $@

install: $(BIN)/.base

demo: $(BIN)/.base
	$(BIN)/murmur demo $(ARGS)

# Five at a time on two cores, for many tests wait for processes of their own; torch's threads would fight over them.
# What fails beside others is run once more, alone, and named: see tests/twice.py.
test test-all: export OMP_NUM_THREADS = 1
TWICE := $(BIN)/python -P tests/twice.py -n 5 --dist worksteal

test: $(BIN)/.test
	$(TWICE) $(ARGS)

test-all: $(BIN)/.test
	$(TWICE) -m '' $(ARGS)

# The type checker follows file paths; this folder of links shows it the folders under the name they are imported by.
check: $(BIN)/.test
	@mkdir -p .venv/types/murmur
	@for d in $(filter-out murmur,$(FACE)); do ln -sfn ../../../$$d .venv/types/murmur/$$d; done
	@for f in murmur/*.py; do ln -sfn ../../../$$f .venv/types/murmur/$$(basename $$f); done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/pytest -q tests/test_layers.py

format: $(BIN)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
