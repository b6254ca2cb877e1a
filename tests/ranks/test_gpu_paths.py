"""What runs on GPUs, on this machine's where it has enough of them and on emulated ones elsewhere: the CPU's training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import handed_metrics
from tests.helpers.gpus import are_real, emulated, on_gpus, run_recipe
from tests.helpers.harness import ROOT, assert_equal, clean_environment, result, tensors_of, verify_rows
from tests.helpers.processes import free_port

PROVEN = set(
    "activation_checkpointing comm_hooks context_parallel data_parallel ddp deepspeed_zero expert_parallel fsdp "
    "grad_accumulation lightning_fabric lightning_trainer local_sgd lora model_parallel parallel_mesh pipeline_parallel "
    "sync_batchnorm tensor_parallel transfer_learning zero1".split()
)
SOME = "ddp fsdp pipeline_parallel tensor_parallel".split()  # a kind of communication each
SMALL = ["precision=fp64", "model.norm=group", "global_batch_size=8", "log_every=1", "eval_every=0", "threads=1"]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def train(recipe: str, count: int, out: str, *words: str, cwd: Path, cpu: bool = False, **environment: str) -> str:
    """What the command says of a run in `out`; it must end well."""
    done = run_recipe(recipe, count, *words, f"out={out}", cwd=cwd, cpu=cpu, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(found: list[float], expected: list[float], gpus: int) -> bool:
    """To the last digit, where the CPU's kernels compute both."""
    return len(found) == len(expected) and found == (pytest.approx(expected, rel=1e-8) if are_real(gpus) else expected)


def test_ddp_over_nccl_trains_what_the_cpu_trains(tmp_path: Path) -> None:
    words = [*SMALL, "nproc=2", "max_steps=4"]
    train("ddp", 2, "gpu", *words, cwd=tmp_path)
    found = result(tmp_path / "gpu")
    assert (found["device"], found["backend"], found["world_size"]) == ("cuda", "nccl", 2)
    train("ddp", 2, "cpu", *words, cwd=tmp_path, cpu=True)
    assert result(tmp_path / "cpu")["device"] == "cpu"
    assert same(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), 2)


@pytest.mark.slow
@pytest.mark.soak_for("2-2-all", "4-4-all")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("count", "ranks", "names"),
    [
        pytest.param(2, 2, SOME, id="2-2-some"),
        pytest.param(2, 2, [], id="2-2-all"),
        pytest.param(4, 4, [], id="4-4-all"),
        pytest.param(4, 2, ["model_parallel", "data_parallel"], id="4-2-in one process"),
    ],
)
def test_every_recipe_is_proven_on_gpus(count: int, ranks: int, names: list[str], tmp_path: Path) -> None:
    words = [f"nproc={ranks}", "precision=fp64", *[f"recipes=[{','.join(names)}]"] * bool(names), "out=run"]
    done = run_recipe("verify", count, *words, cwd=tmp_path, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = verify_rows(tmp_path / "run")
    assert {row["recipe"] for row in rows if row["verdict"] == "equal"} == (set(names) or PROVEN - {"deepspeed_zero"})
    assert {row["recipe"] for row in rows if row["verdict"] != "equal"} <= {"deepspeed_zero"}, "which has no fp64"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "fsdp", "pipeline_parallel", "lightning_trainer"])
def test_a_run_in_two_parts_is_the_run_in_one(recipe: str, tmp_path: Path) -> None:
    words = [*SMALL, "nproc=2", "checkpoint.every=2", "optim=adamw", "optim.warmup_steps=0"]
    for out, stops in {"parts": (3, 6), "whole": (6,)}.items():
        for steps in stops:
            train(recipe, 2, out, *words, f"max_steps={steps}", cwd=tmp_path)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000003"
    assert len(losses(tmp_path / "parts")) == 6
    assert same(losses(tmp_path / "parts"), losses(tmp_path / "whole"), 2)


