"""A rank's device and cores, and how fast it computes."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.diagnose.findings import Facts, Finding, Findings, warning_if
from lockstep.diagnose.probes.ranks import differences, on_all, rank_and_host, ranks_by_host
from lockstep.distributed.cores import core_quota
from lockstep.distributed.process_group import World
from lockstep.utils.system import cpu_name
from lockstep.utils.text import count, mebibytes, some_of

PRODUCTS = 20  # matrix products whose median time counts
SLOW_RANK = 0.7  # of the median's speed, below which a rank is called slow
BUSY = 2  # times as much work as cores from which a machine is called busy
TAKEN = 0.1  # share of a GPU's memory that others may hold without a warning


# Device -------------------------------------------------------------------------------------------------------------


def probe_device(world: World) -> Facts:
    """What this rank computes on."""
    found: Facts = {"type": world.device.type}
    found["gpus_visible"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found["gpus_present"] = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if world.device.type == "cpu":
        return found | {"name": cpu_name()}
    properties = torch.cuda.get_device_properties(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    found |= {
        "name": properties.name,
        "index": world.device.index,
        "uuid": str(getattr(properties, "uuid", world.device.index)),
        "capability": f"{properties.major}.{properties.minor}",
        "total_bytes": total,
        # All that is taken, this process's own share of it, about half a GiB, included.
        "used_bytes": total - free - torch.cuda.memory_reserved(world.device),
        "driver": None,
    }
    with contextlib.suppress(Exception):  # NVML is missing, or is not allowed here
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
    return found


def judge_devices(ranks: list[Facts]) -> Findings:
    """Whether the ranks' devices are alike, and each rank has one of its own."""
    found = Findings("devices")
    if figure := differences(ranks, "device", "type"):
        found.fails(figure, "leave out the hosts whose GPUs torch does not see, or set device=cpu")
    for name in ("name", "driver"):
        if figure := differences(ranks, "device", name):
            found.warning(figure, "take hosts that are alike: the slowest device decides the speed")
    for host, some in ranks_by_host(ranks).items():
        gpus: dict[str, list[Facts]] = {}
        for each in some:
            if each["device"]["type"] == "cuda":
                gpus.setdefault(each["device"]["uuid"], []).append(each)
        for sharing in gpus.values():
            if len(sharing) > 1:
                who = ", ".join(str(each["rank"]) for each in sharing)
                add = found.fails if sharing[0]["network"].get("backend") == "nccl" else found.warning
                add(f"ranks {who} share one GPU of {host}", "start one rank per GPU")
            about = sharing[0]["device"]
            if about["used_bytes"] > TAKEN * about["total_bytes"]:
                held = f"{mebibytes(about['used_bytes'], 0)} of {mebibytes(about['total_bytes'], 0)} MiB"
                figure = f"{held} of {rank_and_host(sharing[0])}'s GPU are taken already"
                found.warning(figure, "end the other processes: nvidia-smi names them")
        visible = max(each["device"]["gpus_visible"] for each in some)
        present = max(each["device"]["gpus_present"] for each in some)
        if present and not visible:
            cuda = some[0]["versions"].get("cuda")
            figure = f"{host} has {count(present, 'GPU')}, and torch (CUDA {cuda or 'none'}) sees none"
            remedy = "update the driver, or install a torch for an older CUDA; look at CUDA_VISIBLE_DEVICES"
            found.warning(figure, remedy if cuda else "install a torch that is built for CUDA")
        if visible and not gpus:
            found.warning(f"device=cpu, and torch sees {count(visible, 'GPU')} on {host}", "set device=cuda")
        elif visible > max(1, len(gpus)):
            figure = f"{visible - len(gpus)} of {visible} GPUs of {host} have no rank"
            found.warning(figure, f"set nproc={visible}, or cluster.tasks_per_node={visible}")
    if not found:
        found.ok(f"{ranks[0]['device']['name']} {on_all(ranks)}")
    return found


