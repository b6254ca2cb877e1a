"""Every operation between two moments of one step, for recipes.diff and recipes.verify: within the layer that differs.

A dispatch mode sees what torch calls, in forward and in backward, and keeps the result of each operation while it is
between the two moments; of a DTensor, this rank's shard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.callbacks.tensor_recorder import OUTPUT, TENSORS_FOLDER, gradient_scale, layout, piece
from lockstep.data.batch import tree_tensors
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.utils.files import save_atomically

ENTERED, LEFT, GRADIENT_IN, GRADIENT_OUT = "entered", "left", "gradient_in", "gradient_out"
Moment = tuple[
    str, str
]  # (layer, ENTERED, LEFT, GRADIENT_IN: that of its output is known, or GRADIENT_OUT: its input's)
FOREIGN = (str(Path(torch.__file__).parent), __file__)  # frames that call an operation for somebody else


@dataclass(frozen=True)
class Stretch:
    """Which operations are looked at: those between two moments of a step.

    Attributes:
        call: which of the times in one forward or backward.
    """

    step: int
    begins: Moment
    ends: Moment
    call: int


def operations_file(out: Path, rank: int) -> Path:
    """Where a rank's operations are."""
    return out / TENSORS_FOLDER / f"operations-rank-{rank}.pt"


class OperationRecorder(Callback):
    """Records the operations of a stretch, into tensors/operations-rank-R.pt."""

    def __init__(self, stretch: Stretch, shards: int | None) -> None:
        self._stretch, self._shards = stretch, shards
        self._times: list[list[tuple[str, str, list[int], str, list[Any]]]] = []  # by time, then in order
        self._inside, self._on, self._pieces = False, False, 0
        self._made: dict[int, int] = {}  # which operation has made a tensor, by the tensor's id
        self._alive: list[Tensor] = []  # so that no id comes twice

    def on_train_begin(self, context: CallbackContext) -> None:
        dims = ParallelDims.of(context.rank, context.world.world_size, context.config, self._shards)
        self._about = layout(context.config, dims) | {"kinds": {}, "recipe": context.recipe}
        self._scale = gradient_scale(context.config, dims)
        for layer in {self._stretch.begins[0], self._stretch.ends[0]}:
            named = dict(context.module.named_modules())
            if layer in named:
                named[layer].register_forward_pre_hook(partial(self._enter, layer))
                named[layer].register_forward_hook(partial(self._leave, layer))

    def on_step_begin(self, context: CallbackContext) -> None:
        if context.step + 1 == self._stretch.step:
            self._on, self._mode = True, OperationWatcher(self._keep)
            self._mode.__enter__()

    def on_loss(self, context: CallbackContext, loss: Tensor, weight: Any, scalars: Any) -> None:
        if self._on:
            self._pieces += 1

    def on_step_end(self, context: CallbackContext) -> None:
        if not self._on:
            return
        self._mode.__exit__(None, None, None)
        self._on = self._inside = False
        scale = self._scale / context.loss_scaling.get("loss_scale", 1.0)
        pieces = max(1, self._pieces) * context.config.pipeline_micro_batches
        each = max(1, len(self._times) // pieces)
        times = self._times[len(self._times) - each * min(pieces, len(self._times)) :][self._stretch.call :: each]
        kept: dict[str, dict[Any, list[Any]]] = {"forward": {}, "backward": {}}
        for time in times:
            for number, (_, _, _, phase, tensors) in enumerate(time):
                for index, tensor in enumerate(tensors):
                    kept[phase].setdefault(("", number, OUTPUT, index), []).append(tensor)
        operations = [tuple(each[:3]) for each in (times[0] if times else [])]
        content = {"about": self._about | {"gradient_scale": scale}, "operations": operations, **kept}
        path = operations_file(context.out, context.rank)
        path.parent.mkdir(exist_ok=True)
        save_atomically(path, content)
        self._alive.clear()

    def _reached(self, layer: str, what: str) -> None:
        if not self._on:
            return
        if (layer, what) == self._stretch.ends:
            self._inside = False
        if (layer, what) == self._stretch.begins:
            self._inside = True
            self._times.append([])
            self._made.clear()

    def _looks(self) -> bool:
        return self._on and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

    def _enter(self, layer: str, module: Any, inputs: tuple[Any, ...]) -> Any:
        if not self._looks():
            return None
        given = list(inputs)
        if (layer, GRADIENT_OUT) in (self._stretch.begins, self._stretch.ends):
            for index, tensor in enumerate(inputs):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    given[index] = tensor.view_as(tensor)
                    given[index].register_hook(lambda gradient: self._reached(layer, GRADIENT_OUT))
        self._reached(layer, ENTERED)
        return tuple(given)

    def _leave(self, layer: str, module: Any, inputs: Any, outputs: Any) -> None:
        if self._looks():
            self._reached(layer, LEFT)
            for tensor in tree_tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._reached(layer, GRADIENT_IN))

    def _keep(self, name: str, arguments: Any, results: Any) -> None:
        """An operation has been called; the mode is off in here."""
        if not self._inside or "empty" in name:  # memory that is yet to be filled
            return
        tensors = [each for each in tree_tensors(results) if each.is_floating_point()]
        if not tensors:
            return
        sources = {self._made[id(each)] for each in tree_tensors(arguments) if id(each) in self._made}
        self._made |= {id(each): len(self._times[-1]) for each in tensors}
        self._alive += tensors
        phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        self._times[-1].append((name, called_from(), sorted(sources), phase, [piece(each) for each in tensors]))


class OperationWatcher(TorchDispatchMode):
    """Calls back after each operation: with its name, its arguments and its results."""

    def __init__(self, call: Callable[[str, Any, Any], None]) -> None:
        super().__init__()
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self._call(str(func.overloadpacket), [args, kwargs or {}], results)
        return results


def called_from() -> str:
    """FILE:LINE of the innermost frame that is not torch's; in backward, the node of the graph."""
    node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
    if node is not None:
        return str(node.name())
    frame: Any = sys._getframe(1)
    while frame and (frame.f_code.co_filename.startswith(FOREIGN) or frame.f_code.co_name == "__torch_function__"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
