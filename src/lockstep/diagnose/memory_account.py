"""Where a step's memory goes: what a model needs by layer, what each rank really held, what sharding would make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.table import Table

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.callbacks.memory_report import memory_cell, memory_tables, summarize_memory
from lockstep.config.schema import Config
from lockstep.diagnose.technique_memory import technique_state_bytes
from lockstep.distributed.collectives import gather_numbers
from lockstep.loggers.console import described
from lockstep.memory.predict import MemoryPrediction, predict_memory, sharded_state_bytes
from lockstep.memory.tracker import KINDS
from lockstep.memory.usage import free_bytes, peak_from_now
from lockstep.run import Run
from lockstep.task import option
from lockstep.utils.files import write_json
from lockstep.utils.tables import terminal_tables
from lockstep.utils.text import by_rank, count, mebibytes, short

if TYPE_CHECKING:
    from lockstep.recipe import Recipe

PEAK_OF = {"cpu": "the process's resident memory", "cuda": "what torch's allocator gave out"}


def account_memory(run: Run[Any], recipe: Recipe, config: Config) -> None:
    """Print the tables and write memory.json; all ranks call it together.

    Args:
        recipe: takes the steps that are measured.
        config: of these steps.
    """
    run.report.line(f"doctor: {count(config.max_steps or 0, 'step')} of recipes.{recipe.name} are taken and counted …")
    ranks, peaks = measure_steps(run, recipe, config)
    if run.world.rank:
        return
    samples = samples_at_once(run.config, run.shards)
    found = predict_memory(run.config, samples, run.device.type)
    shards = sharded_state_bytes(run.config, run.world.world_size)
    predicted = technique_state_bytes(recipe.name, config, run.world.world_size)
    held = max((rank["total"] for rank in ranks), key=lambda total: sum(total[kind] for kind in KINDS[:3]))
    measured = {kind: held[kind] for kind in KINDS[:3]} | {"total": sum(held[kind] for kind in KINDS[:3])}
    mine = {f"{recipe.name}, predicted": predicted} if predicted else {}
    mine |= {f"{recipe.name}, measured": measured}
    report = {
        "samples": samples,
        "unit": option(run.task, "unit"),
        "total": found.sums(),
        "layers": [asdict(layer) for layer in found.layers],
        "expected_peak": found.peak,
        "measured_peak_bytes_by_rank": peaks,
        "ranks": ranks,
        "sharded": shards,
        "technique": {"predicted": predicted, "measured": measured},
    }
    write_json(run.out / "memory.json", report)
    print_account(run, found, samples)
    line = run.report.line
    line(f"held, MiB by rank    {summarize_memory(ranks)} (recipes.{recipe.name}, {config.max_steps} steps)")
    line(f"measured peak, MiB   {by_rank(peaks)} by rank: the rise of {PEAK_OF[run.device.type]}")
    free, who = free_bytes(run.device)
    line(f"free now, MiB        {mebibytes(free)}, says {who}")
    run.report.console.print(*sharding_tables(shards | mine, len(peaks)), sep="\n")
    line(f"all of it: {short(run.out / 'memory.json')}")


def samples_at_once(config: Config, shards: int) -> int:
    """Samples that go through the model at a time: a rank's share, or the largest micro-batch of it."""
    return -(-config.global_batch_size // shards // max(config.accumulate, config.pipeline_micro_batches))


class MemoryRise(Callback):
    """Notes by how much memory has risen when a step ends, before the run evaluates and exports."""

    def __init__(self, risen: Callable[[], int]) -> None:
        self._risen, self.bytes = risen, 0

    def on_step_end(self, context: CallbackContext) -> None:
        self.bytes = self._risen()


def measure_steps(run: Run[Any], recipe: Recipe, config: Config) -> tuple[list[dict[str, Any]], list[int]]:
    """Take the recipe's steps: (on rank 0, what each rank held by layer; each rank's measured peak in bytes)."""
    out = run.out / recipe.name
    if run.world.rank == 0:
        (out / "ranks").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    rise = MemoryRise(peak_from_now(run.device))
    inner = Run(
        recipe.name, config, run.world, out, shards=recipe.ranks, quiet=True, listener=run.listener, callbacks=[rise]
    )
    inner.data.limit_evaluation()
    recipe(inner)
    peaks = [int(size) for size in gather_numbers(rise.bytes, run.device)]
    dist.barrier()
    return json.loads((out / "memory.json").read_text(encoding="utf-8"))["ranks"] if run.world.rank == 0 else [], peaks


def print_account(run: Run[Any], found: MemoryPrediction, samples: int) -> None:
    """What the model needs by layer, and the peak to expect."""
    config = run.config
    at_once = f"{samples} {option(run.task, 'unit')} at a time"
    what = f"{described(run.task, config)[0]}, {at_once}, {config.precision}, {config.optim.name}"
    title = f"{what}: MiB that one whole model holds during a step"
    run.report.console.print(*memory_tables(found.layers, title), sep="\n")
    peak = "; ".join(f"{kind} {mebibytes(size)}" for kind, size in found.peak.items())
    run.report.line(f"expected peak, MiB   {mebibytes(sum(found.peak.values()))}: {peak}")


def sharding_tables(shards: dict[str, Any], ranks: int) -> list[Table]:
    """What DDP, ZeRO's stages and FSDP make of parameters, gradients and optimizer."""
    columns = {"technique": list(shards)}
    for number, name in enumerate((*KINDS[:3], "total")):
        columns[name] = [memory_cell(list(sizes.values())[number]) for sizes in shards.values()]
    return terminal_tables(
        f"the same state on {ranks} ranks, by formula: MiB on the fullest", columns, text=("technique",)
    )
