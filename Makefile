# Everything a clone needs: `make demo`, `make test`, `make check`. Only Python and make are required.
#
#   make demo                                        venv, install, a real comparison in minutes
#   make demo PYTHON=python3.12 SYSTEM_TORCH=1       the same over a torch (and CUDA) that is already installed
#   make test | make check | make test-oldest        the suite; ruff and mypy; the suite on the oldest transformers
#   make interop                                     what engines read of what infopt writes, as a table
#   make wheel                                       wheels with kernel libraries in them, in dist/

PYTHON       ?= python3
VENV         ?= .venv
CONSTRAINTS  ?= constraints.txt
SYSTEM_TORCH ?=
BIN          := $(VENV)/bin
STAMP        := $(VENV)/.installed
PIP          := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check test-oldest interop wheel venv clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/infopt demo

test: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

check: $(STAMP)
	$(BIN)/ruff format --check infopt tests benchmarks
	$(BIN)/ruff check infopt tests benchmarks
	$(BIN)/mypy --strict infopt benchmarks

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Which engines read what infopt writes (results/interop). llama.cpp is built once, in minutes; the onnx extra is installed.
interop: $(STAMP)
	$(PIP) install -c $(CONSTRAINTS) -e '.[onnx]'
	$(BIN)/python benchmarks/interop.py

# A wheel for each kind of processor. The other kind than this machine's needs a cross compiler: Debian's g++-aarch64-linux-gnu.
wheel: $(STAMP)
	$(PIP) install 'setuptools>=77'
	@for kind in x86_64 aarch64; do \
		if [ $$kind = "$$(uname -m)" ] || command -v $$kind-linux-gnu-g++ > /dev/null; then \
			INFOPT_WHEEL=$$kind $(PIP) wheel --no-deps --no-build-isolation -w dist . || exit 1; \
		else \
			echo "no wheel for $$kind: there is no $$kind-linux-gnu-g++"; \
		fi; \
	done
	@ls -l dist/*.whl

venv: $(STAMP)

# torch first and pinned: a bare range would take the newest release, with gigabytes of CUDA libraries, on any machine.
# With SYSTEM_TORCH the machine's own torch, transformers and what they brought stay as they are.
$(STAMP): pyproject.toml $(CONSTRAINTS)
ifeq ($(SYSTEM_TORCH),)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) torch
	$(PIP) install -c $(CONSTRAINTS) -e '.[dev]'
else
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PIP) install -e '.[dev]'
endif
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-oldest .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
