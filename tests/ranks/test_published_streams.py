"""Hugging Face's `datasets` and WebDataset, the real ones: the same training on any ranks, and resumed bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes import ddp, single
from tests.helpers import published_streams
from tests.helpers.harness import assert_equal, execute, lines, result, train

WORDS = ("precision=fp64", "epochs=3", "global_batch_size=12", "log_every=1", "optim.warmup_steps=2", "eval_every=0")
CASES = ("map", "stream", "shuffled", "shards")


def task(case: str, folder: Path) -> tuple[str, ...]:
    file = published_streams.__file__
    if case != "shards":
        return f"task={file}:HuggingFace", f"task.kind={case}"
    published_streams.write_shards(folder)
    return f"task={file}:Shards", f"task.folder={folder}"


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


@pytest.mark.slow
@pytest.mark.soak_for("stream")
@pytest.mark.parametrize("case", CASES)
def test_published_streams_train_alike_on_any_ranks_and_resume(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (*WORDS, *task(case, tmp_path))
    alone = train(single.train, tmp_path / "1", 1, *words)
    saving = (*words, "checkpoint.every=4")
    whole = train(ddp.train, tmp_path / "whole", 2, *saving, "data.workers=1")
    assert all(torch.allclose(whole[name], alone[name], rtol=0, atol=1e-12) for name in alone)
    for stop in (4, 8):  # within the first epoch of 5 steps, and within the second
        out = tmp_path / f"stopped at {stop}"
        execute(ddp.train, out, 2, *saving, f"max_steps={stop}")
        capfd.readouterr()
        assert_equal(train(ddp.train, out, 2, *saving), whole)
        assert result(out)["resumed_from"] == f"checkpoints/step-{stop:08d}"
        assert losses(out) == losses(tmp_path / "whole")
        said = capfd.readouterr().err.count("state_dict() is not all of its place")
        assert said == (case == "shuffled"), "its buffer is not in its state"


@pytest.mark.slow
def test_each_rank_s_part_of_a_published_stream_resumes(tmp_path: Path) -> None:
    words = (*WORDS, *task("per_rank", tmp_path), "checkpoint.every=4")
    whole = train(ddp.train, tmp_path / "whole", 2, *words)
    execute(ddp.train, tmp_path / "parts", 2, *words, "max_steps=8")
    assert_equal(train(ddp.train, tmp_path / "parts", 2, *words), whole)
