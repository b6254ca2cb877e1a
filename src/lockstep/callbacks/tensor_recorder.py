"""`record_tensors=N`: what every layer computes in the first N steps, into tensors/, for recipes.diff.

Of each layer's call a rank keeps what goes in and what comes out, and in backward the gradients of both; of each step
the loss, every parameter's gradient, and weights and buffers after the update. It keeps its own part of each, with what
tells where that part belongs: lockstep/verify/recording.py puts whole tensors together.

Imported only where it is asked for. A run without it is not hooked in any way.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.config.schema import Config
from lockstep.data.batch import tree_tensors
from lockstep.distributed.dtensor import full_tensor, is_sharded
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.utils.files import save_atomically
from lockstep.utils.text import count

TENSORS_FOLDER = "tensors"  # in the run directory
INPUT, OUTPUT = "input", "output"
CallEvent = tuple[str, int, str, int]  # layer, its call within a forward, INPUT or OUTPUT, which of its tensors
Calls = dict[CallEvent, Any]


def recorded_file(out: Path, step: int, rank: int) -> Path:
    """Where a rank's part of a step is."""
    return out / TENSORS_FOLDER / f"step-{step}-rank-{rank}.pt"


class TensorRecorder(Callback):
    """Keeps the tensors of the steps 1…`steps` on the CPU until each step's end, and writes them then.

    Attributes:
        distorts_time: as long as it records.
    """

    def __init__(self, steps: int, dims: ParallelDims) -> None:
        self._steps, self._dims, self._on = steps, dims, False
        self._handles: list[Any] = []

    @property
    def distorts_time(self) -> bool:  # type: ignore[override]
        return self._on

    def on_train_begin(self, context: CallbackContext) -> None:
        if context.step >= self._steps:
            return
        (context.out / TENSORS_FOLDER).mkdir(exist_ok=True)
        self._context, self._thread = context, threading.get_ident()
        for name, module in context.module.named_modules():
            # A layer that overwrites its input could not do so with a view of it.
            view = not getattr(module, "inplace", False)
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, name, view)),
                module.register_forward_hook(partial(self._leave, name)),
            ]
        self._about = layout(context.config, self._dims) | {
            "recipe": context.recipe,
            "kinds": {name: type(module).__name__ for name, module in context.module.named_modules()},
            "parameters": list(context.parameter_names),
        }
        self._start = self._weights()
        context.gradients.before_update(self._before_update)
        recorded = f"recorded: tensors of {count(self._steps, 'step')}"
        context.note(f"{recorded}; python -m recipes.diff {context.out.name} OTHER", recorded_steps=self._steps)

    def on_step_begin(self, context: CallbackContext) -> None:
        self._on = context.step < self._steps
        self._forward: Calls = {}  # with the number of a layer's call in this step
        self._backward: Calls = {}
        self._made: dict[str, int] = defaultdict(int)
        self._open: list[int] = []
        self._gradients: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._pieces = 0
        self._scale = gradient_scale(context.config, self._dims) / context.loss_scaling.get("loss_scale", 1.0)

    def on_loss(
        self, context: CallbackContext, loss: Tensor, weight: float | Tensor, scalars: dict[str, float | Tensor]
    ) -> None:
        if self._on:
            self._pieces += 1
            self._losses.append((loss.detach().double() * weight).cpu())

    def on_step_end(self, context: CallbackContext) -> None:
        if not self._on:
            return
        pieces = max(1, self._pieces) * context.config.pipeline_micro_batches
        content = {
            "about": self._about | {"gradient_scale": self._scale},
            "forward": in_forwards(self._forward, self._made, pieces),
            "backward": in_forwards(self._backward, self._made, pieces),
            "loss": torch.stack(self._losses).sum() if self._losses else None,
            "gradients": self._gradients,
            "start": self._start,
            "weights": self._weights(),
            "buffers": {name: each.detach().cpu().clone() for name, each in context.module.named_buffers()},
        }
        save_atomically(recorded_file(context.out, context.step, context.rank), content)
        self._start = {}
        if context.step == self._steps or context.step == context.total_steps:
            self._on = False
            for handle in self._handles:
                handle.remove()

    def _looks(self) -> bool:
        """Whether a forward is one of the step's: no evaluation, no second one of a block in backward, no replica's."""
        mine = threading.get_ident() == self._thread and torch._C._current_graph_task_id() == -1
        return self._on and mine and torch.is_grad_enabled()

    def _enter(self, name: str, view: bool, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not self._looks():
            return None
        call = self._made[name]
        self._made[name] += 1
        self._open.append(call)
        given = list(inputs)
        for index, tensor in enumerate(inputs):
            if isinstance(tensor, Tensor):
                self._keep(self._forward, (name, call, INPUT, index), tensor)
                if view and tensor.requires_grad:  # a view, so that its gradient is this layer's alone
                    given[index] = tensor.view_as(tensor)
                    given[index].register_hook(partial(self._keep, self._backward, (name, call, INPUT, index)))
        return tuple(given)

    def _leave(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if not self._looks() or not self._open:
            return
        call = self._open.pop()
        for index, tensor in enumerate(tree_tensors(outputs)):
            self._keep(self._forward, (name, call, OUTPUT, index), tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._keep, self._backward, (name, call, OUTPUT, index)))

    @torch.no_grad()
    def _keep(self, where: Calls, event: CallEvent, tensor: Tensor) -> None:
        if self._on:
            where[event] = piece(tensor)

    def _before_update(self) -> None:
        if not self._on or self._gradients:
            return
        context = self._context
        for name, parameter in context.gradients.parameters.items():
            gradient = context.gradients.full_gradient(parameter, context.device)
            if gradient is not None and (not is_sharded(parameter) or is_first(parameter)):
                self._gradients[name] = gradient.detach().cpu().clone()

    def _weights(self) -> dict[str, Tensor]:
        """Whole weights; a sharded one on the first of the ranks that share it, who put it together."""
        found = {}
        for name, parameter in self._context.module.named_parameters():
            whole = full_tensor(parameter.detach(), self._context.device)
            if not is_sharded(parameter) or is_first(parameter):
                found[name] = whole.cpu().clone()
        return found


def gradient_scale(config: Config, dims: ParallelDims) -> float:
    """What makes of a rank's gradients in backward those of the mean loss over the global batch."""
    parts = dims.shards * (dims.model_parallel_size if dims.whole else 1)
    return 1 / (parts * (config.pipeline_micro_batches if dims.in_stages else 1))


def layout(config: Config, dims: ParallelDims) -> dict[str, Any]:
    """What tells where a rank's tensors belong, and what they can be compared with."""
    return {
        "precision": config.precision,
        "global_batch_size": config.global_batch_size,
        "shards": dims.shards,
        "shard": dims.shard,
        "size": dims.model_parallel_size,
        "place": dims.rank % dims.model_parallel_size,
        "stages": dims.in_stages,
        "sequences": getattr(config, "by", "") if dims.whole else "",
        "torch": str(torch.__version__),
    }


def is_first(tensor: Tensor) -> bool:
    """Whether this rank is the first of those that share a DTensor."""
    return not any(cast(Any, tensor).device_mesh.get_coordinate())


def piece(tensor: Tensor) -> Any:
    """A copy of a tensor on the CPU; of a DTensor its shard, as (shard, [(dim it is cut along, place), …], is an addend)."""
    if not is_sharded(tensor):
        return tensor.detach().cpu().clone()
    sharded = cast(Any, tensor.detach())
    places = list(zip(sharded.placements, sharded.device_mesh.get_coordinate(), strict=True))
    cuts = [(int(each.dim), int(place)) for each, place in places if each.is_shard()]
    return sharded.to_local().cpu().clone(), cuts, any(each.is_partial() for each, _ in places)


def in_forwards(calls: Calls, made: dict[str, int], pieces: int) -> dict[CallEvent, list[Any]]:
    """What was kept by the number of a layer's call in a step, by that in a forward: a list over the micro-batches.

    Args:
        calls: in the order in which they came.
        made: calls of each layer in the step. A pipeline of torch's begins with a forward of memory that was never filled;
            so what is more than a multiple of `pieces` is left out, from the front.
    """
    found: dict[CallEvent, dict[int, Any]] = {}
    for (name, call, what, index), tensor in calls.items():
        each = max(1, made[name] // pieces)
        spare = made[name] - each * min(pieces, made[name])
        if call >= spare:
            found.setdefault((name, (call - spare) % each, what, index), {})[call] = tensor
    return {event: [tensor for _, tensor in sorted(tensors.items())] for event, tensors in found.items()}
