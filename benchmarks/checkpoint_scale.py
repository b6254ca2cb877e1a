"""What a checkpoint of a thousand ranks is made of: its files, and what rank 0 gathers, plans and writes for all of them.

    python -m benchmarks.checkpoint_scale [--ranks 64 256 1024]

This process is each rank in turn, in torch's fake process group: it shards a GPT of 124 million parameters and AdamW's
two moments as FSDP does, on the meta device, and makes the plan that torch.distributed.checkpoint would send to rank 0.
Rank 0's part is done with all of them: it makes the global plan, and the description that is written as `.metadata`.
Nothing of this is a copy: planner, writer and the names of the files are those that a run saves with.

`plan kB` is what each rank sends to rank 0, and `back kB` what rank 0 sends to each; `plan s` the seconds of its core that
rank 0 takes for the global plan and the description; `files` are there while the checkpoint is written, a hash beside each
rank's file, and `at last` when it is sealed. The last line says by what factor each has grown.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.scale import growth_table
from lockstep.checkpoint.dcp import Writer
from lockstep.models.gpt import GPT, GPT_SIZES

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Figures:
    """A line of the table: bytes per rank, seconds and bytes of rank 0, files."""

    ranks: int
    sent: float
    sent_back: float
    planned: float
    metadata: int
    files_before: int
    files: int


def planned_by(rank: int, size: int, shapes: dict[str, torch.Size]) -> tuple[Any, DefaultSavePlanner]:
    """A rank's plan to save its shards of a model's weights and moments, and its generators."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        part = distribute_tensor(torch.empty(shape, device="meta"), mesh, [Shard(0)], src_data_rank=None)
        state |= {f"model.{name}": part} | {f"optim.{name}.{moment}": part for moment in MOMENTS}
    state |= {f"rng.{rank}.{name}": torch.empty(627, device="meta") for name in ("torch", "python", "numpy")}
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=rank == 0)
    plan = planner.create_local_plan()
    dist.destroy_process_group()
    return plan, planner


def measure(size: int, shapes: dict[str, torch.Size]) -> Figures:
    """Plan a checkpoint of `size` ranks."""
    plans, planner = zip(*(planned_by(rank, size, shapes) for rank in range(size)), strict=True)
    sent = sum(len(pickle.dumps(plan)) for plan in plans) / size
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), {}, {}, {"step": 1}, keep=1, best=False)
        writer.set_up_storage_writer(True)
        began = time.process_time()
        everywhere, metadata = planner[0].create_global_plan(list(plans))
        everywhere = writer.prepare_global_plan(everywhere)
        results = [written(plan) for plan in everywhere]
        metadata.storage_data = {one.index: one.storage_data for part in results for one in part}
        described = len(pickle.dumps(metadata))
        seconds = time.process_time() - began
    of_ranks = sum(1 for part in results if part)
    back = sum(len(pickle.dumps(plan)) for plan in everywhere) / size
    # Beside the ranks' files: .metadata, and in the end the manifest.
    return Figures(size, sent, back, seconds, described, 2 * of_ranks + 1, of_ranks + 2)


def written(plan: SavePlan) -> list[WriteResult]:
    """What a rank says when it has written its file."""
    name = f"{plan.storage_data.prefix}0.distcp"
    return [WriteResult(item.index, 2**20, _StorageInfo(name, 2**20, 2**20)) for item in plan.items]


COLUMNS: dict[str, Callable[[Figures], float]] = {
    "ranks": lambda f: f.ranks,
    "plan kB": lambda f: f.sent / 1e3,
    "back kB": lambda f: f.sent_back / 1e3,
    "plan s": lambda f: f.planned,
    "metadata kB": lambda f: f.metadata / 1e3,
    "files": lambda f: f.files_before,
    "at last": lambda f: f.files,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024], help="64 256 1024")
    asked = parser.parse_args(words).ranks
    if wrong := [size for size in asked if not 1 <= size <= 4096]:
        parser.error(f"--ranks {wrong[0]}: allowed are 1 to 4096")
    with torch.device("meta"):
        model = GPT(GPT_SIZES["124M"])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = []
    for size in asked:
        found.append(measure(size, shapes))
        print(f"{size} ranks planned", flush=True)
    Console(width=80, highlight=False).print(growth_table(found, COLUMNS))


if __name__ == "__main__":
    main()
