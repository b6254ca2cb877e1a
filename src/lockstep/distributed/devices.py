"""What a rank computes on: device and backend, ranks per machine, threads per rank."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from lockstep.errors import UserError


def resolve_device(device: str, backend: str) -> tuple[str, str]:
    """Turn `auto` into what this machine has: ("cuda" | "cpu", "nccl" | "gloo").

    Raises:
        UserError: cuda was asked for and is not there, or nccl for the CPU.
    """
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


def share_of_cores(ranks_here: int, env: Mapping[str, str]) -> int:
    """The cores for one rank. Slurm may have bound each of its tasks to its own already, which must not be shared."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_STEP_ID" in env and "SLURM_CPUS_PER_TASK" in env and ranks_here > 1:
        return min(int(env["SLURM_CPUS_PER_TASK"]), cores)
    return max(1, cores // ranks_here)
