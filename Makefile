# Every target installs what it needs, the first time and only then. One line per stage; VERBOSE=1 shows all output.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
CACHE := $(or $(QLORA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qlora-operator)
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
VENV := .venv
PYTHON := $(VENV)/bin/python
DEVCLUSTER := $(PYTHON) -m devcluster
PYTEST := $(PYTHON) -m pytest -rfEs --durations=15
# Processes that test the trainer at the same time: `make test WORKERS=8`. Each takes a core and up to 4 GB of memory.
WORKERS := 2
TOGETHER := --numprocesses=$(WORKERS) --dist=worksteal
# For tests that mostly wait. Those of a file share slow fixtures, such as a control plane.
BY_FILE := --numprocesses=3 --dist=loadfile
export SELECTION ?= -m 'not slow'
export PREPARE ?=
export PODS ?=
# Random lives of jobs, which cost half as much as all other unit tests: for `make test`, not for `make check`.
SIMULATION := tests/unit/qlora_operator/simulation
# What each suite has cost and skipped.
SPENT := $(CACHE)/spent
# Targets at the same time: the others go on if one fails, and all after Ctrl-C end before make does.
BESIDE = $(MAKE) --no-print-directory --keep-going --jobs=3
CHECKS = $(BESIDE) --output-sync=target check-types check-text check-units

# Installers print to the log file that devcluster uses too (console.py), which is shown when they fail.
LOG := $(CACHE)/build.log
QUIETLY := $(if $(VERBOSE),,>> $(LOG) 2>&1 || { tail --lines=40 $(LOG); exit 1; })
export VERBOSE

# The environments of the clients that fine-tune through the door, by their versions.
CLIENTS = $(CACHE)/clients-$(shell cat tests/door/clients/* | sha256sum | cut -c 1-12)

# The environment of the server that adapters are tested with, by the versions in it.
SERVING = $(CACHE)/serving-$(shell cat tests/serving/*.txt | sha256sum | cut -c 1-12)

export UV_PYTHON_DOWNLOADS := never
# Once, at the installation: the tests start the trainer hundreds of times, also where Python may write no bytecode.
export UV_COMPILE_BYTECODE := 1
export QLORA_CACHE := $(CACHE)
# As in the trainer (process.py): threads that wait must not keep the cores from the cluster for long.
export GOMP_SPINCOUNT := 20000

ifeq ($(MAKELEVEL),0)
.NOTPARALLEL:
endif

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(VENV)/.synced ## Fine-tune a real model on a real Kubernetes (CLUSTER=current: on your own)
	@$(PYTHON) -m examples.demo $(if $(CLUSTER),--cluster $(CLUSTER)) $(DEMO_OPTIONS)

.PHONY: walk
walk: $(VENV)/.synced ## Record in docs/walk.md what a newcomer types, from installation to removal, on the embedded Kubernetes; refused if others have jobs there
	@$(PYTHON) -m examples.walk $(WALK_OPTIONS)

.PHONY: test
test: no-cluster suites ## Check, and run the suites of every change: 20 minutes on two cores when all is built

.PHONY: test-cluster
test-cluster: no-cluster test-tools ## Run the tests that need pods or images, but the slowest: 25 minutes, when all is built
	@rm -rf $(SPENT)
	failed=0
	$(PYTEST) $(SELECTION) --spent=$(SPENT)/pods.json tests/cluster || failed=1
	$(PYTHON) -m tests.suites --no-limits $(SPENT) || failed=1
	exit $$failed

.PHONY: test-all
test-all: SELECTION := --hypothesis-profile=explore
test-all: PREPARE := --slow
test-all: PODS := tests/cluster
test-all: LIMITS := --no-limits
test-all: no-cluster test-tools types suites fuzz mutants demo ## Run everything: all types, every test, fuzzing, the mutants, the demo

# Tests delete all work on the embedded cluster: this fails if a contributor has started it, and stops one that tests
# have left.
.PHONY: no-cluster
no-cluster: $(VENV)/.synced
	@$(DEVCLUSTER) down --for-tests

.PHONY: suites
suites: $(VENV)/.synced
	@$(DEVCLUSTER) packages
	rm -rf $(SPENT)
	$(CHECKS)
	failed=0
	$(BESIDE) suite-trainer suite-api suite-cluster || failed=1
	$(PYTHON) -m tests.suites $(LIMITS) $(SPENT) || failed=1
	exit $$failed

.PHONY: suite-trainer
suite-trainer:
	@$(DEVCLUSTER) build versitygw > $(CACHE)/versitygw.log
	# After Ctrl-C pytest reports and exits, which the shell takes for a failure, and would start the next one.
	trap 'exit 130' INT
	failed=0
	# One thread each, as the processes share the cores.
	OMP_NUM_THREADS=1 $(PYTEST) $(TOGETHER) $(SELECTION) --spent=$(SPENT)/trainer.json $(SIMULATION) tests/devcluster tests/commands tests/trainer || failed=1
	# In a process of their own: the tests of the trainer hide the GPUs from theirs.
	$(PYTEST) $(SELECTION) --spent=$(SPENT)/gpu.json tests/gpu || failed=1
	exit $$failed

# These two mostly wait, so that they run beside the trainer's, and print when they have ended.
.PHONY: suite-api
suite-api:
	@$(DEVCLUSTER) build etcd kubectl kube-apiserver kube-controller-manager helm > $(CACHE)/api.log
	failed=0
	$(PYTEST) $(BY_FILE) $(SELECTION) --spent=$(SPENT)/api.json tests/api > $(CACHE)/api.log 2>&1 || failed=1
	cat $(CACHE)/api.log
	exit $$failed

# Programs and images are built beside the suites that do without them, which have precedence.
.PHONY: suite-cluster
suite-cluster:
	@echo "Programs and images for the pods: see $(CACHE)/prepare.log"
	nice --adjustment=10 $(DEVCLUSTER) prepare $(PREPARE) > $(CACHE)/prepare.log 2>&1 || { tail --lines=40 $(CACHE)/prepare.log; exit 1; }
	failed=0
	$(PYTEST) $(SELECTION) --spent=$(SPENT)/cluster.json $(or $(PODS),tests/cluster/test_life.py) > $(CACHE)/cluster.log 2>&1 || failed=1
	cat $(CACHE)/cluster.log
	exit $$failed

.PHONY: test-tools
test-tools: $(VENV)/.synced ## Install and build what the tests need, which install nothing themselves
	@$(DEVCLUSTER) prepare $(PREPARE)

.PHONY: test-gpu
test-gpu: $(VENV)/.synced ## Run the tests that need a GPU; without one they are skipped, with the reason. IMAGE=…: with that trainer
	@$(if $(IMAGE),QLORA_TRAINER_IMAGE=$(IMAGE) )$(PYTEST) --timeout=900 tests/gpu

.PHONY: test-serving
test-serving: $(VENV)/.synced ## Run the tests with a real vLLM, in an environment of its own: seven minutes, and 6 GB the first time
	@[ -e $(SERVING)/.complete ] || { echo "Installing vLLM (6 GB; once)" && rm -rf $(CACHE)/serving-* && $(UV) venv --quiet --python $(PYTHON) $(SERVING) && \
	  $(UV) pip install --quiet --python $(SERVING)/bin/python --override tests/serving/overrides.txt \
	  --requirements tests/serving/requirements.txt && touch $(SERVING)/.complete; }
	$(UV) pip install --quiet --python $(SERVING)/bin/python --reinstall-package qlora-operator '.[vllm]' $(QUIETLY)
	QLORA_VLLM_PYTHON=$(SERVING)/bin/python $(PYTEST) tests/serving

.PHONY: test-door
test-door: $(VENV)/.synced ## Run the door's tests with unmodified clients of OpenAI's API, each in its own environment: two minutes
	@[ -e $(CLIENTS)/.complete ] || { echo "Installing the clients (1 GB; once)" && rm -rf $(CACHE)/clients-* && mkdir -p $(CLIENTS)/node; \
	  for file in tests/door/clients/*.txt; do where=$(CLIENTS)/$$(basename $$file .txt); \
	    $(UV) venv --quiet --python $(PYTHON) $$where && $(UV) pip install --quiet --python $$where/bin/python --requirements $$file; done; \
	  cp tests/door/clients/package.json $(CLIENTS)/node && npm install --silent --no-fund --no-audit --prefix $(CLIENTS)/node && touch $(CLIENTS)/.complete; }
	$(DEVCLUSTER) build etcd kubectl kube-apiserver helm > /dev/null
	QLORA_DOOR_CLIENTS=$(CLIENTS) $(PYTEST) tests/door

.PHONY: fuzz
fuzz: $(VENV)/.synced ## Fuzz every parser for SECONDS (10) each; inputs that break one are kept in fuzz-crashes/
	@$(PYTHON) -m tests.fuzz $(TARGETS) --seconds $(or $(SECONDS),10)

.PHONY: mutants
mutants: $(VENV)/.synced ## Put known defects back into the code: each must fail a test. SAMPLE=60 SEED=1: random defects, and the rate
	@$(PYTHON) -m tests.mutants $(if $(SAMPLE),--sample $(SAMPLE) --seed $(or $(SEED),1))

.PHONY: check
check: $(VENV)/.synced ## Lint, types, import rules, declared dependencies, words, generated files, unit tests without random lives: a minute
	@$(CHECKS)

.PHONY: check-types
check-types:
	@$(VENV)/bin/mypy

.PHONY: check-text
check-text:
	@$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/deptry crds cli door operator serving trainer_image
	$(VENV)/bin/deptry --ignore DEP002,DEP004 benchmarks devcluster docs examples gitops helm release tests
	$(DEVCLUSTER) build vale > /dev/null
	$(PYTHON) -m docs.words

.PHONY: check-units
check-units:
	@$(PYTHON) -m pytest -q -rfEs $(TOGETHER) $(SELECTION) --spent=$(SPENT)/unit.json tests/unit --ignore=$(SIMULATION)

.PHONY: words
words: $(VENV)/.synced ## List where text breaks the rules of docs/styles, with the rates: all of it, or IN=FOLDER
	@$(DEVCLUSTER) build vale > /dev/null
	$(PYTHON) -m docs.words --places $(IN)

.PHONY: types
types: $(VENV)/.synced ## Check the trainer against the types of PyTorch and transformers too: a minute
	@$(VENV)/bin/mypy --config-file trainer_image/mypy-followed.toml

.PHONY: benchmarks
benchmarks: $(VENV)/.synced-benchmarks ## Compare the trainer with TRL and others: 40 minutes on an idle machine
	@$(PYTHON) -m benchmarks

.PHONY: bench-gpu
bench-gpu: $(VENV)/.synced ## Compare the trainer with TRL and Unsloth on one GPU: half an hour, and 3 GB of downloads
	@UV=$(UV) $(PYTHON) -m benchmarks.gpu $(BENCH_OPTIONS)

.PHONY: kernels
kernels: $(VENV)/.synced ## Count the GPU work of a block, without a GPU, and write the ceilings and their table: a minute
	@CUDA_VISIBLE_DEVICES= $(PYTHON) -m benchmarks.kernels

.PHONY: docs
docs: $(VENV)/.synced-docs ## Build the documentation into site/; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "site/index.html"

.PHONY: generate
generate: $(VENV)/.synced ## Write the generated files: the CustomResourceDefinition, the chart's schema and README, Argo CD's settings, the reference
	@$(PYTHON) crds/generate.py
	@$(PYTHON) helm/values_schema.py
	@$(PYTHON) -m helm.dashboards
	@$(PYTHON) -m tests.support.chart.golden
	@$(PYTHON) gitops/generate.py
	@$(PYTHON) -m docs.generate
	@$(PYTHON) -m release readme

.PHONY: release
release: $(VENV)/.synced ## Build, sign and verify images and chart in REGISTRY (default: one on this machine)
	@$(PYTHON) -m release make $(if $(REGISTRY),--registry $(REGISTRY)) $(if $(TAG),--tag $(TAG)) $(RELEASE_OPTIONS)

.PHONY: release-check
release-check: $(VENV)/.synced ## Print what a release of this checkout would lack
	@$(PYTHON) -m release check $(if $(TAG),--tag $(TAG))

.PHONY: families
families: $(VENV)/.synced ## Probe all model families of transformers, and write the page of those that are trained
	@CUDA_VISIBLE_DEVICES= $(PYTHON) -m docs.families

.PHONY: images
images: $(VENV)/.synced ## Build the operator's and the trainer's image
	@$(DEVCLUSTER) images

.PHONY: cluster-up
cluster-up: $(VENV)/.synced ## Start the embedded Kubernetes
	@$(DEVCLUSTER) up

.PHONY: cluster-down
cluster-down: $(VENV)/.synced ## Stop the embedded Kubernetes and remove everything that it made
	@$(DEVCLUSTER) down

.PHONY: kubeconfig
kubeconfig: $(VENV)/.synced ## Print the path of the embedded Kubernetes' kubeconfig
	@$(DEVCLUSTER) kubeconfig

$(UV):
	@echo "Installing uv $(UV_VERSION)"
	mkdir -p $(CACHE)
	python3 -c 'import ensurepip' 2> /dev/null || { apt-get update -q && apt-get install -q -y python3-venv; } $(QUIETLY)
	python3 -m venv $(CACHE)/uv-$(UV_VERSION)
	$(CACHE)/uv-$(UV_VERSION)/bin/pip install --disable-pip-version-check uv==$(UV_VERSION) $(QUIETLY)

$(VENV)/.synced: $(UV) pyproject.toml uv.lock
	@echo "Installing the Python environment (6 GB with PyTorch; once)"
	mkdir -p $(CACHE)
	$(UV) sync --locked --extra dev --python '>=3.11,<3.14' $(QUIETLY)
	touch $@

$(VENV)/.synced-benchmarks: $(VENV)/.synced
	@ldconfig -p | grep libtcmalloc_minimal > /dev/null || { apt-get update -q && apt-get install -q -y libtcmalloc-minimal4; } $(QUIETLY)
	$(UV) sync --locked --inexact --extra dev --extra benchmarks --python '>=3.11,<3.14' $(QUIETLY)
	touch $@

# Inexact, as above: one extra does not remove the packages of another target.
$(VENV)/.synced-docs: $(VENV)/.synced
	@$(UV) sync --locked --inexact --extra dev --extra docs --python '>=3.11,<3.14' $(QUIETLY)
	touch $@
