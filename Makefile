# Each target does its own set-up. `make help` lists them.
SHELL := /bin/bash
BIN := .venv/bin
export PYTHON TORCH_INDEX
# Scripts are checked for names and arguments that no longer exist, but are not typed throughout.
LOOSE := $(addprefix --disable-error-code=,arg-type assignment call-overload dict-item misc no-untyped-def union-attr var-annotated)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-lowest check docs bench clean

help: ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready ## a virtual environment in .venv with everything in it; PYTHON=python3.12 chooses the interpreter

.venv/.ready: pyproject.toml constraints-cpu.txt scripts/setup.sh
	@scripts/setup.sh

demo: setup ## train the tiny model on made-up clips, generate, score: outputs/demo/
	@$(BIN)/titans-video demo

test: check ## lint, types and every test that is not long, in two processes
	@log=$$(mktemp); $(BIN)/python -m pytest tests/unit tests/reference > $$log 2>&1 & other=$$!; \
	trap "kill $$other" INT TERM; \
	$(BIN)/python -m pytest tests/endtoend; code=$$?; \
	wait $$other || code=$$?; cat $$log; rm -f $$log; exit $$code

test-all: check ## the long tests too
	@$(BIN)/python -m pytest -m "long or not long"

test-lowest: ## the unit and reference tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	@VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt scripts/setup.sh
	@.venv-lowest/bin/python -m pytest tests/unit tests/reference

check: setup ## formatting, lint, types and the import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@MYPYPATH=src:benchmarks:. $(BIN)/mypy --explicit-package-bases $(LOOSE) benchmarks/*.py benchmarks/common scripts/*.py
	@$(BIN)/python -m pytest -q tests/unit/test_layers.py

docs: setup ## the documentation site: site/index.html; warnings fail the build
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation is in site/. Open site/index.html, or run $(BIN)/mkdocs serve."

bench: setup ## the comparisons with other libraries, memory and speed of training
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean: ## remove caches of tools; .venv and outputs stay
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site
	@find src tests train benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
