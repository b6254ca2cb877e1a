"""Commands on GPUs: this machine's where it has enough of them, else emulated ones (tests/emulated_gpu)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.emulated_gpu import emulated_gpus
from tests.helpers.harness import command

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # the environment of a command that is to see none


def are_real(count: int) -> bool:
    """Whether `gpus(count)` are this machine's own: no two of them compute the same digits as a CPU."""
    return torch.cuda.device_count() >= count


def gpus(count: int) -> dict[str, str]:
    """The environment of a command that sees so many GPUs."""
    if not are_real(count):
        return emulated(count)
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine.split(",")[:count])}


def emulated(count: int, mib: int = 4096) -> dict[str, str]:
    """The same, never this machine's own: for their memory of `mib` MiB, or more of them than anybody has.

    Skips the test where torch is not built for CUDA; fails it where there is no C compiler.
    """
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA here")
    return emulated_gpus(count, mib)


def on_gpus(
    count: int, *words: str, cwd: Path, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` with so many GPUs, to its end."""
    return command(*words, cwd=cwd, timeout=timeout, **gpus(count) | environment)


def run_recipe(
    name: str, count: int, *words: str, cwd: Path, cpu: bool = False, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m recipes.NAME WORDS` with so many GPUs; on emulated ones with a narrow model, in seconds.

    Args:
        cpu: on no GPU, with the model that it is trained with on them.
    """
    quick = [] if are_real(count) else ["tests.helpers.quick"]
    where = (NO_GPU if cpu else gpus(count)) | environment
    return command("-m", *quick, f"recipes.{name}", *words, cwd=cwd, timeout=timeout, **where)
