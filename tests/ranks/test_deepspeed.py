"""DeepSpeed: every ZeRO stage trains what DDP does, holds only its part, and goes on from what it has saved."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.checkpoint import dcp
from lockstep.checkpoint.directory import fingerprint, list_checkpoints, seal_manifest
from lockstep.verify.trace import difference
from recipes import ddp, deepspeed_zero
from tests.helpers.harness import command, lines, preload, result, train

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("data=synthetic", "data.size=48", "data.image_size=8", "global_batch_size=12", "epochs=2")  # 4 steps per epoch
WORDS = (*DATA, "log_every=1", "optim.warmup_steps=2", "checkpoint.every=4")
STAGES = {0: "adamw", 1: "sgd", 2: "adamw", 3: "sgd"}

Tensors = dict[str, Tensor]
Fit = Callable[..., tuple[Tensors, Path]]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """fit(recipe, *overrides): the exported weights and the run directory of two ranks; each trained once."""
    done: dict[Any, tuple[Tensors, Path]] = {}

    def fitted(recipe: Any, *words: str) -> tuple[Tensors, Path]:
        if (recipe.name, words) not in done:
            out = tmp_path_factory.mktemp(recipe.name) / "run"
            done[recipe.name, words] = train(recipe, out, 2, *WORDS, *words), out
        return done[recipe.name, words]

    return fitted


def stage_words(stage: int) -> tuple[str, ...]:
    return f"stage={stage}", f"optim={STAGES[stage]}"


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow_except("1")
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_what_ddp_does_to_the_last_bit(stage: int, fit: Fit) -> None:
    """Weights, losses, evaluations and the learning rate, which comes from run.steps."""
    weights, out = fit(deepspeed_zero.train, *stage_words(stage))
    expected, theirs = fit(ddp.train, f"optim={STAGES[stage]}")
    assert same(weights, expected)
    assert lines(out) == lines(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_ragged_micro_batches_count_for_what_they_are(stage: int, fit: Fit, tmp_path: Path) -> None:
    """7 images in micro-batches of 2, 2, 2 and 1, which 1 / 4 each would get wrong."""
    words = ("model.norm=group", "global_batch_size=14", "accumulate=4", "max_steps=3")
    found = train(deepspeed_zero.train, tmp_path / "run", 2, *WORDS, f"stage={stage}", *words)
    expected, theirs = fit(ddp.train, *words)
    assert losses(tmp_path / "run") == pytest.approx(losses(theirs), rel=1e-4)
    assert difference(found, expected) < 1e-3


@pytest.mark.slow
def test_offload_changes_nothing_but_the_place(fit: Fit, tmp_path: Path) -> None:
    found = train(deepspeed_zero.train, tmp_path / "run", 2, *WORDS, *stage_words(2), "offload=true")
    assert same(found, fit(ddp.train, "optim=adamw")[0])


@pytest.mark.slow
def test_a_rank_holds_only_its_part(fit: Fit) -> None:
    """Bytes of weights W: all of them, their gradients, and of the optimizer the moments and a copy of the weights."""
    weights, _ = fit(ddp.train, "optim=adamw")
    whole = sum(4 * tensor.numel() for name, tensor in weights.items() if not name.endswith(BUFFERS))
    for stage, (w, g, o) in {0: (1, 1, 2), 1: (1, 1 / 2, 1), 2: (1, 1 / 2, 3 / 2), 3: (1 / 2, 1 / 2, 1)}.items():
        found = result(fit(deepspeed_zero.train, *stage_words(stage))[1])
        for kind, share in {"weights": w, "gradients": g, "optimizer": o}.items():
            held = found[f"held_{kind}_bytes"]
            assert held == pytest.approx([share * whole] * 2, rel=0.1), f"{kind} in stage {stage}"
        moments = 2 if STAGES[stage] == "adamw" else 1
        assert found["state_bytes_by_rank"] == pytest.approx([(w + g + o) * whole] * 2, rel=0.1)
        assert found["state_bytes_unsharded"] == (2 + moments) * whole


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.soak_for("0", "1")
@pytest.mark.parametrize("stage", STAGES)
def test_other_ranks_go_on(stage: int, fit: Fit, tmp_path: Path) -> None:
    """2 → 3 → 1 → 2 ranks: what DeepSpeed saved is cut anew, with either optimizer."""
    words = (*WORDS, "model.norm=group", *stage_words(stage))
    for ranks, stop in ((2, 3), (3, 5), (1, 6), (2, 8)):
        parts = train(deepspeed_zero.train, tmp_path / "parts", ranks, *words, f"max_steps={stop}")
        assert result(tmp_path / "parts")["world_size"] == ranks
    expected, whole = fit(ddp.train, "model.norm=group", f"optim={STAGES[stage]}")
    assert losses(tmp_path / "parts") == pytest.approx(losses(whole), rel=1e-4)
    assert difference(parts, expected) < 1e-3


@pytest.mark.slow
def test_deepspeed_s_own_converter_makes_a_universal_checkpoint_of_it(fit: Fit, tmp_path: Path) -> None:
    """As its users call it: for AdamW, the one optimizer it knows."""
    weights, out = fit(deepspeed_zero.train, *stage_words(2))
    folder = list_checkpoints(out / "checkpoints")[0] / "deepspeed"
    words = ["--inject_missing_state", "--input_folder", str(folder), "--output_folder", str(tmp_path / "universal")]
    done = command("-m", "deepspeed.checkpoint.ds_to_universal", *words, "--num_merge_workers=1")
    assert done.returncode == 0, done.stderr
    from lockstep.integrations.deepspeed_files import load_checkpoint

    _, moments = load_checkpoint(folder)
    for name, states in moments.items():
        made = {file.stem: torch.load(file) for file in (tmp_path / "universal" / "zero" / name).glob("*.pt")}
        assert torch.equal(made["fp32"]["param"].flatten(), weights[name].flatten()), name
        assert torch.equal(made["exp_avg_sq"]["param"].flatten(), states["exp_avg_sq"].flatten()), name
    assert moments


@pytest.mark.slow
def test_a_run_goes_on_in_another_stage(fit: Fit, tmp_path: Path) -> None:
    """With the moments: weights alone would not do."""
    expected, theirs = fit(deepspeed_zero.train, *stage_words(3))
    source = f"resume={list_checkpoints(theirs / 'checkpoints')[1]}"
    for stage in (0, 1):
        out = tmp_path / str(stage)
        found = train(deepspeed_zero.train, out, 2, *WORDS, "optim=sgd", f"stage={stage}", source)
        assert losses(out) == losses(theirs)[4:]
        assert same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_plain_weights_start_a_run(stage: int, fit: Fit, tmp_path: Path) -> None:
    """optim.lr=0: what comes out is what went in, master copy included."""
    expected, theirs = fit(ddp.train, "model.norm=group", "optim=sgd")
    words = (*WORDS, "model.norm=group", "optim=sgd", f"stage={stage}", f"resume={theirs / 'model.pt'}")
    found = train(deepspeed_zero.train, tmp_path / "run", 2, *words, "optim.lr=0", "max_steps=1")
    assert same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_best_is_exported_and_deepspeed_s_own_tool_reads_the_same(stage: int, tmp_path: Path) -> None:
    out, words = tmp_path / "run", (*WORDS, f"stage={stage}", "checkpoint.best=true")
    final = train(deepspeed_zero.train, out, 2, *words)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as consolidate

    newest = list_checkpoints(out / "checkpoints")[0]
    best = (out / "checkpoints" / "BEST").read_text().strip()
    assert same(consolidate(str(newest), tag="deepspeed"), final)
    found = torch.load(out / "best.pt", weights_only=True)
    assert same(consolidate(str(out / "checkpoints" / best), tag="deepspeed"), found)


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_file_that_would_run_code_is_refused(fit: Fit, tmp_path: Path) -> None:
    """Also where somebody has sealed it: a manifest can be forged."""
    out = tmp_path / "run"
    train(deepspeed_zero.train, out, 2, *WORDS, "max_steps=4")
    checkpoint = list_checkpoints(out / "checkpoints")[0]
    name = "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    buffer = io.BytesIO()
    torch.save({"optimizer_state_dict": Trap(tmp_path / "trace")}, buffer)
    (checkpoint / name).write_bytes(buffer.getvalue())
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = fingerprint(checkpoint / name)
    (checkpoint / "manifest.json").write_text(seal_manifest(manifest))
    with pytest.raises(AssertionError, match=r"refused, for it holds more than DeepSpeed's tensors"):
        train(deepspeed_zero.train, out, 2, *WORDS, "max_steps=5", "timeout_seconds=10")
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank alone, whose fellows DeepSpeed would have wait for it."""
    write = dcp.write_atomically

    def full(path: Path, content: Any) -> None:
        if path.name.startswith("zero_pp_rank_1_") and path.parent.parent.name.endswith("04"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(dcp, "write_atomically", full)
    found = train(deepspeed_zero.train, tmp_path / "run", 2, *WORDS, *stage_words(2))
    assert result(tmp_path / "run")["checkpoints_failed"] == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000008"]
    assert same(found, fit(ddp.train, "optim=adamw")[0])


def test_its_collectives_wait_as_long_as_lockstep_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preload(deepspeed_zero.train)
    from lockstep.integrations import deepspeed

    make = deepspeed.ZeroEngine.__init__

    def noting(zero: Any, run: Any, engine: Any, *more: Any) -> None:
        make(zero, run, engine, *more)
        options = engine.data_parallel_group._get_backend(torch.device("cpu")).options
        (tmp_path / "seconds").write_text(str(options._timeout.total_seconds()))

    monkeypatch.setattr(deepspeed.ZeroEngine, "__init__", noting)
    train(deepspeed_zero.train, tmp_path / "run", 2, *WORDS, "max_steps=1", "timeout_seconds=77")
    assert (tmp_path / "seconds").read_text() == "77.0"


def test_another_recipe_s_checkpoint_is_refused(fit: Fit, tmp_path: Path) -> None:
    theirs = fit(ddp.train, "optim=adamw")[1]
    with pytest.raises(AssertionError, match=r"holds lockstep's files, and this recipe reads deepspeed's"):
        train(deepspeed_zero.train, tmp_path / "run", 2, *WORDS, "optim=adamw", f"resume={theirs}")


# What a user meets ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_keeps_the_console_to_lockstep(tmp_path: Path) -> None:
    """DeepSpeed warns that it has not tested SGD; that is in the rank's log."""
    words = ("global_batch_size=4", "max_steps=2", "data=synthetic", "data.size=8", "checkpoint.every=1", "out=run")
    done = command("-m", "recipes.deepspeed_zero", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    starts = (
        "deepspeed_zero",
        "  model ",
        "  data ",
        "  batch ",
        "  chosen ",
        "         ",
        "  run ",
        "step 2/2",
        "  result",
        "  speed",
    )
    starts += ("  time", "  memory", "  state", "  written", "  held", "  next")
    assert all(line.startswith(starts) for line in done.stdout.splitlines()), done.stdout
    assert "untested optimizer" in (tmp_path / "run" / "ranks" / "0.log").read_text()
