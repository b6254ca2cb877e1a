"""For how long a checkpoint stops training: an asynchronous save of ResNet-50 with momentum, beside two yardsticks.

    python -m benchmarks.checkpoint [--rounds N]

In each round, one after the other in one process: a plain clone of every tensor of the state, which is the least that
must happen before training may go on; our save, until it returns; and torch.save of the same state to the same disk
with fsync, which is what most loops do. The save that runs on in the background is waited for before the next round.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torchvision.models import resnet50

from benchmarks import common
from lockstep.checkpoint.saver import CheckpointSaver
from lockstep.checkpoint.state import TrainingState


def trained() -> TrainingState:
    """A ResNet-50 after one step, so that there is momentum."""
    model = resnet50()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
    optimizer.step()
    return TrainingState(model, optimizer, {}, rank=0, device=torch.device("cpu"), owns_buffers=True)


def rows(arguments: argparse.Namespace) -> list[common.Row]:
    state = trained()
    seconds: dict[str, list[float]] = {"clone": [], "save": [], "torch.save": []}
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        checkpoints = CheckpointSaver(Path(folder), asynchronous=True, keep=1, warn=print)
        for number in range(arguments.rounds + 1):
            started = time.perf_counter()
            cloned = {name: tensor.clone() for name, tensor in state.tensors().items()}
            taken = {"clone": time.perf_counter() - started}
            started = time.perf_counter()
            checkpoints.save(state.tensors(), {"step": number})
            taken["save"] = time.perf_counter() - started
            checkpoints.wait()
            started = time.perf_counter()
            with Path(folder, "plain.pt").open("wb") as stream:
                torch.save(cloned, stream)
                stream.flush()
                os.fsync(stream.fileno())
            taken["torch.save"] = time.perf_counter() - started
            if number:  # the first one allocates
                for name, value in taken.items():
                    seconds[name].append(value)
        dist.destroy_process_group()
    size = sum(tensor.nbytes for tensor in cloned.values()) / 1e6
    note = f"{size:.0f} MB: " + ", ".join(f"{name} {statistics.median(v) * 1000:.0f} ms" for name, v in seconds.items())
    return [
        common.Row("stall: save / clone", common.ratios(seconds["save"], seconds["clone"]), 1.5, True, note),
        common.Row("stall: save / torch.save", common.ratios(seconds["save"], seconds["torch.save"])),
    ]


if __name__ == "__main__":
    common.main(__doc__, rows, rounds=9)
