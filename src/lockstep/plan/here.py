"""This machine as a profile: what its ranks achieve together, measured. All ranks call `measure_hardware` together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.diagnose.bandwidth import slowest_time, synchronize, time_collective
from lockstep.distributed.process_group import World
from lockstep.memory.usage import free_bytes
from lockstep.plan.hardware import Hardware, Link
from lockstep.training.precision import DTYPES

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes of a copy
SMALL, LARGE = 2**10, {"cpu": 2**23, "cuda": 2**28}  # bytes of the collectives
TIMED_CALLS = 5


def measure_hardware(world: World) -> Hardware:
    """A profile of so many ranks of this machine, each with its own threads, all at work at once."""
    kind = world.device.type
    flops = {name: 1 / matmul_seconds(world, dtype) for name, dtype in DTYPES.items()}
    flops |= dict.fromkeys(("bf16", "fp16"), flops["fp32"]) if kind == "cpu" else sixteen_bit(world)
    source = torch.empty(COPIED[kind] // 4, device=world.device).zero_()
    target = torch.empty_like(source)
    copy = median_seconds(world, lambda: target.copy_(source))
    link = Link(1e12, 1.0, 0.0)
    least = 0.0
    if world.world_size > 1:
        small, large = (time_collective(world, "all_reduce", size) for size in (SMALL, LARGE[kind]))
        least = small["seconds"]
        link = Link(large["bandwidth"] * large["seconds"] / max(1e-9, large["seconds"] - least), 1.0, 0.0)
    free, _ = free_bytes(world.device)
    return Hardware(
        name=f"this machine, {kind}, {world.threads} threads per rank",
        memory=free / (world.world_size if kind == "cpu" else 1),
        reserved=0.0,
        flops=flops,
        achieved=1.0,
        memory_bandwidth=2 * source.nbytes / copy,
        memory_achieved=1.0,
        launch=seconds_per_operation(world),
        collective=least,
        per_node=world.world_size,
        inside=link,
        between=link,
        overlaps=kind == "cuda",
        device=kind,
    )


def sixteen_bit(world: World) -> dict[str, float]:
    """Operations per second in bf16 and fp16."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return {name: 1 / matmul_seconds(world, dtype) for name, dtype in dtypes.items()}


def matmul_seconds(world: World, dtype: torch.dtype) -> float:
    """Of one floating-point operation in a large matrix product."""
    side = MATRIX_SIDE[world.device.type]
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=world.device) for _ in range(2))
    return median_seconds(world, lambda: a @ b) / (2 * side**3)


def median_seconds(world: World, run: Callable[[], object]) -> float:
    """Of a call, on the slowest rank, when all of them make it."""
    run()
    taken = []
    for _ in range(TIMED_CALLS):
        synchronize(world)
        began = time.perf_counter()
        run()
        synchronize(world)
        taken.append(time.perf_counter() - began)
    return slowest_time(world, statistics.median(taken))


class CountedOperations(TorchDispatchMode):
    """How many operations are issued while it is entered; views count, as they take the host as long."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def seconds_per_operation(world: World) -> float:
    """What the host takes for an operation, forward, backward or of the optimizer, that computes nearly nothing."""
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.ReLU()))).to(world.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    inputs = torch.ones(8, 8, device=world.device)

    def step() -> None:
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with CountedOperations() as counted:
        step()
    return median_seconds(world, step) / counted.count
