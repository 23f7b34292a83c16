PYTHON ?= python

.PHONY: test test-all lint format docs

test:  ## the subset for every change: two minutes on two cores
	$(PYTHON) -m pytest -m "not slow and not onnx and not parity and not full and not medium"

test-all:  ## what CI runs
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

docs:  ## the site in site/; pip install -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
