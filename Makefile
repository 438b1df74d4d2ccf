# Every target makes the environment it needs. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
unexport VIRTUAL_ENV

PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.installed
BUF_VERSION := 1.75.0
BUF := npx --yes --loglevel=error @bufbuild/buf@$(BUF_VERSION)
ARGS ?=

.PHONY: help env demo bench routerbench parity test test-long lint format protos protos-baseline node constraints wheel edge-versions aarch64-wheels aarch64 webgpu tensorrt clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(ENV)  ## make .venv, or bring it up to date

$(ENV): pyproject.toml constraints.txt export/command.py .ci/environment
	@PYTHON="$(PYTHON)" .ci/environment
	@touch $@

demo: $(ENV)  ## both processes on loopback, a dozen prompts, pictures in demo-out/
	@$(BIN)/python deploy/demo $(ARGS)

bench: $(ENV)  ## the table of numbers, as ratios measured in one run, in bench-out/
	@$(BIN)/python deploy/bench $(ARGS)

routerbench: $(ENV)  ## compare routers on the shipped outcomes, report in routerbench-out/
	@$(BIN)/edge-export routerbench $(ARGS)

# A file's tests stay together, as they share what was made for them; a process wants up to a gigabyte.
test: $(ENV)  ## run the tests, a process a core; ARGS="-k quota" runs some of them, ARGS="-n 0" one by one
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-long: $(ENV)  ## the tests of what stays in memory and of killed pulls, at full length: 1,000 cancellations, 200 unloads
	@ROUTET2I_CANCELLATIONS=1000 ROUTET2I_CYCLES=200 ROUTET2I_KILLS=50 $(BIN)/python -m pytest \
	  tests/edge_agent/test_pull.py tests/edge_agent/test_resident.py -k "memory or killed" $(ARGS)

parity: $(ENV)  ## measure pixels against diffusers, class by scheduler, and write docs/parity.md
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.export.parity  # threads cost more than so small models save

lint: $(ENV) node  ## ruff, mypy --strict, buf lint, buf breaking
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BUF) lint
	$(BUF) breaking --against protos/baseline.binpb

format: $(ENV)  ## let ruff sort imports and lay out the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

protos: $(ENV)  ## generate the Python code of the .proto files
	$(BIN)/python protos/generate.py

protos-baseline: node  ## after a release: what later changes of the .proto files are compared with
	$(BUF) build -o protos/baseline.binpb --exclude-source-info

node:
	@npx --version >/dev/null 2>&1 || { echo "buf comes from npm: install Node.js 18 or newer (Debian: apt-get install npm)"; exit 1; }

# torch names the CUDA packages that it wants itself; naming them here too would clash with its other builds.
constraints: $(ENV)  ## resolve constraints.txt anew, for Python 3.10 to 3.14
	@uv=$$(uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/uv); \
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  UV_FIND_LINKS= "$$uv" pip compile --quiet --universal --python-version 3.10 --all-extras --upgrade \
	    --no-annotate --no-header pyproject.toml | grep -vE '^(nvidia|cuda|triton)'; } > constraints.new \
	&& mv constraints.new constraints.txt

wheel: $(ENV)  ## build the wheels into dist/: edge and cloud server, and the cloud's starter model
	rm -f dist/routet2i*.whl
	$(BIN)/python -m hatchling build -t wheel
	cd deploy/cloud-starter && ../../$(BIN)/python -m hatchling build -t wheel -d ../../dist

edge-versions: $(ENV)  ## on Linux: install the edge alone on Python 3.10 to 3.14, with the newest packages and the oldest, and route a prompt
	@.ci/edge-versions

aarch64-wheels: $(ENV)  ## check that the edge installs on aarch64 without compiling, on Python 3.10 and 3.12
	@.ci/aarch64-wheels

aarch64: $(ENV)  ## the edge on an emulated aarch64 beside the one here: decisions and pictures have to agree
	@$(BIN)/python deploy/elsewhere aarch64 $(ARGS)

webgpu: $(ENV)  ## the edge on a GPU in software, by WebGPU, beside the CPU here: the same has to agree
	@$(BIN)/python deploy/elsewhere webgpu $(ARGS)

tensorrt: $(ENV)  ## compile the starter, or ARGS="BUNDLE", for TensorRT, without a GPU: is it taken whole?
	@$(BIN)/python deploy/tensorrt $(ARGS)

clean:  ## remove what building, testing and the demo wrote; .venv stays
	rm -rf build dist *.egg-info demo-out bench-out routerbench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
