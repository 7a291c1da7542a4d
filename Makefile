# make demo | test | lint | clean. Each makes .venv first where it is missing or older than the pins.
PYTHON ?= python3
PYTEST_WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
KERNELS := qvd_core/ops/cpu
KERNELS_STAMP := $(VENV)/.kernels

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest test-comfyui test-web lint format clean distclean

help:
	@echo "make demo       run the whole story on the miniature model, on a CPU"
	@echo "make test       run the tests (PYTEST_WORKERS=$(PYTEST_WORKERS))"
	@echo "make test-oldest the tests of the diffusers backend with the oldest supported diffusers"
	@echo "make test-comfyui COMFYUI_PATH=...  the node pack on a real ComfyUI, on its CPU server"
	@echo "make test-web   the front end: eslint, unit tests, a browser (needs Node.js 20; Chromium for the last)"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove caches and build products; make distclean also removes out/ and $(VENV)"

install: $(KERNELS_STAMP)

# One pip call with the constraints: the resolver never sees another torch than the pinned one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("QVD pins need Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt -e ".[diffusers,report,dev]"
	@touch $(STAMP)

# The C kernels, again whenever one of their files changes. Without a compiler int8 runs emulated, and says so.
$(KERNELS_STAMP): $(wildcard $(KERNELS)/*.c $(KERNELS)/*.h) $(KERNELS)/build.py $(STAMP)
	-$(PY) $(KERNELS)/build.py
	@touch $(KERNELS_STAMP)

demo: $(KERNELS_STAMP)
	$(PY) -m examples.demo

# Two workers, each with one torch thread (tests/conftest.py): tiny models gain nothing from more threads,
# and a worker per core would load torch and diffusers once per core. A file stays on one worker, with its fixtures.
test: $(KERNELS_STAMP)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile
	@test -n "$(COMFYUI_PATH)" || echo "No test on a real ComfyUI ran: make test-comfyui COMFYUI_PATH=<checkout>"

# In an environment of its own, which needs nothing but what these tests import.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt \
		torch safetensors diffusers transformers accelerate peft tqdm ftfy pillow pytest pytest-xdist hypothesis
	@touch $@

test-oldest: $(KERNELS_STAMP) $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -p no:cacheprovider tests/diffusers

# The server runs with COMFYUI_PYTHON, or the venv of the checkout; what was measured goes into docs/comfyui-tests.md.
test-comfyui: $(KERNELS_STAMP)
	@test -n "$(COMFYUI_PATH)" || { echo "name a ComfyUI checkout: make test-comfyui COMFYUI_PATH=/path/to/ComfyUI"; exit 2; }
	COMFYUI_PATH="$(COMFYUI_PATH)" QVD_COMFYUI_LOG=docs/comfyui-tests.md $(PY) -m pytest -m comfyui -ra tests/comfyui

node_modules/.installed: package.json package-lock.json
	npm ci --no-fund --no-audit
	@touch $@

test-web: node_modules/.installed
	npm run lint
	npm test
	npm run browser

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(KERNELS)/*.so $(KERNELS_STAMP) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf out $(VENV) $(OLDEST) node_modules
