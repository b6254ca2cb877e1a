"""The GPU path, wherever a GPU is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.harness import command, result

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["ddp", "lightning_trainer"])
def test_one_rank_over_nccl_trains(name: str, tmp_path: Path) -> None:
    words = ["nproc=1", "epochs=3", "out=run", "precision=bf16", "channels_last=true"]
    done = command("-m", f"recipes.{name}", *words, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert (found["backend"], found["device"]) == ("nccl", "cuda")
    assert found["peak_memory_bytes"] > 2**26  # type: ignore[operator]


def test_two_ranks_share_one_gpu_over_gloo_and_compute_what_one_does(tmp_path: Path) -> None:
    proof = ["precision=fp64", "model.norm=group", "max_steps=10", "log_every=1"]
    runs = {
        "two": ["-m", "recipes.ddp", "nproc=2", "backend=gloo"],
        "one": ["-m", "recipes.single"],
    }
    curves = {}
    for name, words in runs.items():
        done = command(*words, *proof, f"out={name}", cwd=tmp_path, timeout=240)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [line["loss"] for line in lines if "loss" in line]
    assert len(curves["one"]) == 10
    assert curves["two"] == pytest.approx(curves["one"], rel=1e-8)


def test_more_nccl_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    done = command("-m", "recipes.ddp", f"nproc={count + 1}", f"global_batch_size={(count + 1) * 8}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"nproc={count + 1}: this machine has {count} CUDA devices" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_compile_trains(tmp_path: Path) -> None:
    words = ["compile=true", "max_steps=20", "out=run", "precision=bf16"]
    done = command("-m", "recipes.single", *words, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(first: str, second: str, tmp_path: Path) -> None:
    words = ["precision=fp64", "model.norm=group", "log_every=1", "checkpoint.every=5", "optim=adamw"]
    starts = {"parts": [(first, 5), (second, 10)], "whole": [("cpu", 10)]}
    curves = {}
    for out, devices in starts.items():
        for device, stop in devices:
            last = [f"device={device}", f"max_steps={stop}", f"out={out}"]
            done = command("-m", "recipes.single", *words, *last, cwd=tmp_path, timeout=240)
            assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        curves[out] = [line["loss"] for line in lines if "loss" in line]
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000005"
    assert len(curves["parts"]) == 10
    assert curves["parts"] == pytest.approx(curves["whole"], rel=1e-8)


def test_memory_is_foretold_and_the_largest_batch_found(tmp_path: Path) -> None:
    words = ["nproc=1", "global_batch_size=64", "model.image_size=64", "optim=adamw", "out=doctor"]
    done = command("-m", "recipes.doctor", "memory", *words, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "doctor" / "memory.json").read_text())
    (measured,), expected = found["measured_peak_bytes_by_rank"], sum(found["expected_peak"].values())
    assert 0.8 * expected < measured < 3 * expected, "more by DDP's buckets and cuDNN's scratch space"
    words = [
        "nproc=1",
        "global_batch_size=auto",
        "memory_fraction=0.02",
        "model.image_size=64",
        "max_steps=2",
        "out=auto",
    ]
    done = command("-m", "recipes.ddp", *words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    size = int(done.stdout.partition("global_batch_size=auto: ")[2].partition(",")[0])
    assert size > 1400 or ": out of memory" in done.stderr, "the next larger one was tried, and did not fit"
