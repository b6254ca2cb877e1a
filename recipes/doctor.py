"""Doctor: looks at a training before it is one, and says in figures what it would ask of this machine.

`memory` says where a step's memory goes. For the model, batch, precision and optimizer that are asked for, a table has
a row for each layer: the shape of its output, and the bytes of its parameters, their gradients, the optimizer's state,
and the activations that it keeps from forward for backward. That much is found on torch's fake tensors, which have
shapes and no bytes, for a whole model that is trained as a whole. Then the recipe really takes three steps on the ranks
that are there: what each of them held, and its measured peak, stand beside the sum. A peak is less than the sum where
gradients come while activations go, and more by what lies outside of the layers: temporary results, the buckets in
which DDP exchanges gradients, scratch space of cuDNN or oneDNN, and on a CPU the code that is loaded on the way. A last
table says what DDP, ZeRO's stages and FSDP make of parameters, gradients and optimizer on these ranks.

`recipes=[fsdp]` asks about another recipe than ddp. With `batch_size=auto` the largest batch is found first. And any
recipe counts its own first step with `memory=report`, and trains on.

    python -m recipes.doctor memory                                 ResNet-18 on the digits, two ranks
    python -m recipes.doctor memory model=resnet50 data=synthetic data.image_size=64 batch_size=16 precision=bf16
    python -m recipes.doctor memory recipes=[fsdp] batch_size=auto

Expect: the tables in less than half a minute on two CPU cores, and memory.json beside them.
Source: https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html,
https://arxiv.org/abs/1910.02054 (ZeRO)
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from rich.table import Table

from lockstep import Recipe, Run, UserError, recipe
from lockstep.account import cell, in_a_line, table
from lockstep.checks import complete
from lockstep.data import First
from lockstep.files import write_json
from lockstep.fit import cut_short
from lockstep.memory import KINDS, Prediction, free_bytes, peak_from_now, predict, sharded
from lockstep.metrics import gather_numbers
from lockstep.proof import with_values
from lockstep.schema import Config
from lockstep.words import mebibytes
from recipes import choose

STEPS = 3


def patient(config: Config) -> Recipe:
    """The recipe that is looked at: recipes=[NAME], else ddp."""
    names = choose(config.recipes or ["ddp"])
    if len(names) > 1:
        raise UserError(f"recipes=[{','.join(names)}]: recipes.doctor looks at one recipe at a time; name one")
    found: Recipe = importlib.import_module(f"recipes.{names[0]}").train
    return found


def as_patient(config: Config) -> Config:
    """The config of the steps that are really taken: few, and every one counted."""
    steps = {"max_steps": STEPS, "epochs": STEPS, "memory": "report"}
    return with_values(cut_short(config, patient(config)), steps)


def images_at_once(config: Config, shards: int) -> int:
    """Images that go through the model at a time: a rank's share, or the largest micro-batch of it."""
    return -(-config.batch_size // shards // max(config.accumulate, config.micro_batches))


class Steps(Run):
    """A run that notes by how much memory has risen when a step ends, before it evaluates and exports."""

    risen: Callable[[], int]
    rise = 0

    def _after_step(self) -> bool:
        self.rise = self.risen()
        return super()._after_step()


def measure(run: Run) -> tuple[list[dict[str, Any]], list[int]]:
    """Take a few steps as the recipe takes them: (what each rank held by layer, each rank's measured peak in bytes)."""
    each, config = patient(run.config), as_patient(run.config)
    out = run.out / each.name
    if run.world.rank == 0:
        (out / "ranks").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    inner = Steps(each.name, config, run.world, out, shards=each.ranks, quiet=True, listener=run.listener)
    inner.eval_set = First(inner.eval_set, config.eval_batch_size * run.world.world_size)
    inner.risen = peak_from_now(run.device)
    each(inner)
    peaks = [int(size) for size in gather_numbers(inner.rise, run.device)]
    dist.barrier()
    return json.loads((out / "memory.json").read_text())["ranks"] if run.world.rank == 0 else [], peaks


def show(run: Run, found: Prediction, ranks: list[dict[str, Any]], peaks: list[int], shards: dict[str, Any]) -> None:
    """The tables, for people."""
    config, line = run.config, run.report.line
    images, console = images_at_once(config, run.shards), run.report.console
    console.print(
        table(
            found.layers,
            f"{config.model.name}, {images} images at a time, {config.precision}, {config.optim.name}: "
            "MiB that one whole model holds during a step",
        )
    )
    peak = "; ".join(f"{kind} {mebibytes(size)}" for kind, size in found.peak.items())
    line(f"expected peak, MiB   {mebibytes(sum(found.peak.values()))}: {peak}")
    name = patient(config).name
    line(f"held, MiB by rank    {in_a_line(ranks)} (recipes.{name}, {STEPS} steps)")
    line(f"measured peak, MiB   {', '.join(map(mebibytes, peaks))} by rank: the rise of {RISE[run.device.type]}")
    free, who = free_bytes(run.device)
    line(f"free now, MiB        {mebibytes(free)}, says {who}")
    grid = Table(title=f"the same state on {len(peaks)} ranks, by formula: MiB on the fullest", title_justify="left")
    grid.add_column("technique")
    for column in (*KINDS[:3], "total"):
        grid.add_column(column, justify="right")
    for technique, sizes in shards.items():
        grid.add_row(technique, *(cell(size) for size in sizes.values()))
    console.print(grid)


RISE = {"cpu": "the process's resident memory", "cuda": "what torch's allocator gave out"}


def check(config: Config, share: int) -> None:
    """A recipe that is looked at must be able to run."""
    each = patient(config)
    complete(as_patient(config), each, config.batch_size // share * config.stages)


@recipe(check=check, stands_for=patient, word="check")
def train(run: Run) -> None:
    ranks, peaks = measure(run)
    if run.world.rank:
        return
    found = predict(run.config, images_at_once(run.config, run.shards), run.device.type)
    shards = sharded(run.config, run.world.world_size)
    write_json(
        run.out / "memory.json",
        {
            "images": images_at_once(run.config, run.shards),
            "total": found.sums(),
            "layers": [asdict(layer) for layer in found.layers],
            "expected_peak": found.peak,
            "measured_peak_bytes_by_rank": peaks,
            "ranks": ranks,
            "sharded": shards,
        },
    )
    show(run, found, ranks, peaks, shards)


if __name__ == "__main__":
    train.main()
