"""What a checkpoint survives: damaged files, kills at every call, two starts.

A damaged checkpoint is passed over, and said so; what follows is in any case the run that nothing befell, bit by bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.checkpoint.dcp import load_tensors
from lockstep.checkpoint.directory import (
    UNFINISHED,
    find_newest,
    folder_name,
    list_checkpoints,
    read_pointer,
    repair,
    seal_manifest,
)
from lockstep.checkpoint.saver import CheckpointSaver
from lockstep.config.run_directory import read_result
from lockstep.distributed.process_group import join_process_group
from lockstep.errors import UserError
from tests.helpers.checkpointed_run import (
    NUMBERS,
    RUN,
    again,
    contents,
    resumed_from,
)
from tests.helpers.fuzz.damage import flipped
from tests.helpers.fuzz.plans import SIZE, STEPS, Fault, Setup
from tests.helpers.fuzz.results import Result, compare, first_difference, result_of
from tests.helpers.fuzz.starts import start, start_ranks
from tests.helpers.fuzz.strikes import strike_at_call
from tests.helpers.harness import tensors_of
from tests.helpers.processes import wait_until

# Damaged files ----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) // 2))


def flip_a_number(path: Path) -> None:
    """A manifest that still is JSON, and says something else."""
    text = path.read_text()
    assert '"samples_seen": 576' in text
    path.write_text(text.replace('"samples_seen": 576', '"samples_seen": 572'))


def newer_format(path: Path) -> None:
    path.write_text(seal_manifest(json.loads(path.read_text()) | {"format": 2}))


HARMS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated shard": ("__1_0.distcp", truncate, "__1_0.distcp has "),
    "bit flip in a shard": ("__0_0.distcp", flip, "__0_0.distcp has changed since it was written (SHA-256)"),
    "truncated .metadata": (".metadata", truncate, ".metadata has "),
    "bit flip in .metadata": (".metadata", flip, ".metadata has changed since it was written (SHA-256)"),
    "bit flip in the manifest": ("manifest.json", flip_a_number, "manifest.json has changed since it was written"),
    "no JSON in the manifest": ("manifest.json", truncate, "manifest.json is not JSON"),
    "no text in the manifest": (
        "manifest.json",
        lambda path: path.write_bytes(b"\xff\xfe"),
        "manifest.json is not JSON",
    ),
    "a list in the manifest": ("manifest.json", lambda path: path.write_text("[]"), "manifest.json has changed"),
    "a later version's manifest": ("manifest.json", newer_format, "format 2, this version reads 1"),
    "missing shard": ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    "missing .metadata": (".metadata", Path.unlink, ".metadata is missing"),
    "missing manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
}


def test_every_damage_is_found_and_named(finished: Path, tmp_path: Path) -> None:
    for harm, (file, damage, words) in HARMS.items():
        folder = shutil.copytree(finished / "checkpoints", tmp_path / harm)
        damage(folder / folder_name(16) / file)
        _, (newest, skipped) = alone(newest_of, folder)
        assert newest == folder_name(12), harm
        assert len(skipped) == 1, harm
        assert skipped[0].startswith(f"step-00000016: {words}"), harm


def newest_of(folder: Path) -> tuple[str | None, list[str]]:
    """What a start finds there, and passes over."""
    found = find_newest(folder)
    return found.path and found.path.name, found.skipped


def mend(folder: Path) -> None:
    repair(folder, find_newest(folder))


def test_a_damaged_checkpoint_is_passed_over_by_name(cut_off: Path, whole: Result) -> None:
    file, damage, words = HARMS["bit flip in a shard"]
    folder = cut_off / "checkpoints"
    damage(folder / folder_name(16) / file)
    intact = contents(folder, (4, 8, 12))
    ended = again(cut_off)
    assert ended.said.count("skipped ") == 1
    assert f"skipped step-00000016: {words}" in ended.said
    assert resumed_from(cut_off) == folder_name(12)
    assert "resuming from" in ended.said
    assert ended.said.index("skipped ") < ended.said.index("resuming from")
    assert compare(result_of(cut_off), whole, best=False) == ""
    assert contents(folder, (4, 8, 12)) == intact, "a checkpoint that is intact is never written again"
    assert (folder / "broken-step-00000016").is_dir(), "what is broken is set aside, not deleted"
    assert read_pointer(folder, "LATEST") == folder / folder_name(16), "written anew"


@pytest.mark.slow
def test_where_no_checkpoint_is_intact_the_run_starts_anew_and_names_them_all(cut_off: Path, whole: Result) -> None:
    folder = cut_off / "checkpoints"
    flip(folder / folder_name(16) / "__0_0.distcp")
    truncate(folder / folder_name(12) / ".metadata")
    (folder / folder_name(8) / "manifest.json").unlink()
    shutil.rmtree(folder / folder_name(4))
    (folder / folder_name(4)).mkdir()
    ended = again(cut_off)
    said = [line.removeprefix("skipped ") for line in ended.said.splitlines() if line.startswith("skipped ")]
    assert [line.partition(":")[0] for line in said] == [folder_name(step) for step in (16, 12, 8, 4)]
    assert [line.partition(": ")[2].split()[0] for line in said] == [
        "__0_0.distcp",
        ".metadata",
        "manifest.json",
        "manifest.json",
    ]
    assert resumed_from(cut_off) is None
    assert compare(result_of(cut_off), whole, best=False) == ""


POINTERS: dict[str, tuple[bytes | None, bool]] = {  # what LATEST holds, and whether something is said of it
    "nowhere": (b"step-00000099\n", True),
    "garbled": (b"\xff\x00\n\x80", True),
    "longer than a name may be": (b"x" * 300, True),
    "a folder that is none": (b"../..\n", True),
    "empty": (b"", True),
    "an older one, as after a kill between two renames": (b"step-00000004\n", False),
    "missing": (None, False),
}


def test_latest_is_for_people_and_a_wrong_one_misleads_nobody(finished: Path, tmp_path: Path) -> None:
    for what, (pointer, said) in POINTERS.items():
        folder = shutil.copytree(finished / "checkpoints", tmp_path / what)
        (folder / "LATEST").unlink()
        if pointer is not None:
            (folder / "LATEST").write_bytes(pointer)
        _, (newest, skipped) = alone(newest_of, folder)
        assert newest == folder_name(16), what
        assert skipped == (["LATEST: names no checkpoint that is there"] if said else []), what
        alone(mend, folder)
        assert (folder / "LATEST").read_text() == "step-00000016\n", what


@pytest.mark.slow
def test_a_run_sets_a_garbled_latest_right(cut_off: Path, whole: Result) -> None:
    file = cut_off / "checkpoints" / "LATEST"
    file.write_bytes(POINTERS["garbled"][0] or b"")
    ended = again(cut_off)
    assert resumed_from(cut_off) == folder_name(16)
    assert "skipped LATEST" in ended.said
    assert file.read_text() == "step-00000016\n"
    assert compare(result_of(cut_off), whole, best=False) == ""


@pytest.mark.slow
def test_what_a_killed_save_left_is_removed_and_in_nobody_s_way(cut_off: Path, whole: Result) -> None:
    """Its name is the one under which the step is going to be saved again."""
    folder = cut_off / "checkpoints"
    (folder / folder_name(16)).rename(folder / f"{UNFINISHED}step-00000016")
    (folder / f"{UNFINISHED}step-00000016" / "manifest.json").unlink()
    shutil.copytree(folder / folder_name(8), folder / f"{UNFINISHED}step-00000020")
    again(cut_off)
    assert resumed_from(cut_off) == folder_name(12)
    assert not list(folder.glob(f"{UNFINISHED}*"))
    assert compare(result_of(cut_off), whole, best=False) == ""


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    setup = Setup("ddp", 2, NUMBERS, ("checkpoint.every=3", "checkpoint.keep=2", "checkpoint.best=true"))
    again(out, setup)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = {line["step"]: line["eval_accuracy"] for line in log if "eval_accuracy" in line}
    best = max(accuracy, key=lambda step: accuracy[step])  # the first of equals
    assert best < 15, "or the best would be among the newest, and this no test"
    folder = out / "checkpoints"
    assert {path.name for path in list_checkpoints(folder)} == {folder_name(step) for step in (16, 15, best)}
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("step-")) == ["BEST", "LATEST"]
    assert read_pointer(folder, "BEST") == folder / folder_name(best)
    tensors = tensors_of(folder / folder_name(best))
    kept = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    assert first_difference(torch.load(out / "best.pt", weights_only=True), kept) == ""
    assert first_difference(torch.load(out / "model.pt", weights_only=True), kept) != ""


@pytest.mark.slow
def test_a_best_checkpoint_that_broke_costs_best_pt_and_is_named(tmp_path: Path) -> None:
    """It is older than the one that the run goes on from, so nothing has looked at it before."""
    out = tmp_path / "out"
    setup = Setup("ddp", 2, NUMBERS, ("checkpoint.every=3", "checkpoint.keep=1", "checkpoint.best=true"))
    again(out, setup)
    best = read_pointer(out / "checkpoints", "BEST")
    assert best is not None
    assert best.name != folder_name(16)
    flip(best / "__0_0.distcp")
    for file in ("result.json", "model.pt", "best.pt"):
        (out / file).unlink()
    ended = again(out, setup)
    assert best.name in ended.said
    assert not (out / "best.pt").exists()
    assert (out / "model.pt").exists()


# Kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_counts_from_its_rename_on(tmp_path: Path, whole: Result) -> None:
    """LATEST follows the rename; a kill between them loses nothing."""
    out = tmp_path / "out"
    ended = start(RUN, out, Fault(signal.SIGKILL, rank=0, call=2, at="open .LATEST"))
    assert ended.codes[0] == -signal.SIGKILL
    assert "open .LATEST" in ended.hit
    again(out)
    assert resumed_from(out) == folder_name(8)
    assert compare(result_of(out), whole, best=False) == ""


@pytest.mark.slow
def test_a_run_that_stopped_early_and_was_killed_then_stays_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    setup = Setup("single", 1, (*SIZE, "patience=1"), ("checkpoint.every=3",))
    again(out, setup)
    before = result_of(out)
    last = read_result(out)["steps"]
    assert last < STEPS, "or it did not stop early"
    (out / "result.json").unlink()
    again(out, setup)
    assert (resumed_from(out), read_result(out)["steps"]) == (folder_name(last), last)
    assert compare(result_of(out), before, best=False) == ""


def save_steps(folder: Path, steps: tuple[int, ...], fault: Fault, hit: Any) -> None:
    """On one rank: save under these step numbers, the best among them, and have the fault strike in the last save."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointSaver(folder / "checkpoints", asynchronous=False, keep=1, warn=print)
    for step in steps:
        if step == steps[-1]:
            strike_at_call(fault, folder / "checkpoints", hit)
        checkpoints.save({"weights": torch.full((1000,), float(step))}, {"step": step, "best_step": step}, best=True)