@pytest.mark.slow
def test_metrics_of_torchmetrics_are_reckoned_on_gpus(tmp_path: Path) -> None:
    words = [f"task={handed_metrics.__file__}:Handed", "precision=fp64", "global_batch_size=24", "max_steps=4"]
    words += ["eval_batch_size=7", "nproc=2", "threads=1"]
    for where in ("gpu", "cpu"):
        train("ddp", 2, where, *words, cwd=tmp_path, cpu=where == "cpu")
    found, expected = (
        {name: value for name, value in result(tmp_path / where).items() if name.startswith("eval_")}
        for where in ("gpu", "cpu")
    )
    assert {"eval_auroc", "eval_f1", "eval_calibration", "eval_spread"} <= found.keys()
    assert found == (pytest.approx(expected, rel=1e-8) if are_real(2) else expected)


# Devices ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recipes_of_one_process_keep_to_their_device(tmp_path: Path) -> None:
    """device=cpu is not two GPUs, and what one process does on several has the memory and generators of each."""
    words = [*SMALL, "max_steps=1", "checkpoint.every=1"]
    said = train("model_parallel", 2, "cpu", *words, "device=cpu", cwd=tmp_path)
    assert "on cpu" in said
    assert "cuda" not in said
    assert json.loads((tmp_path / "cpu" / "environment.json").read_text())["devices"] == [], "it has asked no GPU"
    train("model_parallel", 2, "gpu", *words, cwd=tmp_path)
    saved = tensors_of(tmp_path / "gpu" / "checkpoints" / "step-00000001")
    assert {"rng.0.cuda", "rng.0.cuda 1"} <= saved.keys()


@pytest.mark.slow
def test_ranks_that_disagree_about_their_devices_are_named(tmp_path: Path) -> None:
    """Two of a GPU each, started by hand: one that has none, and two that have the same."""
    cases = {
        ("0", ""): "device=auto: rank 1 (HERE) sees no CUDA device, and the others do; set device=cpu, or start",
        ("1", "1"): "ranks 0 (HERE), 1 (HERE) have one GPU (",
    }
    for visible, words in cases.items():
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "recipes.ddp", *SMALL, "max_steps=1", "out=run"],
                cwd=tmp_path,
                env=clean_environment() | emulated(2) | place | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": gpu},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, gpu in enumerate(visible)
        ]
        for process in ranks:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 2, said
            assert re.sub(r"\([^()]*\)", "(HERE)", said, count=words.count("HERE")).startswith(f"error: {words}"), said
            assert said.count("\n") == 1
        assert list(tmp_path.iterdir()) == [], "nothing may be created"


@pytest.mark.slow
def test_gloo_between_gpus_is_refused_where_it_cannot_carry(tmp_path: Path) -> None:
    done = run_recipe("pipeline_parallel", 2, *SMALL, "nproc=2", "backend=gloo", "out=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: backend=gloo: cannot send activations from one GPU to another"), done.stderr
    assert list(tmp_path.iterdir()) == []


# Waiting ---------------------------------------------------------------------------------------------------------------

WAITS = """
import os, warnings

import torch

from lockstep.training.evaluate import Tally

heard = []


def listen(really):
    torch.cuda.set_sync_debug_mode("warn" if really else "default")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", "called a synchronizing")
    warnings.showwarning = lambda message, kind, file, line, *more: heard.append(f"{message} at {file}:{line}")


def hook(run):
    if "OF_EVALUATION" in os.environ:
        return
    listen(3 <= run.step < 6)
    if run.step == 6 and run.world.rank == 0:
        print("".join(f"WAITS {each}\\n" for each in heard) + "STEPS 3", flush=True)


batches, add = [], Tally.add


def add_and_listen(self, *args):
    batches.append(1)
    add(self, *args)
    listen(1 <= len(batches) < 4)
    if len(batches) == 4:
        print("".join(f"WAITS {each}\\n" for each in heard) + "STEPS 3", flush=True)


if "OF_EVALUATION" in os.environ:
    Tally.add = add_and_listen
"""


