"""CUDA devices that are not there, for tests of what needs them; README.md says what they can do and what not."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILDS = HERE.parents[1] / "build" / "emulated_gpu"
LIBRARY = "libcuda.so.1"  # who asks for the driver by this name gets what is loaded under it
MISSING = "emulated GPUs need a C compiler, and there is no `cc` here: apt-get install gcc libc6-dev"


def emulated_gpus(count: int, mib: int = 4096) -> dict[str, str]:
    """The environment of a command that is to see `count` CUDA devices of `mib` MiB each.

    Raises:
        RuntimeError: there is no C compiler here, or torch is built without CUDA.
    """
    before = os.environ.get("PYTHONPATH")
    path = [str(HERE / "site"), *([before] if before else [])]
    return {
        "EMULATED_GPUS": str(count),
        "EMULATED_GPU_MIB": str(mib),
        "LD_PRELOAD": str(library()),
        "PYTHONPATH": os.pathsep.join(path),
    }


@cache
def library() -> Path:
    """The runtime, built where this source and these headers have not been built before; raises as above."""
    include = headers()
    source = HERE / "runtime.c"
    told = source.read_bytes() + (HERE / "headers" / "crt" / "host_defines.h").read_bytes() + str(include).encode()
    folder = BUILDS / hashlib.sha256(told).hexdigest()[:16]
    if (folder / LIBRARY).exists():
        return folder / LIBRARY
    if (compiler := shutil.which("cc")) is None:
        raise RuntimeError(MISSING)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as private:  # others may be building the same
        built = Path(private, LIBRARY)
        words = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-I{HERE / 'headers'}", f"-I{include}"]
        words += ["-include", str(include / "vector_types.h"), f"-Wl,-soname,{LIBRARY}", "-o", str(built), str(source)]
        done = subprocess.run([*words, "-ldl", "-lpthread"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"emulated GPUs: cc does not build {source}:\n{done.stderr}")
        built.replace(folder / LIBRARY)
    return folder / LIBRARY


def headers() -> Path:
    """CUDA's, which torch's wheels for Linux bring along."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    found = sorted(Path(spec.origin).parents[1].glob("nvidia/*/include/driver_types.h"))
    if not found:
        raise RuntimeError("emulated GPUs need torch's wheel with CUDA (Linux, the default of pip), not the CPU's")
    return found[0].parent


def main() -> None:
    """python -m tests.emulated_gpu COUNT WORDS...: become `python WORDS` with so many GPUs."""
    os.environ |= emulated_gpus(int(sys.argv[1]), int(os.environ.get("EMULATED_GPU_MIB", "4096")))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
