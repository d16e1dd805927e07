# `make demo` and `make test` set themselves up: a virtual environment in the checkout, pinned by constraints.txt.
#
#   make demo     the reference model reads 16K tokens, dense and sparse; prints the table of the README
#   make demo-pretrained  the same with SmolLM2, a small model that people use, which it fetches (98 MB)
#   make test     all tests
#   make lint     ruff and pyright
#   make docs     the documentation, into site/
#   make coverage all tests, and which lines of the package none of them runs
#   make vllm     vLLM for CPUs in an environment of its own beside gossamer, .venv-vllm (Python 3.11 or newer, x86-64)
#   make contenders  first tokens of OpenVINO GenAI, llama.cpp, vLLM and transformers beside ours, on SmolLM2; hours
#   make test-vllm  the tests of the plug-in inside vLLM; some minutes
#   make wheel    a wheel into dist/; it fails without the C++ kernels
#   make mutants  faults put into the package, which its tests must notice; an hour, and goes on where it was stopped
#   make families which model families run under gossamer, into tests/integrations/families.json; some minutes
#   make bench    CPU benchmarks of attention and of planning, into benchmarks/results/; an hour and more
#   make clean    remove what was built, the environment included
#
# PYTHON picks the interpreter, VENV the environment's place, PIP_FLAGS what pip should know, for example
# PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a torch without CUDA.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
OTHERS_VENV ?= .venv-contenders
OTHERS_STAMP := $(OTHERS_VENV)/.installed
SOURCES := pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*/*)

# The pins hold for what the build needs as well (pip reads one of the two, by its age).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv demo demo-pretrained test lint docs coverage vllm test-vllm contenders wheel mutants families bench clean

venv: $(STAMP)

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gossamer needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "setting up $(VENV); this takes minutes, and torch is a large download"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev,docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

demo-pretrained: $(STAMP)
	$(BIN)/python examples/demo_pretrained.py

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

coverage: $(STAMP)
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) pytest-cov
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=xml

vllm: $(VLLM_STAMP)

# Its packages come first there; torch, gossamer and the tests' own are those of the first environment.
$(VLLM_STAMP): $(STAMP) requirements-vllm.txt
	@echo "setting up $(VLLM_VENV); vLLM is a large download"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@PIP_CONSTRAINT= $(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-vllm.txt
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_gossamer.pth
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm_plugin

# As above. Its transformers is the one that optimum-intel takes.
$(OTHERS_STAMP): $(STAMP) requirements-contenders.txt
	@echo "setting up $(OTHERS_VENV)"
	@$(PYTHON) -m venv $(OTHERS_VENV)
	@PIP_CONSTRAINT= $(OTHERS_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-contenders.txt
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(OTHERS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_gossamer.pth
	@touch $@

contenders: $(OTHERS_STAMP) $(VLLM_STAMP)
	$(BIN)/python models/pretrained.py
	$(BIN)/python benchmarks/contenders.py build/pretrained/smollm2.gguf --others $(OTHERS_VENV)/bin/python \
	  --vllm $(VLLM_VENV)/bin/python

wheel: $(STAMP)
	GOSSAMER_REQUIRE_KERNELS=1 $(BIN)/python -m pip wheel $(PIP_FLAGS) --no-deps --wheel-dir dist .

mutants: $(STAMP)
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) cosmic-ray
	$(BIN)/python tests/mutate.py

families: $(STAMP)
	$(BIN)/python tests/integrations/families.py

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/planning.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OTHERS_VENV) build dist site wheelhouse coverage.xml .coverage .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
