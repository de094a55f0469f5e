# Everything starts from a bare clone: each target first makes sure that .venv is set up.
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# Any Python >= 3.9 that really starts (a pyenv shim may not), one with pip before one without.
FIND_PYTHON := for test in 'import pip' 'pass'; do \
	for python in python3 python python3.12 python3.13 python3.11 python3.10 python3.9 \
		/usr/bin/python3 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.*/bin/python; do \
		"$$python" -c "import sys; sys.version_info < (3, 9) and sys.exit(1); $$test" 2>/dev/null \
			&& echo "$$python" && exit; \
	done; done; \
	echo 'No Python 3.9 or newer was found: install one with pip (for example: apt install' \
		'python3-pip), then run make again.' >&2; exit 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu checks format bench patches clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "%-10s %s\n", $$1, $$2}'

setup: ## Build the virtual environment (.venv) with everything in it; instant once done.
	@python=$$($(FIND_PYTHON)) && "$$python" tools/setup_env.py --venv "$(VENV)"

demo: setup ## Train a dense and a mixture-of-experts GPT here on the CPU (about 6 minutes).
	@$(BIN)/megatron-moe demo

test: setup ## Run the test suite, without the tests marked slow.
	$(PYTEST) -m "not slow"

test-all: setup ## Run every test, the slow ones too.
	$(PYTEST)

test-gpu: setup ## Run the tests that need a CUDA device.
	$(PYTEST) -m gpu

checks: setup ## Check formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## Format the code and apply the safe lint fixes.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## Compare our layer's speed with upstream's (the quick table).
	$(BIN)/python tools/bench/layer.py --quick

patches: setup ## List the declared patches, whether each fits, and renew the table in patches/README.md.
	@$(BIN)/megatron-moe patches --write

clean: ## Remove the environment, caches and build outputs (keeps runs/).
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
