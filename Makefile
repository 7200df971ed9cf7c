# One virtual environment in .venv; every target makes it when it is missing.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin

# The real torchair comes out of this wheel: its Python files, whatever this machine is. It is unpacked beside the environment,
# since torch would load it on import.
TORCH_NPU := 2.13.0
ASCEND_SIM ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/staticvl/torch_npu-$(TORCH_NPU)
export STATICVL_TORCH_NPU := $(ASCEND_SIM)

# Without an NVIDIA GPU torch for CPUs is installed, from this index; TORCH=cpu, cuda or any overrides what is found.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX
INSTALL := tools/development/install.sh $(BIN)/python

.PHONY: demo demo-sim test test-slow test-isa test-pythons ascend-sim chromium soak attack lint types docs bench bench-peers clean

demo: $(VENV)/.compile
	$(BIN)/staticvl demo

demo-sim: $(VENV)/.compile ascend-sim
	$(BIN)/staticvl demo --device sim

test: $(VENV)/.test ascend-sim
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test ascend-sim
	$(BIN)/python -m pytest -m slow

# Numeric tests under other instruction sets, one thread and two; a few of them are part of `make test`.
test-isa: $(VENV)/.test ascend-sim
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_instruction_sets.py

# The suite, or the files in PYTEST_ARGS, under other Pythons, as far as they are on this machine. The tests of Ascend are
# skipped there: artifacts for Ascend hold byte code of one Python.
test-pythons:
	tools/development/test_pythons.sh 3.12 3.13

ascend-sim: $(ASCEND_SIM)/torch_npu

$(ASCEND_SIM)/torch_npu: | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --python-version 3.11 \
		--target $(ASCEND_SIM) torch_npu==$(TORCH_NPU)

# The browser that the tests of the server's page drive; Debian's, so as root. Without it they are skipped.
chromium:
	command -v chromium || (apt-get update -qq && apt-get install -qq --no-install-recommends chromium)

soak: $(VENV)/.test
	$(BIN)/python -m benchmarks.serve_soak

# Bounded in count and time, and on this machine alone; failures are in build/attack.jsonl.
attack: $(VENV)/.test ascend-sim
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright

# The documentation as a site in build/site; a broken link or anchor is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.memory_by_buckets

# The peers have an environment of their own, so that their dependencies never meet ours. llama.cpp is built for this machine.
# optimum-intel asks for torchvision, which nothing here needs; built for CUDA, it cannot be imported beside a torch for CPUs.
PEERS := build/peers-venv
bench-peers: $(VENV)/.test $(PEERS)/.installed
	$(BIN)/python -m benchmarks.peers --out build/peers.json --chart build/peers.svg

$(PEERS)/.installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PEERS)/bin/pip install --quiet -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/pip uninstall --quiet --yes torchvision
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.compile: setup.py | $(VENV)/bin/pip
	$(INSTALL) compile
	touch $@

$(VENV)/.test: setup.py | $(VENV)/bin/pip
	$(INSTALL) test
	touch $@ $(VENV)/.compile

$(VENV)/.docs: setup.py | $(VENV)/bin/pip
	$(BIN)/pip install --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-3.12 $(VENV)-3.13 build dist *.egg-info
