"""The script that teaches distributed training in plain torch computes on any number of ranks what one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.harness import ROOT, clean_environment

SCRIPT = str(ROOT / "examples" / "by_hand.py")


def train(ranks: int, epochs: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    start = [sys.executable, SCRIPT]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", SCRIPT]
    words = [*start, f"--epochs={epochs}", f"--checkpoint={checkpoint}"]
    done = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"epoch {epochs}: loss ")
    model: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["model"]
    return model


@pytest.mark.slow
def test_two_ranks_that_are_continued_by_three_train_what_one_process_does(tmp_path: Path) -> None:
    alone = train(1, 3, tmp_path / "alone.pt")
    train(2, 1, tmp_path / "shared.pt")
    shared = train(3, 3, tmp_path / "shared.pt")
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-12)
