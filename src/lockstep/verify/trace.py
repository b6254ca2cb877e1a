"""Runs inside a run: train a recipe for a few steps among the ranks that are there, and keep what a proof compares."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.copies import with_values
from lockstep.config.schema import Config
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.dtensor import full_tensor
from lockstep.distributed.process_group import World
from lockstep.distributed.signals import Listener
from lockstep.run import Run
from lockstep.training.local_gradients import LocalGradients
from lockstep.verify.sample_masks import sample_masks

if TYPE_CHECKING:
    from lockstep.recipe import Recipe


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trace:
    """What a training computed, whole, on rank 0; weights and buffers after the last step, gradients of the first.

    Attributes:
        start: the weights before the first step, where they were asked for.
    """

    losses: list[float]
    gradients: Tensors
    weights: Tensors
    buffers: Tensors
    result: dict[str, Any]
    start: Tensors = field(default_factory=dict)


class FirstGradients(Callback):
    """Keeps the first update's gradients, whole, of the parameters that this rank holds.

    Args:
        begins: whether the weights before it are kept, too.

    Attributes:
        found, start: by the parameters' names.
    """

    def __init__(self, begins: bool = False) -> None:
        self.found: Tensors = {}
        self.start: Tensors = {}
        self._begins = begins

    def on_train_begin(self, context: CallbackContext) -> None:
        if self._begins and not self.start:
            for name, parameter in context.gradients.parameters.items():
                self.start[name] = full_tensor(parameter.detach(), context.device).clone()
        context.gradients.before_update(lambda: self._keep(context.gradients, context.device))

    def _keep(self, gradients: LocalGradients, device: torch.device) -> None:
        if self.found:
            return
        for name, parameter in gradients.parameters.items():
            gradient = gradients.full_gradient(parameter, device)
            if gradient is not None:
                self.found[name] = gradient.detach().clone()


def trace(
    run: Run,
    recipe: Recipe,
    config: Config,
    name: str,
    prepare: Callable[[Run, nn.Module], None] | None = None,
    interrupt: int | None = None,
    looks_on: Sequence[Callback] = (),
    begins: bool = False,
    smooth: bool = False,
    masked: bool = False,
) -> Trace | None:
    """Train a recipe on the ranks of `run`, in a run directory `name` inside its own; the Trace on rank 0, else None.

    A recipe for one rank is trained by every rank, each on the whole batch: redundant, and equally fast.

    Args:
        prepare: called with the model when it has been placed.
        interrupt: the step after which the training ends, and goes on as another run that finds its checkpoint.
        looks_on: further callbacks.
        begins: whether the weights before the first step are kept.
        smooth: whether ReLUs are without a kink.
        masked: whether dropout drops by sample: see sample_masks.py.
    """
    out = run.out / name
    nothing = contextlib.nullcontext()
    with smooth_relu() if smooth else nothing, sample_masks() if masked else nothing:
        first = train_traced(run.world, out, recipe, config, prepare, interrupt, looks_on, run.listener, begins)
    parts, starts = (
        gather_objects({name: tensor.cpu() for name, tensor in tensors.items()}, None)
        for tensors in (first.found, first.start)
    )
    dist.barrier()
    return None if run.world.rank else trace_of(out, recipe, parts, starts)


def train_traced(
    world: World,
    out: Path,
    recipe: Recipe,
    config: Config,
    prepare: Callable[[Run, nn.Module], None] | None = None,
    interrupt: int | None = None,
    looks_on: Sequence[Callback] = (),
    listener: Listener | None = None,
    begins: bool = False,
) -> FirstGradients:
    """Train a recipe among all ranks in the folder `out`: what this rank holds of the first gradients. Else as `trace`."""
    if world.rank == 0:
        (out / "ranks").mkdir(parents=True, exist_ok=True)  # left by a start that was preempted
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    dist.barrier()
    gradients = FirstGradients(begins)
    for values in parts_of(interrupt):
        inner = Run(
            recipe.name,
            with_values(config, values),
            world,
            out,
            shards=recipe.ranks,
            quiet=True,
            listener=listener,
            callbacks=[gradients, *looks_on],
        )
        inner.loop.context.saves = interrupt is not None
        if prepare:
            inner.prepare = partial(prepare, inner)
        recipe(inner)
    return gradients


def trace_of(out: Path, recipe: Recipe, parts: list[Tensors], starts: Sequence[Tensors] = ()) -> Trace:
    """What `train_traced` has left in its folder, and what it returned on each rank; and the weights it began with."""
    whole, start = (
        {name: tensor for part in reversed(each) for name, tensor in part.items()} for each in (parts, starts)
    )
    if recipe.local_updates:
        whole = {name: torch.stack([part[name] for part in parts]).mean(0) for name in whole}
    return trace_left_by(out, whole.keys(), whole, start)


@contextlib.contextmanager
def smooth_relu() -> Iterator[None]:
    """Within it, ReLU and its kin are SiLU, for all threads.

    A number that rounding takes over a ReLU's kink changes a gradient by a thousandth, and a few steps more by a tenth: two
    valid computations part. Without kinks what rounding makes is as small as rounding is.
    """
    kinked = [(functional, name) for name in ("relu", "relu6", "leaky_relu")] + [(torch, "relu"), (Tensor, "relu")]
    before = [getattr(owner, name) for owner, name in kinked]
    for owner, name in kinked:
        setattr(owner, name, lambda x, *args, **kwargs: functional.silu(x))
    try:
        yield
    finally:
        for (owner, name), function in zip(kinked, before, strict=True):
            setattr(owner, name, function)


def parts_of(interrupt: int | None) -> list[dict[str, Any]]:
    """What is set besides in each part of a training: one, or the steps before and after it is cut off."""
    saving: dict[str, Any] = {"checkpoint.every": interrupt, "resume": "auto"}
    return [{}] if interrupt is None else [saving | {"max_steps": interrupt}, saving]


def trace_left_by(out: Path, trained: Collection[str], gradients: Tensors, start: Tensors | None = None) -> Trace:
    """What a run has left in its folder.

    Args:
        trained: names of the parameters that have a gradient; the rest of the state are buffers.
        gradients: those of its first update, which no file holds; empty where they are not known.
    """
    state = torch.load(out / "model.pt", weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Trace(
        losses=[line["loss"] for line in lines if "loss" in line],
        gradients=gradients,
        weights={name: tensor for name, tensor in state.items() if name in trained},
        buffers={name: tensor for name, tensor in state.items() if name not in trained},
        result=json.loads((out / "result.json").read_text(encoding="utf-8")),
        start={name: tensor for name, tensor in (start or {}).items() if name in trained},
    )


def difference(mine: Tensors, theirs: Tensors) -> float:
    """The largest relative difference of a tensor: ‖a − b‖ / ‖b‖, b no smaller than a millionth of all of them.

    Infinite where a name is missing on one side, or a value is not a number.
    """
    if mine.keys() != theirs.keys():
        return float("inf")
    return max(tensor_differences(mine, theirs).values(), default=0.0)


def tensor_differences(mine: Tensors, theirs: Tensors) -> dict[str, float]:
    """The relative difference of each tensor that both have, as `difference` takes it; infinite where their shapes differ."""
    whole = sum(tensor.double().norm().item() ** 2 for tensor in theirs.values()) ** 0.5
    found = {}
    for name, tensor in theirs.items():
        if name in mine and mine[name].shape == tensor.shape:
            length = max(tensor.double().norm().item(), 1e-6 * whole, 1e-30)
            found[name] = ((mine[name].double() - tensor.double()).norm() / length).item()
        elif name in mine:
            found[name] = float("inf")
    return {name: value if value == value else float("inf") for name, value in found.items()}


def way(begin: Tensors, end: Tensors) -> Tensors:
    """How far each weight has come: the weights themselves hide it, as a few steps hardly move them."""
    return {name: end[name].double() - begin[name].double() if name in begin else end[name] for name in end}


def vector_distance(mine: Tensors, theirs: Tensors) -> float:
    """‖a − b‖ / ‖b‖ of all tensors as one vector; infinite where a name or a shape is another one."""
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in theirs):
        return float("inf")
    apart = norm_of(mine[name].double() - theirs[name].double() for name in theirs)
    return 0.0 if apart == 0 else apart / max(norm_of(tensor.double() for tensor in theirs.values()), 1e-30)


def norm_of(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.norm()) ** 2 for tensor in tensors) ** 0.5)


def angle(mine: Tensors, theirs: Tensors) -> float:
    """1 − cosine between two sets of tensors, each as one vector, or the relative difference of their lengths, if that
    is larger: a ReLU that flips in fp32 leaves both small."""
    if mine.keys() != theirs.keys():
        return float("inf")
    if not theirs:
        return 0.0
    a = torch.cat([mine[name].double().flatten() for name in theirs])
    b = torch.cat([tensor.double().flatten() for tensor in theirs.values()])
    if not a.any() and not b.any():
        return 0.0
    return max(abs(1 - (a @ b / (a.norm() * b.norm())).item()), abs(1 - (a.norm() / b.norm()).item()))
