# Everything starts here, and needs nothing before it: `make demo` trains, `make test` proves.
PYTHON ?= python3
# `make test TORCH=2.11 PYTHON=python3.12`: with another torch than constraints.txt has, in an environment of its own.
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
# Three on two cores: much of a test is waiting, for ranks to start, for a cluster. A file's tests stay together.
SIDE_BY_SIDE := --numprocesses=3 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-soak test-all fuzz check format board bench bench-gpu docs docs-serve clean help slurm chromium mpi cc

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Three epochs of small batches, images as they are, and blocks that begin as the identity: what is evaluated gets better
# from the first epoch on. The default, 15 epochs of 96 shifted images, takes a minute and gets no further.
demo: $(VENV)/installed  ## train ResNet-18 on real digits with two ranks, half a minute
	@$(BIN)/python -m recipes.ddp epochs=3 global_batch_size=48 data.augment=false model.init=zero_residual
	@echo
	@echo "  is it the same training?   $(BIN)/python -m recipes.verify recipes=[ddp,fsdp]"
	@echo "  your own model and data    $(BIN)/python -m recipes.ddp task=examples/tabular.py:Diabetes global_batch_size=38"
	@echo "  every recipe and tool      $(BIN)/python -m recipes"

test: $(VENV)/installed slurm chromium mpi cc  ## at least one test of everything, in minutes: no network, no GPU needed
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow and not soak"

test-slow: $(VENV)/installed slurm chromium mpi cc  ## the other tests: about three quarters of an hour
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "slow and not soak"

test-soak: $(VENV)/installed slurm chromium mpi cc  ## whole trainings, every recipe proven by the command, long series of kills
	$(BIN)/pytest $(SIDE_BY_SIDE) --numprocesses=2 -m soak

test-all: $(VENV)/installed slurm chromium mpi cc  ## all three
	$(BIN)/pytest $(SIDE_BY_SIDE)

N ?= 100
SEED ?= 0
VARIANTS ?= 4
JOBS ?= 3
fuzz: $(VENV)/installed  ## N runs killed at random, each of which must end with the same bits (N=100 SEED=0 VARIANTS=4)
	$(BIN)/python -m tests.helpers.fuzz --runs $(N) --seed $(SEED) --variants $(VARIANTS) --jobs $(JOBS) --record

check: $(VENV)/installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed  ## put the code into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

board: $(VENV)/installed  ## TensorBoard on all runs in outputs/ that were started with logger=tensorboard
	@$(BIN)/tensorboard --logdir outputs

bench: $(VENV)/installed  ## the benchmarks, as one table of paired ratios
	$(BIN)/python -m benchmarks

bench-gpu: $(VENV)/installed  ## ResNet-50 on one GPU, beside a bare loop and the device's own rates; 8 minutes
	$(BIN)/python -m benchmarks.gpu

docs: $(VENV)/installed  ## build the pages of docs/ into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/installed  ## the same on http://127.0.0.1:8000, built again when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# $(call need,COMMAND,PACKAGES): Debian's packages, where the command is not there and root may install them.
need = command -v $(1) >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	(apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(2))

slurm:  # a real Slurm for the tests that run on one (slurm/box); nothing of it is started
	@$(call need,slurmctld,slurm-wlm)

chromium:  # a browser for the test that looks at recipes.compare's report; it is given no network
	@command -v google-chrome >/dev/null || $(call need,chromium,chromium)

mpi:  # Open MPI's mpirun, for the test that starts ranks with it
	@$(call need,mpirun,openmpi-bin)

cc:  # a C compiler for the emulated GPUs; the tests that need one fail without it, and say so
	@$(call need,cc,gcc libc6-dev)

clean:  ## remove the environment and all runs
	rm -rf .venv .venv-torch-* outputs

# What depends on torch's version is left out of the pins for another torch: torchvision, triton, CUDA's packages.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch with CUDA is 5 GB; a few minutes)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || (apt-get install -y -q python3-venv && $(PYTHON) -m venv $(VENV))
	@grep -vE '$(if $(TORCH),^(torch|torchvision|triton|nvidia-.*|cuda-.*)==,^$$)' constraints.txt > $(VENV)/pins.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VENV)/pins.txt --editable '.[dev]' \
		$(if $(TORCH),'torch==$(TORCH).*')
	@touch $@
