# `make demo` and `make test` work on a fresh clone: they make .venv and install what they need by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs wheel clean

demo: $(VENV)/.demo  ## train and evaluate on JapaneseVowels; go on with it, or show the result, if it ran before
	$(BIN)/flowformer train uea/JapaneseVowels --out runs/demo --resume

test: $(VENV)/.test  ## the default test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/.test  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror flowformer/kernels/native/source/*
	$(BIN)/pyright

docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.test
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site

# Some systems ship Python without the module that makes environments: virtualenv does it then.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }

# A stamp per set of extras: installed once, and again when pyproject.toml changes.
$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -e '.[timeseries]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -e '.[all,dev]'
	touch $@ $(VENV)/.demo
