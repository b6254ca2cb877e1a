"""What a finished run leaves, and the first bit in which it differs from an undisturbed one."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.checkpoint.directory import list_checkpoints
from lockstep.config import run_directory
from lockstep.verify.trace import difference
from tests.helpers.fuzz import starts
from tests.helpers.fuzz.plans import Setup
from tests.helpers.harness import tensors_of

LOGGED = ("step", "loss", "lr", "loss_scale", "skipped_steps", "eval_loss", "eval_accuracy", "eval_f1")
LOGGED += ("eval_bits_per_token", "eval_token_accuracy", "eval_error")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """What a finished run left: all of it must be equal."""

    weights: Tensors
    best: Tensors
    log: list[tuple[Any, ...]]
    state: Tensors
    seconds: float


def result_of(out: Path, seconds: float = 0.0) -> Result:
    def weights(name: str) -> Tensors:
        return torch.load(out / name, weights_only=True) if (out / name).exists() else {}

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    log = [tuple(line.get(name) for name in LOGGED) for line in lines]
    listed = list_checkpoints(out / run_directory.CHECKPOINTS)
    return Result(weights("model.pt"), weights("best.pt"), log, tensors_of(listed[0]) if listed else {}, seconds)


def first_difference(mine: Tensors, theirs: Tensors) -> str:
    """The first tensor that is not the same to the last bit; empty: there is none."""
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            return f"{name} is {'missing' if name in theirs else 'more than there should be'}"
        a, b = mine[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        unequal = bits(a) != bits(b)
        if unequal.any():
            largest = (a.double() - b.double()).abs().max().item()
            return f"{name} differs in {int(unequal.sum())} of {unequal.numel()} bytes, by {largest:.3g} at most"
    return ""


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare(found: Result, expected: Result, best: bool) -> str:
    """The first thing in which a run is not the undisturbed one; empty: it is."""
    for number, (mine, theirs) in enumerate(itertools.zip_longest(found.log, expected.log)):
        if mine != theirs:
            return f"metrics.jsonl line {number + 1}: {mine}, not {theirs}; of {', '.join(LOGGED)}"
    # The undisturbed run keeps its best: only then does a checkpoint have what would be exported beside the weights.
    state = {name: tensor for name, tensor in expected.state.items() if best or not name.startswith("whole.")}
    pairs = {"model.pt": (found.weights, expected.weights), "checkpoint": (found.state, state)}
    if best:
        pairs["best.pt"] = found.best, expected.best
    for name, (mine, theirs) in pairs.items():
        if not theirs:
            return f"{name}: the undisturbed run has none"
        if said := first_difference(mine, theirs):
            return f"{name}: {said}"
    return ""


def compare_in_fp64(found: Result, expected: Result, best: bool, tolerance: float = 1e-8) -> str:
    """As `compare`, but for the order in which ranks sum up, and for generators, of which each rank has its own."""
    logs = [
        [value if value is not None else -1 for line in result.log for value in line] for result in (found, expected)
    ]
    if len(logs[0]) != len(logs[1]) or not np.allclose(logs[0], logs[1], rtol=tolerance):
        return f"metrics.jsonl: {found.log}, not {expected.log}; of {', '.join(LOGGED)}"
    states = [{n: t for n, t in result.state.items() if not n.startswith("rng.")} for result in (found, expected)]
    pairs = {"model.pt": (found.weights, expected.weights), "checkpoint": (states[0], states[1])}
    if best:
        pairs["best.pt"] = found.best, expected.best
    off = {name: difference(mine, theirs) for name, (mine, theirs) in pairs.items()}
    return "".join(f"{name} differs by {by:.0e} " for name, by in off.items() if not by <= tolerance)


@lru_cache(maxsize=8)
def reference(setup: Setup) -> Result:
    """What an undisturbed run of these numbers leaves; each of the last few is run once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        saving = ("checkpoint.every=1000", "checkpoint.best=true", "checkpoint.asynchronous=false")
        ended = starts.start(Setup(setup.recipe, setup.ranks, setup.words, saving), out)
        assert ended.codes == [0] * setup.ranks, ended.said
        assert not ended.hung, ended.hung  # it has no exit code then
        return result_of(out, ended.seconds)
