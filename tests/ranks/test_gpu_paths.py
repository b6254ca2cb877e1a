"""What runs on GPUs, on this machine's where it has enough of them and on emulated ones elsewhere: the CPU's training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gpus import NO_GPU, are_real, on_gpus
from tests.helpers.harness import ROOT, assert_equal, command, result, tensors_of

SMALL = ["precision=fp64", "model.norm=group", "global_batch_size=8", "log_every=1", "eval_every=0", "threads=1"]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def on_the_cpu(recipe: str, *words: str, cwd: Path) -> list[float]:
    done = command("-m", f"recipes.{recipe}", *words, "out=cpu", cwd=cwd, **NO_GPU)
    assert done.returncode == 0, done.stderr
    return losses(cwd / "cpu")


def same(found: list[float], expected: list[float], gpus: int) -> bool:
    """To the last digit, where the CPU's kernels compute both."""
    return len(found) == len(expected) and found == (pytest.approx(expected, rel=1e-8) if are_real(gpus) else expected)


def test_ddp_over_nccl_trains_what_the_cpu_trains(tmp_path: Path) -> None:
    words = [*SMALL, "nproc=2", "max_steps=3"]
    done = on_gpus(2, "-m", "recipes.ddp", *words, "out=gpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "gpu")
    assert (found["device"], found["backend"]) == ("cuda", "nccl")
    assert same(losses(tmp_path / "gpu"), on_the_cpu("ddp", *words, cwd=tmp_path), 2)


# Waiting ---------------------------------------------------------------------------------------------------------------

WAITS = """
import os, warnings

import torch

heard = []


def hook(run):
    torch.cuda.set_sync_debug_mode("warn" if 3 <= run.step < 6 else "default")
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, kind, file, line, *more: heard.append(f"{message} at {file}:{line}")
    if run.step == 6 and run.world.rank == 0:
        print("".join(f"WAITS {each}\\n" for each in heard) + "STEPS 3", flush=True)
"""


def host_waits_in_three_steps(folder: Path, *words: str) -> list[str]:
    """Where rank 0 of two waited for its GPU in three steady steps of recipes.ddp."""
    code, last = (ROOT / "recipes" / "ddp.py").read_text(), "        optimizer.zero_grad()\n"
    assert last in code
    (folder / "ddp.py").write_text(code.replace(last, last + "        __import__('hook').hook(run)\n"))
    (folder / "hook.py").write_text(WAITS)
    shape = ["nproc=2", "global_batch_size=8", "eval_every=0", "max_steps=7", "log_every=100"]
    done = on_gpus(2, "ddp.py", *shape, "out=run", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "STEPS 3" in done.stdout
    return re.findall(r"WAITS (.*)", done.stdout)


@pytest.mark.slow_except("fp32", "bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(precision: str, tmp_path: Path) -> None:
    assert host_waits_in_three_steps(tmp_path, f"precision={precision}") == []


def test_a_step_that_waits_is_heard(tmp_path: Path) -> None:
    """Once a step: the NaN guard asks all ranks whether all numbers are finite."""
    found = host_waits_in_three_steps(tmp_path, "gradients.stop_on_nan=true")
    assert found


# Copies to the host ------------------------------------------------------------------------------------------------------

# Reads what was copied at once, as if it had arrived with the call.
HASTY = """
import runpy, sys, torch
torch.cuda.synchronize = lambda device=None: None
torch.cuda.Stream.synchronize = torch.cuda.Event.synchronize = lambda self: None
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
SAVES = [*SMALL, "checkpoint.every=2", "checkpoint.asynchronous=true", "checkpoint.keep=3"]


def test_two_gpus_save_beside_training_and_resume(tmp_path: Path) -> None:
    for steps in (4, 5):
        words = [*SAVES, f"max_steps={steps}", "out=gpu"]
        done = on_gpus(2, "-m", "recipes.model_parallel", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "cuda:1" in done.stdout
    assert result(tmp_path / "gpu")["resumed_from"] == "checkpoints/step-00000004"
    assert same(losses(tmp_path / "gpu"), on_the_cpu("model_parallel", *SAVES, "max_steps=5", cwd=tmp_path), 2)
    if not are_real(2):
        saved = [tensors_of(tmp_path / out / "checkpoints" / "step-00000002") for out in ("gpu", "cpu")]
        assert_equal(*[{name: x for name, x in each.items() if not name.startswith("rng")} for each in saved])


@pytest.mark.slow
def test_a_copy_that_is_read_too_early_is_seen(tmp_path: Path) -> None:
    if are_real(2):
        pytest.skip("a real GPU may be quick enough")
    (tmp_path / "hasty.py").write_text(HASTY)
    outs: dict[str, Any] = {"hasty": ["hasty.py", "recipes.model_parallel"], "patient": ["-m", "recipes.model_parallel"]}
    for out, words in outs.items():
        done = on_gpus(2, *words, *SAVES, "max_steps=2", f"out={out}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    hasty, patient = [tensors_of(tmp_path / out / "checkpoints" / "step-00000002") for out in outs]
    assert any(not hasty[name].equal(tensor) for name, tensor in patient.items())