# Cores --------------------------------------------------------------------------------------------------------------


def probe_cores(workers: int) -> Facts:
    """The cores that this process may run on, and what it wants to do with them.

    Args:
        workers: DataLoader workers that it starts.
    """
    return {
        "allowed": sorted(os.sched_getaffinity(0)),
        "present": os.cpu_count(),
        "quota": core_quota(),
        "threads": torch.get_num_threads(),
        "workers": workers,
        "load": os.getloadavg()[0],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def judge_cores(ranks: list[Facts]) -> Findings:
    """Whether the ranks of a host want more threads than it has cores for them."""
    found, usable = Findings("cores"), {}
    for host, some in ranks_by_host(ranks).items():
        each = [rank["cores"] for rank in some]
        there = len(set().union(*(set(one["allowed"]) for one in each)))
        usable[host] = least = min([there, *(one["quota"] for one in each if one["quota"])])
        wanted = sum(one["threads"] for one in each)
        figure = f"{host}: {count(len(some), 'rank')} with {wanted} threads on {least:g} cores"
        figure += f" (a control group's limit; {there} are there)" if least < there else ""
        fit = int(least) // len(some)
        if wanted > least:
            remedy = f"set threads={fit}" if fit else f"start at most {count(max(1, int(least)), 'rank')} there"
            found.warning(f"{figure}: oversubscribed, each waits for the others", remedy)
        for rank in some:
            own = len(rank["cores"]["allowed"])
            if rank["cores"]["threads"] > own and wanted <= least:
                figure = (
                    f"{rank_and_host(rank)} has {rank['cores']['threads']} threads and may use {count(own, 'core')}"
                )
                found.warning(figure, "bind it to more (srun --cpus-per-task=…), or set threads=…")
        if each[0]["load"] > BUSY * there:
            figure = f"{host}: {each[0]['load']:.0f} processes want its {there} cores"
            found.warning(figure, "wait for the other work there to end, or take another host")
    if len(set(usable.values())) > 1:
        figure = some_of([f"{host} {cores:g}" for host, cores in usable.items()])
        found.warning(f"cores: {figure}", "take hosts that are alike: the slowest decides")
    if not found:
        one = ranks[0]["cores"]
        workers = f" and {count(one['workers'], 'DataLoader worker')}" if one["workers"] else ""
        found.ok(f"{count(one['threads'], 'thread')}{workers} per rank, {min(usable.values()):g} cores per host")
    return found


# Speed --------------------------------------------------------------------------------------------------------------


def probe_pace(world: World) -> Facts:
    """Operations per second of this rank's device in a matrix product, while all other ranks compute theirs."""
    cuda = world.device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if cuda else (384, torch.float32)
    a = torch.rand(size, size, device=world.device, dtype=dtype)
    dist.barrier(world.control)
    taken = []
    for _ in range(1 + PRODUCTS):
        started = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for a GPU
        taken.append(time.perf_counter() - started)
    return {"flops": 2 * size**3 / statistics.median(taken[1:])}  # the first one also wakes threads and libraries


def judge_pace(ranks: list[Facts]) -> list[Finding]:
    """Whether all ranks compute equally fast; each step takes as long as the slowest one."""
    rates = [each["pace"]["flops"] for each in ranks]
    slow = min(ranks, key=lambda each: each["pace"]["flops"])
    median, least = statistics.median_high(rates), min(rates)
    figure = f"a matrix product at {median / 1e9:,.0f} GFLOP/s"
    if least < SLOW_RANK * median:
        figure += f"; {rank_and_host(slow)} at {least / 1e9:,.0f}"
    elif len(ranks) > 1:
        figure += f", the slowest {least / 1e9:,.0f}"
    remedy = "look there for other work, or a throttled device; else leave that host out: the others wait for it"
    return [warning_if("pace", least < SLOW_RANK * median, figure, remedy)]
