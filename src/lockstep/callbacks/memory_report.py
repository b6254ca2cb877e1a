"""`memory=report`: what each rank of a run really holds, layer by layer, counted during its first step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.table import Table

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.distributed.collectives import gather_objects
from lockstep.memory.tracker import ENGINE, KINDS, LayerMemory, MemoryTracker, local_bytes, memory_by_layer
from lockstep.utils.files import write_json
from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import by_rank, mebibytes


class MemoryReport(Callback):
    """Counts the first step of a start as the recipe takes it, sharded or cut as it is."""

    def __init__(self) -> None:
        self._done = False
        self._gradients: dict[str, int] = {}

    def on_train_begin(self, context: CallbackContext) -> None:
        self._model, self._optimizer = context.module, context.optimizer
        self._tracker = MemoryTracker(context.module)

    def on_step_begin(self, context: CallbackContext) -> None:
        """Begin to count, before the step's first forward."""
        if not self._done:
            self._handle = self._optimizer.register_step_pre_hook(self._before_update)
            self._tracker.start()

    def on_step_end(self, context: CallbackContext) -> None:
        """End it when the optimizer has its state; a step that was left out is counted again."""
        if self._done:
            return
        self._tracker.stop()
        self._handle.remove()
        if not context.updated:
            return
        self._done = True
        ranks = gather_layers(memory_by_layer(self._model, self._optimizer, self._gradients, self._tracker), context)
        del self._model, self._optimizer, self._tracker
        context.note(f"held: {summarize_memory(ranks)}, in MiB by rank; by layer in memory.json")
        if context.rank == 0:
            write_json(context.out / "memory.json", {"ranks": ranks})

    def _before_update(self, *_: Any) -> None:
        named = {name: local_bytes(parameter.grad) for name, parameter in self._model.named_parameters()}
        if not any(named.values()):  # an engine's vectors have them
            groups = self._optimizer.param_groups
            named = {ENGINE: sum(local_bytes(parameter.grad) for group in groups for parameter in group["params"])}
        self._gradients = named


def gather_layers(mine: list[LayerMemory], context: CallbackContext) -> list[dict[str, Any]]:
    """What each rank holds, in rank order, as JSON: its layers and their sums. All ranks call it."""
    facts = {"total": bytes_by_kind(mine), "layers": [asdict(layer) for layer in mine]}
    return gather_objects(facts, context.world.control)


def bytes_by_kind(found: Iterable[LayerMemory]) -> dict[str, int]:
    """Bytes over all layers, by kind."""
    found = list(found)
    return {kind: sum(getattr(layer, kind) for layer in found) for kind in KINDS}


def memory_tables(found: list[LayerMemory], title: str) -> list[Table]:
    """Layers for people, in MiB."""
    total = bytes_by_kind(found)
    columns = {
        "layer": [*(layer.name for layer in found), "all layers"],
        "kind": [*(layer.kind for layer in found), ""],
        "output": [*(" × ".join(map(str, layer.output)) for layer in found), ""],
    }
    for kind in KINDS:
        columns[kind] = [memory_cell(size) for size in (*(getattr(layer, kind) for layer in found), total[kind])]
    columns["all"] = [memory_cell(size) for size in (*(layer.total for layer in found), sum(total.values()))]
    return terminal_tables(title, columns, text=("layer", "kind", "output"))


def memory_cell(figure: int) -> str:
    """Bytes as MiB, nothing for none."""
    return mebibytes(figure, 2) if figure else ""


def summarize_memory(ranks: list[dict[str, Any]]) -> str:
    """The ranks' sums in the run's summary: `parameters 42.6, 42.6; …`."""
    return "; ".join(f"{kind} {by_rank([rank['total'][kind] for rank in ranks])}" for kind in KINDS)
