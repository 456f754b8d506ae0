# The two commands of the README: `make demo` and `make test`. Nothing else is needed first.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
# The RPC backend is the test device for everything that is not host memory; it builds in
# seconds. A wheel that pip built before is used as it is.
export CMAKE_ARGS ?= -DGGML_RPC=ON
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test install install-dev lint clean

demo: install
	$(BIN)/edgeroute pull smollm2-135m-instruct
	$(BIN)/edgeroute generate "Explain in two sentences why the sky is blue."

test: install-dev lint
	$(BIN)/python -m edgeroute pull smollm2-135m-instruct
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# Installed in steps: what takes minutes says so, and a broken step is repeated alone.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing; llama-cpp-python may compile for some minutes the first time."
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
