"""Ranks for tests: forked processes with a gloo group, in 0.1 s instead of the seconds a fresh interpreter takes."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics  # noqa: F401  once here, not once in every forked rank
import torchvision.models  # noqa: F401

from lockstep.checkpoint import dcp
from lockstep.config.compose import compose
from lockstep.config.declared import read_config
from lockstep.config.run_directory import freeze
from lockstep.config.schema import Config, to_yaml
from lockstep.distributed.process_group import World, join_process_group
from lockstep.launch.validate import validate
from lockstep.launch.worker import carry_out
from lockstep.recipe import Recipe
from lockstep.run import Run
from tests.helpers import warm_interpreter as warm
from tests.helpers.warm_interpreter import ROOT


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `function(world, *args)` on `world_size` forked ranks; return what each returned, in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is the message) or was still running after `timeout` seconds
            (the message names it).
    """
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, f"{folder}/store", timeout, answers, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world_size:
                try:
                    rank, error, value = answers.get(timeout=0.2)
                except queue.Empty:
                    silent = [r for r, p in enumerate(ranks) if not p.is_alive() and r not in results and p.exitcode]
                    assert not silent, f"ranks {silent} died without a word"
                    missing = [r for r in range(world_size) if r not in results]
                    assert time.monotonic() < deadline, f"ranks {missing} were still running after {timeout} s"
                    continue
                assert error is None, f"rank {rank} raised\n{error}"
                results[rank] = pickle.loads(value)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def renew_threads() -> None:
    """To be called first of all in a forked process: its copy of torch's thread pool is dead, and is replaced at the
    first use; two threads of backward that come to it at once would abort the process ("Invalid thread pool!")."""
    torch.set_num_threads(1)


def _rank(function: Any, rank: int, world_size: int, store: str, timeout: float, answers: Any, args: Any) -> None:
    renew_threads()
    try:
        world = join_process_group(
            dist.FileStore(store, world_size),
            rank,
            world_size,
            device="cpu",
            backend="gloo",
            timeout_seconds=timeout,
            threads=1,
        )
        answer = (rank, None, pickle.dumps(function(world, *args)))
    except BaseException:
        answer = (rank, traceback.format_exc(), b"")
    answers.put(answer)
    answers.close()
    answers.join_thread()
    os._exit(0)


def compose_config(recipe: Recipe, *overrides: str) -> Config:
    """The config that `python -m recipes.NAME OVERRIDES` would compose."""
    found: list[Config] = []
    before = sys.argv
    sys.argv = [recipe.name, *overrides]
    try:
        compose(recipe, found.append)
    finally:
        sys.argv = before
    return found[0]


def train(recipe: Recipe, out: Path, world_size: int, *overrides: str, timeout: float = 120) -> dict[str, torch.Tensor]:
    """Train a recipe on forked ranks; return the weights it exported. Its files are in `out`."""
    execute(recipe, out, world_size, *overrides, timeout=timeout)
    return torch.load(out / "model.pt", weights_only=True)


def execute(recipe: Recipe, out: Path, world_size: int, *overrides: str, timeout: float = 120) -> None:
    """Run a recipe or a tool on forked ranks."""
    preload(recipe)
    config = compose_config(recipe, f"out={out}", *overrides)
    validate(config, recipe, world_size)
    run_ranks(_train, world_size, recipe.target, to_yaml(config), str(freeze(config, recipe.name)), timeout=timeout)


def preload(recipe: Recipe) -> None:
    """Load the package that a recipe needs once here, not once in every forked rank."""
    if recipe.needs:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for its device when it is imported
        importlib.import_module({"lightning": "lightning.pytorch"}.get(recipe.needs, recipe.needs))


def _train(world: World, target: str, config: str, out: str) -> None:
    recipe = importlib.import_module(target).train
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    carry_out(recipe, Run(recipe.name, read_config(recipe, config), world, Path(out)))


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


def verify_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a run of recipes.verify."""
    found: list[dict[str, Any]] = json.loads((out / "verify.json").read_text())["rows"]
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what another run need not have: its speed and memory."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("peak_memory_bytes", "mfu")
    return [
        {name: value for name, value in line.items() if name not in clock and not name.endswith("_per_second")}
        for line in found
    ]


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To the last bit."""
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint: weights, buffers, optimizer state, every rank's generators, an engine's tensors."""
    entries = dcp.tensor_metadata(checkpoint).items()
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    dcp.load_tensors(checkpoint, found, alone=True)
    if (checkpoint / "deepspeed").is_dir():  # in its files each rank has a slice of one long vector
        from lockstep.integrations.deepspeed_files import load_checkpoint

        weights, states = load_checkpoint(checkpoint / "deepspeed")
        return found | weights | tensors_in(states, "deepspeed")
    for file in sorted(checkpoint.glob("*/*")):
        found |= tensors_in(torch.load(file, weights_only=True), f"{file.parent.name}/{file.name}")
    return found


def tensors_in(content: Any, name: str) -> dict[str, torch.Tensor]:
    """All tensors in nested dicts and lists, by the path to them."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else []
    return {path: tensor for key, value in entries for path, tensor in tensors_in(value, f"{name}.{key}").items()}


def command(
    *words: str, cwd: Path | None = None, timeout: float = 120, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` as a user would, from `cwd`; stdout and stderr as text.

    Args:
        fresh: in an interpreter of its own; else in a copy of one that has loaded torch (see `warm_interpreter`).
    """
    variables = clean_environment() | environment
    if not fresh and (quick := warm.interpreter_for([*words], variables)):
        return quick.run([*words], cwd or ROOT, variables, timeout)
    return subprocess.run(
        [sys.executable, *words], cwd=cwd or ROOT, timeout=timeout, capture_output=True, text=True, env=variables
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what would make a rank of a child."""
    mine = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCKSTEP_RUN_DIR"}
    mine |= {"LOCKSTEP_LAUNCHER_PID"}
    return {
        name: value for name, value in os.environ.items() if name not in mine and not name.startswith("TORCHELASTIC_")
    }
