"""`memory=report`: what each rank of a run really holds, layer by layer, counted during its first step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lockstep.distributed.collectives import gather_objects
from lockstep.memory.tracker import ENGINE, KINDS, LayerMemory, MemoryTracker, local_bytes, memory_by_layer
from lockstep.utils.text import mebibytes


class MemoryReport:
    """Counts one step of a training as the recipe takes it, sharded or cut as it is.

    Args:
        model: what this rank holds of the model, unwrapped.
        optimizer: what updates it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer, self._ledger = model, optimizer, MemoryTracker(model)
        self._gradients: dict[str, int] = {}

    def start(self) -> None:
        """Begin to count, before the step's first forward."""
        self._handle = self._optimizer.register_step_pre_hook(self._before_update)
        self._ledger.start()

    def stop(self) -> list[LayerMemory]:
        """End it after the update, when the optimizer has its state; what each layer holds."""
        self._ledger.stop()
        self._handle.remove()
        return memory_by_layer(self._model, self._optimizer, self._gradients, self._ledger)

    def _before_update(self, *_: Any) -> None:
        named = {name: local_bytes(parameter.grad) for name, parameter in self._model.named_parameters()}
        if not any(named.values()):  # an engine's vectors have them
            groups = self._optimizer.param_groups
            named = {ENGINE: sum(local_bytes(parameter.grad) for group in groups for parameter in group["params"])}
        self._gradients = named


def everyone(mine: list[LayerMemory], group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
    """What each rank holds, in rank order, as JSON: its layers and their sums. All ranks call it."""
    return gather_objects({"total": sums(mine), "layers": [asdict(layer) for layer in mine]}, group)


def sums(found: Iterable[LayerMemory]) -> dict[str, int]:
    """Bytes over all layers, by kind."""
    found = list(found)
    return {kind: sum(getattr(layer, kind) for layer in found) for kind in KINDS}


def memory_table(found: list[LayerMemory], title: str) -> Table:
    """Layers for people, in MiB."""
    grid = Table(title=title, title_justify="left")
    for column in ("layer", "kind", "output"):
        grid.add_column(column)
    for column in (*KINDS, "all"):
        grid.add_column(column, justify="right")
    for layer in found:
        figures = [getattr(layer, kind) for kind in KINDS]
        shape = " × ".join(map(str, layer.output))
        grid.add_row(layer.name, layer.kind, shape, *(cell(figure) for figure in [*figures, layer.total]))
    total = sums(found)
    grid.add_section()
    grid.add_row("all layers", "", "", *(cell(figure) for figure in [*total.values(), sum(total.values())]))
    return grid


def cell(figure: int) -> str:
    return mebibytes(figure, 2) if figure else ""


def summarize_memory(ranks: list[dict[str, Any]]) -> str:
    """The ranks' sums in the run's summary: `parameters 42.6, 42.6; …`."""
    return "; ".join(f"{kind} {', '.join(mebibytes(rank['total'][kind]) for rank in ranks)}" for kind in KINDS)
