# Everything starts here, and needs nothing before it: `make demo` trains, `make test` proves.
PYTHON ?= python3
BIN := .venv/bin
# Much of a test is waiting, for ranks to start, for a cluster. A file's tests stay together.
SIDE_BY_SIDE := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-soak test-all fuzz check format board bench bench-gpu clean help slurm chromium mpi cc

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/installed  ## train ResNet-18 on real digits with two ranks, about a minute
	@$(BIN)/python -m recipes.ddp

test: .venv/installed slurm chromium mpi cc  ## at least one test of everything, in minutes: no network, no GPU needed
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow and not soak"

test-slow: .venv/installed slurm chromium mpi cc  ## the other tests, three at a time, for clusters mostly wait: over half an hour
	$(BIN)/pytest $(SIDE_BY_SIDE) --numprocesses=3 -m slow

test-soak: .venv/installed slurm chromium mpi cc  ## whole trainings, every recipe proven by the command, long series of kills
	$(BIN)/pytest $(SIDE_BY_SIDE) -m soak

test-all: .venv/installed slurm chromium mpi cc  ## all three
	$(BIN)/pytest $(SIDE_BY_SIDE)

N ?= 100
SEED ?= 0
fuzz: .venv/installed  ## N runs killed at random, each of which must end with the same bits (N=100 SEED=0)
	$(BIN)/python -m tests.helpers.fuzz --runs $(N) --seed $(SEED)

check: .venv/installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed  ## put the code into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

board: .venv/installed  ## TensorBoard on all runs in outputs/ that were started with logger=tensorboard
	@$(BIN)/tensorboard --logdir outputs

bench: .venv/installed  ## the benchmarks, as one table of paired ratios
	$(BIN)/python -m benchmarks

bench-gpu: .venv/installed  ## ResNet-50 on one GPU, beside a bare loop and the device's own rates; 8 minutes
	$(BIN)/python -m benchmarks.gpu

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
	rm -rf .venv outputs

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (torch with CUDA is 5 GB; a few minutes)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || (apt-get install -y -q python3-venv && $(PYTHON) -m venv .venv)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
