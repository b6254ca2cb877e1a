"""What a rank computes on: device and backend, ranks per machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.distributed.interfaces import check_interfaces
from lockstep.distributed.rendezvous import describe_ranks
from lockstep.distributed.store import close_question, get_many, leave_store, wait_for_keys
from lockstep.errors import UserError

DRIVER = Path("/dev/nvidiactl")  # is there where NVIDIA's driver is loaded


def resolve_device(device: str, backend: str) -> tuple[str, str]:
    """Turn `auto` into what this machine has: ("cuda" | "cpu", "nccl" | "gloo").

    Raises:
        UserError: cuda was asked for and is not there, or nccl for the CPU; or GPUs are there, and CUDA_VISIBLE_DEVICES
            names none of them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    hidden = visible.lower() in ("", "-1", "none", "void", "nodevfiles")  # what people and Slurm set on purpose
    built = torch.backends.cuda.is_built()
    if device != "cpu" and built and not hidden and DRIVER.exists() and not torch.cuda.is_available():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: names no GPU of this machine; allowed are numbers such as 0,1 and UUIDs (of "
            "nvidia-smi -L); or set device=cpu"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; allowed are device=cpu and device=auto")
    if backend == "auto":
        backend = "nccl" if device == "cuda" else "gloo"
    if backend == "nccl" and device == "cpu":
        raise UserError(
            "backend=nccl: it carries CUDA tensors only; with device=cpu allowed are backend=gloo and backend=auto"
        )
    return device, backend


def default_nproc(device: str) -> int:
    """Ranks to start on this machine when nobody says: one per GPU, or 2 on CPU."""
    return torch.cuda.device_count() if device == "cuda" else 2


def check_nproc(nproc: int, device: str, backend: str) -> None:
    """Refuse more NCCL ranks than GPUs: two ranks on one GPU dead-lock or fail inside NCCL."""
    if device == "cuda" and backend == "nccl" and nproc > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"nproc={nproc}: this machine has {count} CUDA devices and a rank needs one of its own; "
            f"allowed are 1…{count} (or backend=gloo, whose ranks may share a device)"
        )


def gpu_of(local_rank: int) -> torch.device:
    """The GPU of a host's rank, of those that it sees: all of the host's, or those that were given to it alone."""
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def gpus_in_use(device: torch.device) -> list[torch.device]:
    """A rank's device and the other GPUs on which this process holds memory; none on CPU."""
    if device.type != "cuda":
        return []
    others = (torch.device("cuda", number) for number in range(torch.cuda.device_count()) if number != device.index)
    return [device, *(other for other in others if torch.cuda.memory_reserved(other))]


def agree_on_devices(
    store: dist.Store, rank: int, hosts: list[str], local_rank: int, device: str, backend: str, timeout_seconds: float
) -> tuple[str, str]:
    """What `resolve_device` says on this rank, when all ranks have said the same and none has another one's GPU.

    Each rank puts what it found into the store, rank 0 judges: a rank that failed here alone would leave the others in
    a collective, and so would NCCL.

    Args:
        store: the ranks' own; every rank calls this once.

    Raises:
        UserError: on all ranks, with the ranks that are to blame.
    """
    found: dict[str, str] = {}
    try:
        chosen = resolve_device(device, backend)
        check_interfaces(os.environ, chosen[1] == "nccl")
        found = {"device": chosen[0], "backend": chosen[1]}
        if chosen[0] == "cuda":
            found["local_rank"] = str(local_rank)
            found["gpu"] = str(torch.cuda.get_device_properties(gpu_of(local_rank)).uuid)
    except UserError as error:
        found["error"] = str(error)
    room = dist.PrefixStore("devices", store)
    room.set(str(rank), json.dumps(found))
    if rank == 0:
        keys = [str(number) for number in range(len(hosts))]
        wait_for_keys(room.clone(), keys, timeout_seconds)
        come = not close_question(room, keys)
        verdict = (
            compare_devices([json.loads(each) for each in get_many(room, keys)], hosts, device)
            if come
            else "a rank is gone"
        )
        room.set("verdict", verdict)
    elif not wait_for_keys(room, ["verdict"], timeout_seconds + 30):
        raise UserError("rank 0 ended while the ranks compared their devices; its own words say why")
    if verdict := room.get("verdict").decode():
        leave_store(room, rank, len(hosts))
        raise UserError(verdict)
    return chosen


def compare_devices(found: list[dict[str, str]], hosts: list[str], asked: str) -> str:
    """What is wrong with the ranks' devices, or nothing.

    Args:
        found: each rank's `device` and `backend`, and its `gpu` if it has one; or `error`.
        asked: the key `device`.
    """

    def name(ranks: list[int]) -> str:
        return describe_ranks(ranks, hosts)

    wrong = [rank for rank, each in enumerate(found) if "error" in each]
    if len(wrong) == len(found):
        return found[0]["error"]
    if wrong:
        return f"{name(wrong)}: {found[wrong[0]]['error']}"
    without = [rank for rank, each in enumerate(found) if each["device"] == "cpu"]
    if without and len(without) < len(found):
        sees = "sees" if len(without) == 1 else "see"
        return (
            f"device={asked}: {name(without)} {sees} no CUDA device, and the others do; set device=cpu, or start the "
            "ranks where each has a GPU"
        )
    owners: dict[tuple[str, str], list[int]] = {}
    for rank, each in enumerate(found):
        if each["backend"] == "nccl":
            owners.setdefault((hosts[rank], each["gpu"]), []).append(rank)
    for (_, gpu), ranks in owners.items():
        if len(ranks) > 1:
            local = {found[rank].get("local_rank") for rank in ranks}
            same = f"all have LOCAL_RANK={local.pop()}; let the launcher set it, or " if len(local) == 1 else ""
            return (
                f"{name(ranks)} have one GPU ({gpu}), and with backend=nccl each needs its own: {same}start no more ranks on "
                "a host than it has GPUs, give each task its own (srun --gpus-per-task=1), or set backend=gloo"
            )
    return ""
