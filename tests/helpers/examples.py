"""The examples' tasks for tests: small, on data that the test writes, and a rank that is killed in the middle."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from lockstep.config.tasks import find_class
from lockstep.recipe import Recipe
from tests.helpers.harness import ROOT, execute

EXAMPLES = ROOT / "examples"
TEXT = "".join(f"{'to be or not to be, that is the question'[: 3 + 7 * n % 31]}\n" for n in range(60))


def example(name: str) -> str:
    """`tabular.py:Diabetes` as `task=` takes it."""
    return str(EXAMPLES / name)


def write_pictures(folder: Path, train: int = 12, val: int = 6, side: int = 20) -> Path:
    """A folder of JPEGs in two classes, stripes across and stripes down, with noise: train/CLASS and val/CLASS."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, size in (("train", train), ("val", val)):
        for axis, name in enumerate(("across", "down")):
            (folder / part / name).mkdir(parents=True)
            for number in range(size // 2):
                stripes = np.sin(np.indices((side, side))[axis] * generator.uniform(0.6, 1.2))
                pixels = 127 + 80 * stripes[..., None] + generator.normal(0, 20, (side, side, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / part / name / f"{number}.jpg")
    return folder


def write_text(file: Path, mirrored: bool = False) -> Path:
    """60 lines of 3 to 33 characters; `mirrored`: other ones."""
    file.write_text("".join(f"{line[::-1]}\n" for line in TEXT.splitlines()) if mirrored else TEXT)
    return file


def kill_a_rank(recipe: Recipe, task: str, out: Path, ranks: int, step: int, saved: int, *words: str) -> None:
    """Train until the last rank is killed by SIGKILL in step `step`, when the checkpoint of step `saved` is complete.

    A loss is computed once per micro-batch.
    """
    per_step = next((int(word.partition("=")[2]) for word in words if word.startswith("accumulate=")), 1)
    found: Any = find_class(task)
    loss, steps = found.loss, [0]

    def dies(self: Any, outputs: Any, targets: Any) -> Any:
        if outputs.requires_grad:
            steps[0] += 1
            if steps[0] == (step - 1) * per_step + 1 and dist.get_rank() == dist.get_world_size() - 1:
                while not (out / "checkpoints" / f"step-{saved:08d}").exists():
                    time.sleep(0.01)
                out.with_name("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, outputs, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, "loss", dies)  # ranks are forked, and inherit it
        with pytest.raises(AssertionError, match=r"died without a word|by peer"):
            execute(recipe, out, ranks, *words)
    out.with_name("killed").unlink()
