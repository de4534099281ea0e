# `make demo` and `make test` each do all set-up themselves; nothing else is needed than Python 3.10+ and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint claims bench docs install clean
help:
	@echo "make demo    teach a classifier new classes as they come, forget one, write report.html (3 min)"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy"
	@echo "make claims  re-measure every recorded claim"
	@echo "make bench   speed and memory against named peers, as ratios"
	@echo "make docs    regenerate the figures in README and docs, build docs/_build/html"

demo: $(BIN)/.installed
	$(BIN)/shoestring demo

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n 2

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

claims: $(BIN)/.installed
	$(BIN)/shoestring claim all --out src/shoestring/claims/results

bench: $(BIN)/.installed
	missed=""; for b in benchmarks/[a-z]*.py; do $(BIN)/python $$b || missed="$$missed $$b"; done; \
	if [ -n "$$missed" ]; then echo "over a limit:$$missed"; exit 1; fi

docs: $(BIN)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python scripts/figures.py
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build/html

install: $(BIN)/.installed

# torch is pinned in constraints.txt; on the CPU-only machines of this project pip finds its CPU wheel by itself.
$(BIN)/.installed: pyproject.toml constraints.txt
	@echo "setting up .venv (one to three minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv docs/_build .pytest_cache .mypy_cache .ruff_cache
