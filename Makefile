PYTHON ?= python3
VENV := .venv
XLA := .venv-xla
.PHONY: test test-xla quickstart quickstart-clean lint

$(VENV)/.installed: constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

# torch_xla takes over wherever it is importable, so it lives in a venv of its own
$(XLA)/.installed: constraints-xla.txt setup.cfg
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install -q -c constraints-xla.txt --only-binary torch_xla -e '.[tpu]' pytest pytest-timeout || { \
		echo "torch and torch_xla could not be installed: torch_xla 2.9.0 has wheels for Linux on x86_64 with CPython 3.10 to 3.13 only" >&2; exit 1; }
	touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check nanochat_hf scripts tests

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

test-xla: $(VENV)/.installed $(XLA)/.installed
	OMP_NUM_THREADS=1 PJRT_DEVICE=CPU PLAIN_PYTHON=$(VENV)/bin/python $(XLA)/bin/python -m pytest tests/xla

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m scripts.quickstart

quickstart-clean:
	rm -rf runs/quickstart