def host_waits_in_three_steps(folder: Path, *words: str, **environment: str) -> list[str]:
    """Where rank 0 of two waited for its GPU in three steady steps of recipes.ddp, or with OF_EVALUATION in three
    batches of an evaluation."""
    code, last = (ROOT / "recipes" / "ddp.py").read_text(), "        optimizer.zero_grad()\n"
    assert last in code
    (folder / "ddp.py").write_text(code.replace(last, last + "        __import__('hook').hook(run)\n"))
    (folder / "hook.py").write_text(WAITS)
    shape = ["nproc=2", "global_batch_size=8", "eval_every=0", "max_steps=7", "log_every=100"]
    quick = [] if are_real(2) else ["-m", "tests.helpers.quick"]
    done = on_gpus(2, *quick, "ddp.py", *shape, "out=run", *words, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    assert "STEPS 3" in done.stdout
    return re.findall(r"WAITS (.*)", done.stdout)


@pytest.mark.slow_except("bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(precision: str, tmp_path: Path) -> None:
    assert host_waits_in_three_steps(tmp_path, f"precision={precision}") == []


@pytest.mark.slow
def test_neither_a_logged_step_waits_nor_a_batch_of_an_evaluation(tmp_path: Path) -> None:
    """A loss is read one step later; how many images were taken for others is read when all of them are counted."""
    folders = [tmp_path / "logged", tmp_path / "evaluated"]
    for folder in folders:
        folder.mkdir()
    assert host_waits_in_three_steps(folders[0], "log_every=1") == []
    words = ["max_steps=1", "eval_batch_size=32"]
    assert host_waits_in_three_steps(folders[1], *words, OF_EVALUATION="1") == []


@pytest.mark.slow
def test_fp16_waits_once_per_step(tmp_path: Path) -> None:
    """Whether its gradients overflowed, which decides about the update."""
    found = host_waits_in_three_steps(tmp_path, "precision=fp16")
    assert len(found) == 3, found
    assert {"precision.py" in each for each in found} == {True}


@pytest.mark.slow
def test_a_step_that_waits_is_heard(tmp_path: Path) -> None:
    """Once a step: the NaN guard asks all ranks whether all numbers are finite."""
    found = host_waits_in_three_steps(tmp_path, "gradients.stop_on_nan=true")
    assert found


# Copies to the host ------------------------------------------------------------------------------------------------------

SAVES = [*SMALL, "checkpoint.every=2", "checkpoint.keep=3"]


def checkpoint(out: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: x for name, x in tensors_of(out / "checkpoints" / f"step-{step:08}").items() if "rng." not in name}


@pytest.mark.slow
def test_two_gpus_save_beside_training_and_resume(tmp_path: Path) -> None:
    """Every one of the checkpoints: the first is copied by torch's stager, the others by one call for all tensors."""
    for steps in (6, 7):
        said = train("model_parallel", 2, "gpu", *SAVES, f"max_steps={steps}", cwd=tmp_path)
    assert "on cuda:0" in said
    assert "on cuda:1" in said
    assert result(tmp_path / "gpu")["resumed_from"] == "checkpoints/step-00000006"
    train("model_parallel", 2, "cpu", *SAVES, "max_steps=7", cwd=tmp_path, cpu=True)
    assert same(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), 2)
    if not are_real(2):
        for step in (4, 6):
            assert_equal(checkpoint(tmp_path / "gpu", step), checkpoint(tmp_path / "cpu", step))


@pytest.mark.slow
def test_a_copy_that_is_read_too_early_is_seen(tmp_path: Path) -> None:
    """With no patience for the GPUs, their checkpoints hold what was in the host's memory before."""
    if are_real(2):
        pytest.skip("a real GPU may be quick enough")
    words = [*SAVES, "max_steps=4"]
    train("model_parallel", 2, "patient", *words, cwd=tmp_path)
    train("model_parallel", 2, "hasty", *words, cwd=tmp_path, HASTY="1")
    hasty, patient = (checkpoint(tmp_path / out, 4) for out in ("hasty", "patient"))
    assert any(not hasty[name].equal(tensor) for name, tensor in patient.items())


# Memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_does_not_fit_ends_with_one_page(tmp_path: Path) -> None:
    words = [*SMALL, "nproc=2", "global_batch_size=1024", "model.image_size=64", "max_steps=2"]
    done = run_recipe("ddp", 2, *words, "out=run", cwd=tmp_path, **emulated(2, mib=256))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    page = json.loads((tmp_path / "run" / "out_of_memory.json").read_text())
    assert page["step"] == 1


@pytest.mark.soak
def test_the_largest_batch_for_a_gpu_is_found(tmp_path: Path) -> None:
    words = ["nproc=2", "global_batch_size=auto", "model.image_size=64", "max_steps=2", "threads=1"]
    done = run_recipe("ddp", 2, *words, "out=run", cwd=tmp_path, timeout=400, **emulated(2, mib=512))
    assert done.returncode == 0, done.stdout + done.stderr
    found = int(done.stdout.partition("global_batch_size=auto: ")[2].partition(",")[0])
    assert 8 <= found < 1437, "a card of 512 MiB does not hold all images at once"
    assert "out of memory" in done.stdout + done.stderr, "a larger one was tried"


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_started_by_hand_ends_them_all(tmp_path: Path) -> None:
    """Nobody ends rank 0, and nothing tells it but rank 1 itself: rank 1's connections stay open."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [*SMALL, "global_batch_size=1024", "model.image_size=64", "max_steps=2", "timeout_seconds=600", "out=run"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.quick", "recipes.ddp", *words],
            cwd=tmp_path,
            env=clean_environment()
            | emulated(2, mib)
            | place
            | {"RANK": str(rank)}
            | ({"LINGER": "1"} if rank else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, mib in enumerate((4096, 64))
    ]
    try:
        _, said = ranks[0].communicate(timeout=100)
        page = ranks[1].stderr.readline() if ranks[1].stderr else ""
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1, said
    assert re.fullmatch(
        r"rank 0 stopped because another rank did: rank 1 \(.*\) failed in step \d \(.*\): "
        r"OutOfMemory: out of memory on rank 1 .*\n",
        said,
    ), said
    assert page.startswith("error: out of memory on rank 1 (cuda:1) in step 1"), page


@pytest.mark.slow
def test_a_pipeline_s_rank_holds_its_own_stages_alone(tmp_path: Path) -> None:
    """The model is 44 MiB; while it is cut, measured, trained, evaluated and exported, other stages are on the host."""
    words = ["nproc=2", "global_batch_size=8", "eval_batch_size=8", "max_steps=2", "eval_every=0", "threads=1"]
    done = on_gpus(2, "-m", "recipes.pipeline_parallel", *words, "out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path / "run")
    peak = found["peak_memory_bytes_by_rank"][0]  # the first stage's, which has 3 MiB of weights
    assert 3 < peak / 2**20 < 20


@pytest.mark.soak
def test_the_doctor_looks_at_the_gpus(tmp_path: Path) -> None:
    done = run_recipe("doctor", 2, "preflight", "nproc=2", "out=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# Waiting for another rank ------------------------------------------------------------------------------------------------


def test_a_hang_in_nccl_ends_with_who_and_where(tmp_path: Path) -> None:
    """Long before NCCL's own limit, which ends the process without a word, the flight recorder tells of the collective."""
    words = ["-m", "tests.helpers.quick"] * (not are_real(2)) or ["-m"]
    words += ["tests.helpers.hanging", "nproc=2", "timeout_seconds=3", "max_steps=6", "out=run"]
    done = on_gpus(2, *words, cwd=tmp_path, timeout=50, HOW="sleep", WHO="1")
    assert done.returncode == 1, done.stdout + done.stderr
    said = r"error: rank 1 \(.*\) has not reached all_reduce no. \d+ of \[490\], in which rank 0 \(.*\) waited for"
    assert re.search(said, done.stderr), done.stderr
