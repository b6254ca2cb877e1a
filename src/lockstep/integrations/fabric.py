"""What Lightning is told of ranks that are there already: who they are, their devices, their arithmetic.

Lightning asks a ClusterEnvironment who it is among the ranks, and whether it must start them. `Ranks` answers from the
World that has joined them, so that nothing is started, no second process group is made, and no guess from variables is
needed. Imported only by what uses Lightning, which takes seconds to load.
Source: https://lightning.ai/docs/fabric/stable/guide/multi_node/other.html
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment

from lockstep.distributed.process_group import World
from lockstep.run import Run
from lockstep.training.precision import Scaler

# Lightning's names. Asked for "16-mixed" on a CPU it would quietly take bf16, hence fp16's plugin below.
PRECISION: dict[str, Any] = {"fp32": "32-true", "fp64": "64-true", "bf16": "bf16-mixed", "fp16": None}

for name in ("lightning.fabric", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.WARNING)  # the run says itself what it runs on


class Ranks(ClusterEnvironment):
    """The ranks of a World, whose process group is up."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._world.hosts[0]

    @property
    def main_port(self) -> int:
        raise RuntimeError("the process group is there: nobody needs to meet")

    @staticmethod
    def detect() -> bool:
        return False  # never found by guessing: handed over by name

    def world_size(self) -> int:
        return self._world.world_size

    def set_world_size(self, size: int) -> None:
        pass  # what Lightning has counted from devices and nodes; the ranks were counted when they joined

    def global_rank(self) -> int:
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        hosts = self._world.hosts
        return list(dict.fromkeys(hosts)).index(hosts[self._world.rank])

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        # Right after this, Lightning sets the number of threads, unless this variable says that somebody has.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def joined(world: World) -> dict[str, Any]:
    """Arguments for a DDPStrategy, Fabric's or the Trainer's, that takes the ranks of `world` as they are."""
    # A device a rank of this host, to be indexed by the local rank. This rank's own, whichever number it has: Slurm
    # may have shown each rank a single GPU.
    here = max(world.hosts.count(world.hosts[world.rank]), world.local_rank + 1)
    return {
        "parallel_devices": [world.device] * here,
        "cluster_environment": Ranks(world),
        "process_group_backend": world.backend,
    }


def loss_scaling(run: Run, scaler: Scaler, mixed: Any) -> list[Any]:
    """What Fabric or the Trainer needs for fp16: `mixed`, which is its own MixedPrecision, with the run's scaler."""
    return [mixed("16-mixed", run.device.type, scaler)] if scaler.is_enabled() else []
