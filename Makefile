# Every target installs what it needs, the first time and only then.
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

export UV_PYTHON_DOWNLOADS := never
export QLORA_CACHE := $(CACHE)
# As in the trainer (process.py): threads that wait must not keep the cores from the cluster for long.
export GOMP_SPINCOUNT := 20000

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(VENV)/.synced ## Fine-tune a real model on a real Kubernetes (CLUSTER=current: on your own)
	@$(PYTHON) -m examples.demo $(if $(CLUSTER),--cluster $(CLUSTER)) $(DEMO_OPTIONS)

.PHONY: test
test: check ## Run every test: unit, trainer, API, cluster
	@$(PYTHON) -m pytest --durations=15 tests/devcluster tests/trainer tests/gpu tests/api tests/cluster

.PHONY: test-gpu
test-gpu: $(VENV)/.synced ## Run the tests that need a GPU; without one each says why it is skipped
	@$(PYTHON) -m pytest -rs tests/gpu

.PHONY: fuzz
fuzz: $(VENV)/.synced ## Fuzz every parser for SECONDS (10) each; what breaks one is kept in fuzz-crashes/
	@$(PYTHON) -m tests.fuzz $(TARGETS) --seconds $(or $(SECONDS),10)

.PHONY: check
check: $(VENV)/.synced ## Lint, types, import rules, generated files, unit tests: seconds
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/deptry crds cli operator trainer_image
	@$(VENV)/bin/deptry --ignore DEP002,DEP004 benchmarks devcluster examples helm tests
	@$(PYTHON) -m pytest -q tests/unit

.PHONY: benchmarks
benchmarks: $(VENV)/.synced-benchmarks ## Compare the trainer with TRL and others: 40 minutes on an idle machine
	@$(PYTHON) -m benchmarks

.PHONY: docs
docs: $(VENV)/.synced-docs ## Build the documentation into site/; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "site/index.html"

.PHONY: generate
generate: $(VENV)/.synced ## Write the generated files: the CustomResourceDefinition, the chart's schema, the reference
	@$(PYTHON) crds/generate.py
	@$(PYTHON) helm/values_schema.py
	@$(PYTHON) docs/generate.py

.PHONY: images
images: $(VENV)/.synced ## Build the operator's and the trainer's image
	@$(DEVCLUSTER) images

.PHONY: cluster-up
cluster-up: $(VENV)/.synced ## Start the embedded Kubernetes
	@$(DEVCLUSTER) up

.PHONY: cluster-down
cluster-down: $(VENV)/.synced ## Stop it and leave nothing behind
	@$(DEVCLUSTER) down

.PHONY: kubeconfig
kubeconfig: $(VENV)/.synced ## Print the path of its kubeconfig
	@$(DEVCLUSTER) kubeconfig

$(UV):
	@echo "Installing uv $(UV_VERSION)"
	@python3 -c 'import ensurepip' 2>/dev/null || { apt-get update -qq; apt-get install -y -qq python3-venv; }
	@python3 -m venv $(CACHE)/uv-$(UV_VERSION)
	@$(CACHE)/uv-$(UV_VERSION)/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.synced: $(UV) pyproject.toml uv.lock
	@echo "Installing the Python environment (6 GB with PyTorch; once)"
	@$(UV) sync --locked --extra dev --python '>=3.11,<3.14'
	@touch $@

$(VENV)/.synced-benchmarks: $(VENV)/.synced
	@ldconfig -p | grep -q libtcmalloc_minimal || { apt-get update -qq; apt-get install -y -qq libtcmalloc-minimal4; }
	@$(UV) sync --locked --inexact --extra dev --extra benchmarks --python '>=3.11,<3.14'
	@touch $@

# Inexact, as above: one extra does not remove what another target has installed.
$(VENV)/.synced-docs: $(VENV)/.synced
	@$(UV) sync --locked --inexact --extra dev --extra docs --python '>=3.11,<3.14'
	@touch $@
