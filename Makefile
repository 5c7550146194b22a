# Everything a user or CI starts. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP_CPU := $(VENV)/.installed
STAMP_GPU := $(VENV)/.installed-gpu
STAMP_SGLANG := $(VENV)/.installed-sglang
# An environment that `make setup-gpu` made stays one: whatever else is asked for renews it from its own lock.
ifneq ($(wildcard $(STAMP_GPU)),)
STAMP := $(STAMP_GPU)
STAMP_SGLANG := $(STAMP_GPU)
LOCK := constraints-gpu.txt
else
STAMP := $(STAMP_CPU)
LOCK := constraints.txt
endif
SGLANG := runner/rollout/sglang
# pip installs torch first: a wider range would let other packages pull a CUDA build of gigabytes, and pip finds wheels where uv does
# not look (find-links of its configuration). The rest is uv's: 15 to 18 s where pip took 100 s and more.
TORCH ?= torch==2.13.0
# Processes of `make test` and `make test-slow`, one per core; a test that needs several processes starts them itself.
WORKERS ?= logical
# llmcompressor 0.14.0.1 wants an older transformers and a newer compressed-tensors than pyproject.toml pins.
GPTQ_VENV ?= .venv-gptq
GPTQ ?= llmcompressor==0.14.0.1
GPTQ_STAMP := $(GPTQ_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu warm-gpu setup-sglang test-sglang test-night setup-gptq run test test-slow test-megatron test-ray test-recipes test-peers test-gptq same lock lint docs format bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install everything that `make run` and `make test` need
$(STAMP_CPU): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "runner needs Python 3.11 to 3.13; set PYTHON=python3.12, say")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH) uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev,megatron,tensorboard,mlflow,mcp]'
	@touch $(STAMP_CPU)

# Transformer Engine's torch part is compiled against the torch that is there, after everything else, with the toolkit's nvcc and the
# headers of the wheels; without FORCE_BUILD it asks a release page for a wheel first.
NVIDIA := $(abspath $(VENV))/lib/python3.12/site-packages/nvidia
TE_BUILD := NVTE_PYTORCH_FORCE_BUILD=TRUE CPATH=$(NVIDIA)/cu13/include:$(NVIDIA)/cudnn/include:$(NVIDIA)/nccl/include
setup-gpu: $(STAMP_GPU) ## The same for CUDA 13 GPUs, with SGLang and Transformer Engine (downloads 4.8 GB; 11 GB on disk)
$(STAMP_GPU): pyproject.toml constraints-gpu.txt
	@$(PYTHON) .ci/gpu_ready.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' constraints-gpu.txt)"
	grep -v '^transformer-engine-torch==' constraints-gpu.txt | $(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r -
	grep '^transformer-engine-torch==' constraints-gpu.txt | $(TE_BUILD) $(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -r -
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $(STAMP_GPU)

warm-gpu: setup-gpu ## Compile SGLang's INT4 kernels for this machine's GPU now, at the same time (11 minutes one after the other)
	$(BIN)/python -m runner.rollout.sglang.warm

setup-gptq: $(GPTQ_STAMP) ## Make .venv-gptq, in which `convert method=gptq` runs llmcompressor
$(GPTQ_STAMP): Makefile
	@test -x $(GPTQ_VENV)/bin/python || $(PYTHON) -m venv $(GPTQ_VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(GPTQ_VENV)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(GPTQ_VENV)/bin/python -m pip install -q --disable-pip-version-check $(GPTQ)
	@touch $(GPTQ_STAMP)

setup-sglang: $(STAMP_SGLANG) ## SGLang 0.5.23 and runner's plugin for it, into the same .venv (CPU; 2.8 GB, 2 minutes)
$(VENV)/.installed-sglang: $(STAMP_CPU) $(SGLANG)/requirements.txt $(SGLANG)/sglang.txt
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -r $(SGLANG)/requirements.txt -e '.[dev]'
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r $(SGLANG)/sglang.txt
	@touch $@

run: setup ## The main job: the whole low-precision RL loop on this machine (two to four minutes)
	$(BIN)/python -m runner

test: setup ## The fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not sglang and not megatron and not ray and not night"

test-slow: setup ## Statistical, end-to-end and kill-and-resume tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow and not night"

test-gptq: setup setup-gptq ## Tests of the converter through llmcompressor (elsewhere they are skipped)
	$(BIN)/python -m pytest tests/test_convert_gptq.py

test-sglang: setup-sglang ## Tests against real SGLang servers on this machine's CPU (six minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "sglang and not night"

# p2p links libibverbs.so.1 (apt-get install libibverbs1); without it those tests are skipped
# --no-deps: what these tests touch of verl and TRL needs this much, and nothing may change what .venv has.
PEERS := verl==0.9.1 trl==1.16.0 codetiming==1.4.0 tensordict==0.15.3 accelerate==1.15.0 datasets==5.2.0 pyarrow pandas dill multiprocess \
	xxhash torchdata==0.11.0 pylatexenc peft==0.21.2 pyvers cloudpickle orjson importlib-metadata pytz python-dateutil zipp
test-peers: setup ## Losses, gradients and advantages against verl and TRL, in a folder of their own (elsewhere they are skipped)
	@test -e .peers/.installed || { $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target .peers $(PEERS) && \
		rm -rf .peers/tests .peers/scripts && touch .peers/.installed; }
	PYTHONPATH=.peers OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_peers.py

test-night: setup-sglang test-gptq test-peers ## What CI leaves out: GPTQ, random runs, further layouts, whole runs; drafts, the router, p2p and Ray with SGLang servers
	$(BIN)/python -m pytest -m night

test-megatron: setup ## Tests of the Megatron trainer on CPU ranks (about seven minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "megatron and not night"

test-ray: setup-sglang ## Tests of cluster=ray on two Ray nodes of this machine, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "ray and not sglang and not night"

test-recipes: setup-sglang ## Every recipe planned, and run at laptop scale: as it is, with Megatron ranks and SGLang servers, and on two Ray nodes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_recipes.py tests/ray_nodes/test_runs.py -k recipe

BASE ?= HEAD
same: setup-sglang ## Short runs of this tree and of BASE=<commit> leave equal metrics, bit for bit
	$(BIN)/python .ci/same.py $(BASE)

lock: setup ## Compile constraints.txt and constraints-gpu.txt anew (UPGRADE=--upgrade: the newest versions that fit)
	$(BIN)/python .ci/lock.py $(UPGRADE)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## The site of docs/, as build/site; warnings are errors
	$(BIN)/uv pip install -q --python $(BIN)/python -c $(LOCK) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q --strict --clean

format: setup ## Format the tree
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Every benchmark that runs on this machine; prints ratios
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

clean: ## Remove caches (outputs/ and .venv stay)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build
