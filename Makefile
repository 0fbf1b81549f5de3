# make demo | test | check | venv | browser | matrix | decoders | elsewhere | bench | clean
# Everything runs in ./.venv, made on first use. The stamp's name holds a checksum of pyproject.toml and the torch pin, so
# a second run installs nothing, and a changed pyproject.toml installs once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A CPU build where pip's index has one; `make TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"` asks for it.
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lorc-$(shell { cat pyproject.toml; echo "$(TORCH) $(TORCH_ARGS)"; } | cksum | cut -d' ' -f1)
TYPED := build/typed
DEMO_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help demo test check lint types pytest browser matrix decoders elsewhere bench venv clean

help:
	@echo "make demo    set up $(VENV), then compress the cache of a real model and show what it costs"
	@echo "make test    set up $(VENV), then ruff, mypy and all tests"
	@echo "make check   ruff, mypy and the quick tests (under two minutes)"
	@echo "make browser lorc report in Chromium;  make matrix  every family;  make decoders  every class;  make elsewhere  other packages';  make bench  timings;  make clean  remove $(VENV)"

venv: $(STAMP)

$(STAMP):
	@echo "== setting up $(VENV) with $(PYTHON) (once; torch and the demo's model are some 800 MB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("lorc_fx needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	@echo "== installing $(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$(TORCH)"
	@echo "== installing lorc_fx with the extras demo and test"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[demo,test]"
	@rm -f $(VENV)/.lorc-*
	@touch $@

demo: $(STAMP)
	@echo "== lorc demo $(DEMO_ARGS)"
	@$(BIN)/lorc demo $(DEMO_ARGS)

test: lint types pytest

check: lint types quick

# What `make check` runs: the files that say most in about a minute on two cores.
QUICK := errors options scheduler_registry schedulers formulas allocate packing factors codec bounds_matrices \
	normalise rules matcher row_writes cost latent attend docs_dev

.PHONY: quick
quick: $(STAMP)
	@echo "== pytest, the quick files"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q $(QUICK:%=tests/test_%.py) $(PYTEST_ARGS)

lint: $(STAMP)
	@echo "== ruff"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

# mypy knows modules by their place on disk, and passes/ and kernels/ are installed inside lorc_fx: show it that tree.
types: $(STAMP)
	@echo "== mypy"
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/lorc_fx
	@ln -sfn $(CURDIR)/lorc_fx/* $(CURDIR)/passes $(CURDIR)/kernels $(TYPED)/lorc_fx/
	@cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		--python-executable $(CURDIR)/$(BIN)/python -p lorc_fx

# Two workers with one thread each: more threads than cores make compiled code several times slower.
pytest: $(STAMP)
	@echo "== pytest"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(PYTEST_ARGS)

# Chromium and its driver are of the system (Debian: apt-get install chromium chromium-driver).
browser: $(STAMP)
	@echo "== what lorc report writes, in Chromium"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[browser]"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m browser $(PYTEST_ARGS)

decoders: $(STAMP)
	@echo "== every decoder of transformers"
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.decoders --docs docs/decoders.md

elsewhere: $(STAMP)
	@echo "== decoders of other packages"
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.elsewhere --docs docs/elsewhere.md

matrix: $(STAMP)
	@echo "== pytest, the full matrix"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "matrix or slow" $(PYTEST_ARGS)

bench: $(STAMP)
	@echo "== bench.run"
	@$(BIN)/python -m bench.run

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
