"""`global_batch_size=auto` finds a batch that trains where a clearly larger one does not; out of memory ends with one page."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.config.copies import with_values
from lockstep.config.schema import Config, shared_part
from lockstep.diagnose import out_of_memory
from lockstep.distributed.process_group import World
from lockstep.errors import CheckFailed
from lockstep.launch import batch_size
from lockstep.memory.usage import process_bytes
from recipes import ddp
from tests.helpers.harness import _train as train_in_a_rank
from tests.helpers.harness import clean_environment, command, compose_config, run_ranks
from tests.helpers.processes import TORCHRUN, free_port, processes_in, wait_until

pytestmark = pytest.mark.usefixtures("narrow")


# The search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_the_search_ends_close_to_the_largest_that_fits(seed: int) -> None:
    """On a line with noise, and with or without a word of the peak of what did not fit."""
    draw = random.Random(seed)
    base, slope = draw.uniform(100, 2000), draw.uniform(0.1, 60)
    room, most = int(draw.uniform(300, 40_000)), batch_size.round_to_eight(draw.randint(1, 5000))
    smallest, first = draw.choice([1, 1, 2]), draw.choice([1, 4, 16])
    trials: dict[int, batch_size.Trial] = {}

    def fits(count: int) -> bool:
        assert smallest <= count <= max(smallest, most)
        assert count not in trials, "nothing is tried twice"
        peak = int((base + slope * count) * draw.uniform(0.99, 1.01))
        silent = peak > room and draw.random() < 0.5
        trials[count] = batch_size.Trial(peak <= room, None if silent else peak, room)
        return peak <= room

    found = batch_size.search(fits, trials, smallest, max(smallest, most), first)
    assert len(trials) <= 14
    largest = (room - base) / slope
    if found is None:
        assert largest < smallest * 1.5
        return
    assert trials[found].fits
    assert found == batch_size.round_to_eight(found)
    assert found >= min(most, 0.85 * largest - 8)


# Real trials, with real memory ------------------------------------------------------------------------------------


def forked(out: Path, variables: dict[str, str]) -> int:
    """Two ranks, as a launcher would start them, without the seconds of an interpreter."""
    os.environ.update(variables)
    try:
        run_ranks(train_in_a_rank, 2, "recipes.ddp", (out / "config.yaml").read_text(), str(out), timeout=100)
    except AssertionError as error:
        os.write(2, str(error).encode())
        return 1
    return 0


def base_of_a_rank(world: World) -> int:
    return process_bytes("VmRSS")


@pytest.mark.slow
def test_the_batch_that_is_found_trains_and_a_larger_one_does_not(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """The ranks may have 250 MiB more than they start with."""
    room = max(run_ranks(base_of_a_rank, 2)) + 250 * 2**20
    monkeypatch.setattr(batch_size, "host_bytes", lambda: 2 * room)
    monkeypatch.setattr(batch_size, "group_bytes", list)
    monkeypatch.setattr(batch_size, "SLACK", 2**27)
    words = [
        "global_batch_size=auto",
        "memory_fraction=1.0",
        "model.image_size=48",
        "eval_batch_size=32",
        "model.norm=group",
    ]
    config = compose_config(ddp.train, *words)
    size = batch_size.find_batch_size(config, ddp.train, 2, forked)
    said = capfd.readouterr()
    assert f"global_batch_size=auto: {size}, {size // 2} images on each of 2: " in said.out
    assert said.err.count("tried") >= 2
    assert 8 <= size < 1437
    short, *_ = batch_size.first_allowed(config, ddp.train, 2, 2)
    larger = 3 * size  # what a copy of this process has to begin with changes by the images of half a batch
    assert batch_size.attempt(short, ddp.train, size, room, forked, tmp_path).peak < 1.05 * room
    assert not batch_size.attempt(short, ddp.train, larger, room, forked, tmp_path).fits


def test_a_trial_that_fails_of_something_else_is_no_answer(tmp_path: Path) -> None:
    config = compose_config(ddp.train, "global_batch_size=auto")

    def broken(out: Path, variables: dict[str, str]) -> int:
        os.write(2, b"error: the cause\n")
        return 3

    with pytest.raises(CheckFailed, match="a trial with global_batch_size=32 failed: error: the cause"):
        batch_size.find_batch_size(config, ddp.train, 2, broken)


def test_a_run_that_goes_on_keeps_its_batch(tmp_path: Path) -> None:
    config = compose_config(ddp.train, "global_batch_size=auto", f"out={tmp_path}")
    (tmp_path / "config.yaml").write_text("# recipe: ddp\nglobal_batch_size: 44\n")
    assert batch_size.find_batch_size(config, ddp.train, 2, lambda *_: 1) == 44


@pytest.mark.soak
def test_as_a_user_types_it(tmp_path: Path) -> None:
    words = ["global_batch_size=auto", "model.image_size=16", "max_steps=1", "out=run"]
    done = command("-m", "recipes.ddp", *words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    size = shared_part((tmp_path / "run" / "config.yaml").read_text()).global_batch_size
    assert f"global_batch_size=auto: {size}, {size // 2} images on each of 2" in done.stdout


@pytest.mark.slow
def test_a_signal_ends_the_trial_and_leaves_nothing(tmp_path: Path) -> None:
    environment = clean_environment() | {"TMPDIR": str(tmp_path)}
    words = [sys.executable, "-m", "recipes.ddp", "global_batch_size=auto", f"out={tmp_path}/run"]
    with subprocess.Popen(words, cwd=tmp_path, env=environment) as process:
        wait_until(lambda: list(tmp_path.glob("lockstep-*/*/ranks/1.log")), 120)
        process.terminate()
        assert process.wait(timeout=60) == 143
        wait_until(lambda: not processes_in(tmp_path), 30)
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.glob("lockstep-*/*/model.pt")) == []


@pytest.mark.slow
def test_ranks_that_are_started_already_refuse_in_one_line(tmp_path: Path) -> None:
    words = [
        "--nproc-per-node=1",
        f"--master-port={free_port()}",
        "-m",
        "recipes.ddp",
        "global_batch_size=auto",
        "out=run",
    ]
    done = command(*TORCHRUN[1:], *words, cwd=tmp_path)
    assert done.returncode != 0
    assert (
        "error: global_batch_size=auto: is found by a command that starts its ranks on its own machine" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


# Out of memory ----------------------------------------------------------------------------------------------------

NO_ROOM = '''
"""ddp, whose rank 1 may take 200 MiB more than it has when it begins."""
import resource
import sys

from lockstep import Run, recipe
from lockstep.memory.usage import process_bytes
from recipes import ddp


@recipe(config=ddp.train.config)
def train(run: Run) -> None:
    if run.world.rank == 1:
        room = process_bytes("VmData") + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    ddp.train.train(run)


if __name__ == "__main__":
    train.main()
'''


def test_out_of_memory_ends_with_one_page(tmp_path: Path) -> None:
    (tmp_path / "no_room.py").write_text(NO_ROOM)
    words = ["model.image_size=32", "global_batch_size=128", "optim=adamw", "out=run"]
    began = time.monotonic()
    done = command("no_room.py", *words, cwd=tmp_path, timeout=150)
    assert done.returncode == 1
    assert time.monotonic() - began < 140, "the other rank does not wait for a collective's time-out"
    assert done.stderr.count("error: out of memory on rank 1 (cpu) in step 1, in forward, at ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "ddp.py:" in done.stderr
    assert "Traceback" in (tmp_path / "run" / "ranks" / "1.log").read_text()
    figures = json.loads((tmp_path / "run" / "out_of_memory.json").read_text())
    assert figures["asked_bytes"] > 0
    assert figures["held_bytes"]["parameters"] == pytest.approx(4 * 11_173_962, rel=0.01)
    assert 0 < figures["held_bytes"]["activations and the rest"] < 600 * 2**20
    knobs = [(knob["setting"], knob["saves"]) for knob in figures["knobs"]]
    assert [name for name, _ in knobs] == ["accumulate=2", "precision=bf16", "recipes.fsdp"]
    for name, saves in knobs:
        assert f"{saves / 2**20:,.1f}  {name}" in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def knobs_of(world: World, config: Config, *more: Any) -> list[tuple[str, int]]:
    return [(knob.setting, knob.saves) for knob in out_of_memory.knobs(config, *more)]


def test_the_knobs_fit_the_config_and_the_largest_comes_first() -> None:
    """Few images of a wide model: the state is what counts; and what a config has already is not offered again."""
    config = Config(global_batch_size=4)
    config.model.num_classes, config.model.image_size, config.optim.name = 10, 64, "adamw"
    bf16 = with_values(config, {"precision": "bf16", "global_batch_size": 64, "optim.name": "sgd"})
    many = with_values(config, {"global_batch_size": 256, "accumulate": 4})
    cases = [(config, "ddp", 2, 2, "forward", "cpu"), (bf16, "fsdp", 2, 2, "forward", "cpu")]
    cases += [(many, "ddp", 4, 4, "backward", "cpu"), (config, "ddp", 2, 2, "evaluation", "cpu")]
    few, sharded, again, evaluation = (run_ranks(knobs_of, 1, *case)[0] for case in cases)
    for found in (few, sharded, again, evaluation):
        assert 1 <= len(found) <= 3
        assert [saves for _, saves in found] == sorted((saves for _, saves in found), reverse=True)
    assert dict(few).keys() >= {"accumulate=2", "recipes.fsdp"}
    assert [name for name, _ in sharded] == ["accumulate=2"]
    assert "accumulate=8" in dict(again)
    assert "eval_batch_size=64" in dict(evaluation)


CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.20 GiB is free."
)


def test_what_means_that_there_is_no_memory() -> None:
    cpu = torch.device("cpu")
    allocator = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9437184 bytes. Error code 12"
    for error in (MemoryError(), torch.OutOfMemoryError(CUDA), RuntimeError(allocator), RuntimeError("std::bad_alloc")):
        assert out_of_memory.is_out_of_memory(error, cpu)
    for other in (RuntimeError("shape '[2]' is invalid"), ValueError(allocator), KeyError("memory")):
        assert not out_of_memory.is_out_of_memory(other, cpu)
    assert out_of_memory.asked_for(RuntimeError(allocator)) == 9437184
    assert out_of_memory.asked_for(torch.OutOfMemoryError(CUDA)) == int(2.5 * 2**30)
    assert out_of_memory.asked_for(MemoryError()) is None
