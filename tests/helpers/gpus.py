"""Commands on GPUs: this machine's where it has enough of them, else emulated ones (tests/emulated_gpu)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.emulated_gpu import emulated_gpus
from tests.helpers import warm_interpreter
from tests.helpers.harness import command

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # the environment of a command that is to see none


MACHINES = "TESTS_OWN_GPUS"  # which of this machine's the tests were given


def hide() -> None:
    """Have this process and its commands see no GPU, as most tests mean it; who means one asks for it below.

    What there is is kept in the environment, from which pytest's workers have it.
    """
    if MACHINES not in os.environ:
        count = torch.cuda.device_count()
        given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ[MACHINES] = given if count else ""
    os.environ |= NO_GPU
    warm_interpreter.START |= NO_GPU


def own_gpus() -> list[str]:
    """This machine's, as CUDA_VISIBLE_DEVICES names them."""
    return list(filter(None, os.environ.get(MACHINES, "").split(",")))


def are_real(count: int) -> bool:
    """Whether `gpus(count)` are this machine's own: no two of them compute the same digits as a CPU."""
    return len(own_gpus()) >= count


def gpus(count: int) -> dict[str, str]:
    """The environment of a command that sees so many GPUs."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(own_gpus()[:count])} if are_real(count) else emulated(count)


def emulated(count: int, mib: int = 4096) -> dict[str, str]:
    """The same, never this machine's own: for their memory of `mib` MiB, or more of them than anybody has.

    Skips the test where torch is not built for CUDA; fails it where there is no C compiler.
    """
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA here")
    return emulated_gpus(count, mib) | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}


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
