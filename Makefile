# Everything a person types. `make` alone lists it.

FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$each -c '$(FITS)' 2>/dev/null && echo $$each && break; done)
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.installed contracts/.generated
PROTOS := $(shell find protos -name '*.proto' -o -path 'protos/*/*.py')
INSTALL := -m pip --disable-pip-version-check install --quiet --require-hashes -r
LOCKED := $(basename $(wildcard requirements/*.in services/*/requirements.in))
PYTEST ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup up down status logs test lint types bench proto lock clean
.PHONY: images manifests kind-up kind-down kind-test chart-test image-test bench-kind package sbom
MAKEFLAGS += --no-builtin-rules

help: ## list what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make up CONSUL_HTTP_PORT=18500   Consul's web page elsewhere than at port 8500; the other ports follow it"
	@echo "  make up REGISTRY=mdns            no Consul: services find each other by multicast; MDNS_INTERFACE=ADDRESS or all"
	@echo "  make up AGENTS=client            a client agent beside the servers, for the services to register through"
	@echo "  make up DATACENTERS=2            a second datacenter, called where the first has no instance"
	@echo "  make logs NAME=sum-1             one log only"
	@echo "  make test PYTEST='-k freezes'    some tests only"
	@echo "  make test WORKERS=1              one file of tests after the other, where two are too much for the machine"
	@echo "  make kind-test KEEP=1            and keep the cluster, for KIND_CLUSTER=NAME; KIND_PROFILE=small: one node"
	@echo "  make kind-up SMALL=--small       one node, one instance of each service"
	@echo "  KIND_NODE_IMAGE, PYTHON_IMAGE    the images that clusters and services are made of"

setup: $(READY) ## install what the rest needs, into .venv

up: $(READY) ## start three Consul servers and all services, call them, and leave them running
	@$(RUN) deploy.local up

down: $(READY) ## stop what `make up` has started, and only that
	@$(RUN) deploy.local down

status: $(READY) ## show what runs, where, and how it is
	@$(RUN) deploy.local status

logs: $(READY) ## follow the logs of what runs
	@$(RUN) deploy.local logs $(NAME) -f

test: lint types $(VENV)/.py-consul ## lint, check types, and run every test, on Consul servers of their own
	@$(RUN) pytest -p xdist -n $(WORKERS) --dist loadfile $(PYTEST)
	@echo "The registry's contract suite again, on py-consul:"
	@$(VENV)/py-consul/bin/python -m pytest tests/contract/test_registry.py -p no:cacheprovider

lint: $(READY) ## check style: ruff for Python, buf for the contracts
	@$(RUN) ruff check .
	@$(RUN) ruff format --check --quiet . || { echo "ruff format would change files: run $(RUN) ruff format"; exit 1; }
	@cd protos && ../$(VENV)/bin/buf lint

types: $(READY) ## check types: mypy --strict
	@$(RUN) mypy rollcall services deploy protos bench tests

bench: $(READY) ## measure Rollcall against bare gRPC, side by side
	@$(RUN) bench $(BENCH)

images: $(READY) ## build an image of each service, tagged with the chart's version
	@$(RUN) deploy.kind images

manifests: $(READY) ## render deploy/k8s/base and the table of the chart's values from the chart
	@$(RUN) deploy.k8s

kind-up: $(READY) ## bring up everything on a kind cluster, with the gateway and Consul's page forwarded
	@$(RUN) deploy.kind up $(SMALL)

kind-down: $(READY) ## delete that cluster
	@$(RUN) deploy.kind down

chart-test: $(READY) $(VENV)/.checkov ## test the chart and the manifests as they are rendered; needs helm and kubectl
	@$(RUN) pytest tests/chart $(PYTEST)

image-test: $(READY) ## test the images; needs docker
	@$(RUN) pytest tests/images $(PYTEST)

kind-test: $(READY) ## test everything on a kind cluster of its own; needs docker, kind, helm and kubectl
	@$(RUN) pytest tests/kind $(PYTEST)

bench-kind: $(READY) ## measure `dial` beside what Kubernetes has, on a kind cluster of its own
	@$(RUN) bench.kind

package: $(READY) ## make dist/ROLLCALL-VERSION.tgz of the chart
	@helm package deploy/helm/rollcall --destination dist

sbom: images ## list what is in each image, in dist/, as CycloneDX
	@$(RUN) deploy.kind sbom

proto: $(VENV)/.installed ## generate contracts/ from protos/
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python protos/generate.py

lock: ## choose new versions of what all requirements.in ask for (needs uv)
	@for each in $(LOCKED); do uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header $$each.in -o $$each.txt || exit 1; done

clean: ## remove what was installed and generated here; stop what runs first
	@if [ -d .run/processes ] && [ -n "$$(ls .run/processes)" ]; then echo "something may still run: make down first"; exit 1; fi
	rm -rf $(VENV) contracts .run .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.installed: requirements/dev.txt
	@$(or $(PYTHON),false) -c '$(FITS)' 2>/dev/null || { echo "expected Python >= 3.11 with its venv module, found $(or $(PYTHON),none): install it (Debian: apt-get install python3-venv), or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing the locked dependencies into $(VENV) (about half a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(INSTALL) requirements/dev.txt || { echo "the dependencies could not be installed: see above; is the package index reachable?" >&2; exit 1; }
	@touch $@

$(VENV)/.py-consul: $(VENV)/.installed requirements/py-consul.txt
	@echo "Installing py-consul into an environment of its own ..."
	@$(VENV)/bin/python -m venv $(VENV)/py-consul
	@$(VENV)/py-consul/bin/python $(INSTALL) requirements/py-consul.txt
	@touch $@

$(VENV)/.checkov: $(VENV)/.installed requirements/checkov.txt
	@echo "Installing checkov into an environment of its own (about a minute) ..."
	@$(VENV)/bin/python -m venv $(VENV)/checkov
	@$(VENV)/checkov/bin/python $(INSTALL) requirements/checkov.txt
	@touch $@

contracts/.generated: $(VENV)/.installed protos/generate.py $(PROTOS)
	@$(MAKE) --no-print-directory proto
	@touch $@
