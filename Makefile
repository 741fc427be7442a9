PYTHON ?= python3
VENV := .venv
XLA := .venv-xla
WORKERS ?= 2
.PHONY: drill rl-demo screenshots test test-clients test-kernels test-xla quickstart quickstart-clean lint docs

$(VENV)/.installed: constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

# torch_xla takes over wherever it is importable, so it lives in a venv of its own
$(XLA)/.installed: constraints-xla.txt setup.cfg
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install -q -c constraints-xla.txt --only-binary torch_xla -e . torch_xla pytest pytest-timeout || { \
		echo "torch_xla could not be installed (pip says why, above): it has wheels for Linux on x86_64 only, and this is $$(uname -sm)" >&2; exit 1; }
	touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check nanochat_hf scripts tests
	$(VENV)/bin/ruff format --check nanochat_hf scripts tests
	$(VENV)/bin/ty check

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

# the site, in build/site; a broken link is an error
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict -q -d build/site

# in random order, a file on one process; `make test WORKERS=8` where there are more cores
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

# the kernels of CUDA on a GPU, or without one by Triton's interpreter; Triton comes with torch's builds for CUDA alone, and takes 700 MB
test-kernels: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q triton
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/kernels tests/optim/test_gradient_sums.py

# a saved folder in other programs, each in a venv of its own; docs/clients.md has the table
test-clients: $(VENV)/.installed
	PYTHON=$(VENV)/bin/python scripts/clients/vllm.sh .venv-vllm
	PYTHON=$(VENV)/bin/python scripts/clients/peers.sh .venv-peers

test-xla: $(VENV)/.installed $(XLA)/.installed
	PLAIN_PYTHON=$(VENV)/bin/python $(XLA)/bin/python -m pytest -o timeout=1200 tests/xla

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m scripts.quickstart

# the chat page with the quickstart's model, in a real Chromium, which has to be installed
screenshots: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q playwright
	$(VENV)/bin/python -m scripts.screenshots

# what rewards do for the quickstart's model, over three seeds; runs/quickstart is made first where it is not there
rl-demo: $(VENV)/.installed
	test -d runs/quickstart/sft/final || $(VENV)/bin/python -m scripts.quickstart
	$(VENV)/bin/python -m scripts.experiments.rl_demo

quickstart-clean:
	rm -rf runs/quickstart

# runs that are killed, stopped, refused room, damaged and started twice, for a quarter of an hour; the first difference fails it
drill: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m scripts.experiments.drill --minutes 15 --record docs/records/drill