def find(folder: Path) -> tuple[int, Tensor, list[str]]:
    """As a start does: the step found, the tensor in it, and what is left in the folder when it is tidy."""
    found = find_newest(folder / "checkpoints")
    assert found.path is not None
    repair(folder / "checkpoints", found)
    weights = torch.zeros(1000)
    load_tensors(found.path, {"weights": weights})
    return found.facts["step"], weights, sorted(os.listdir(folder / "checkpoints"))


def alone(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """Call a function on one forked rank: (exit code, what it returned)."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def body() -> None:
        store = dist.HashStore()
        join_process_group(store, 0, 1, device="cpu", backend="gloo", timeout_seconds=30, threads=1)
        try:
            answer = (None, pickle.dumps(function(*args)))
        except BaseException:
            answer = (traceback.format_exc(), b"")
        writer.send(answer)
        os._exit(0)

    process = context.Process(target=body)
    process.start()
    writer.close()
    error, value = None, None
    try:
        error, answer = reader.recv()
        value = pickle.loads(answer) if not error else None
    except EOFError:
        pass  # it was killed
    process.join(30)
    assert not error, error
    assert process.exitcode is not None
    return process.exitcode, value


@pytest.mark.slow
def test_a_kill_at_any_call_of_a_save_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    """Every file-system call of a save that commits, moves BEST and prunes, one after the other."""
    hit: Any = multiprocessing.get_context("fork").RawArray("c", 512)
    seen = []
    for call in range(1, 200):
        folder = tmp_path / str(call)
        hit.value = b""
        code, _ = alone(save_steps, folder, (1, 2), Fault(signal.SIGKILL, call=call, after=call % 2 == 0), hit)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        seen.append(hit.value.decode())
        _, (step, weights, left) = alone(find, folder)
        assert weights.eq(step).all(), seen[-1]
        assert step == 2 or not any("LATEST" in what for what in seen), seen[-1]
        kept = {name for name in left if not name.startswith((".LATEST.", ".BEST."))} - {"BEST", "LATEST"}
        assert kept in ({folder_name(step)}, {folder_name(step), folder_name(1)}), seen[-1]
        shutil.rmtree(folder)
    done = " ".join(seen)
    assert 20 < len(seen) < 60, seen
    assert all(part in done for part in (".distcp", "manifest", ".metadata", "LATEST", "BEST", "rmdir", "rename")), done


@pytest.mark.slow
def test_two_starts_on_one_run_do_not_meet(tmp_path: Path) -> None:
    """The second one is refused in one line, and changes nothing that the first one works with."""
    out = tmp_path / "out"
    long = Setup("ddp", 2, (*NUMBERS, "epochs=1000"), ("checkpoint.every=50",))
    refusal = f"out={out}: another process is training there; wait for its end, or name another out"
    first = multiprocessing.get_context("fork").Process(target=start, args=(long, out))
    first.start()
    try:
        wait_until(lambda: (out / "metrics.jsonl").exists() and bool((out / "metrics.jsonl").read_text()))
        config = (out / "config.yaml").read_text()
        # A key that may change between two starts, so that this is a start that goes on with the run.
        with pytest.raises(UserError) as refused:
            start(Setup("ddp", 2, long.words, ("checkpoint.every=60",)), out)
        assert str(refused.value) == refusal
        # And ranks that somebody starts by hand, past the process that would have said so.
        (tmp_path / "scratch").mkdir()
        ended = start_ranks(long.target, 2, out, tmp_path / "scratch", Fault(), 1.0)
        assert ended.codes[0] == 2, ended.said
        assert [line for line in ended.said.splitlines() if line.startswith("error: ")] == [f"error: {refusal}"]
        assert "Traceback" not in ended.said
        lines = len((out / "metrics.jsonl").read_text().splitlines())
        wait_until(lambda: len((out / "metrics.jsonl").read_text().splitlines()) > lines + 2)  # the first trains on
        assert (out / "config.yaml").read_text() == config, "a restart of the first would read the second's settings"
        assert not (out / "result.json").exists(), "the first has not ended"
    finally:
        first.kill()  # and the kernel its ranks
        first.join()
