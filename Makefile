PYTHON ?= python3
VENV := .venv
.PHONY: test quickstart quickstart-clean lint

$(VENV)/.installed: constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check nanochat_hf scripts tests

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m scripts.quickstart

quickstart-clean:
	rm -rf runs/quickstart
