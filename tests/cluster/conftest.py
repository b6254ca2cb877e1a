"""A cluster of two nodes for all tests of a file, and a training on it that does what a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipes import ddp
from tests.helpers.harness import ROOT, train
from tests.helpers.slurm_box import Box
from tests.helpers.slurm_jobs import HOOK, LONG


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box(nodes=2, gpu_type="a100") as box:
        yield box


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds ddp.py: recipes.ddp itself, with a hook in its loop that does what the variable HOW says."""
    code, last = (ROOT / "recipes" / "ddp.py").read_text(), "        optimizer.zero_grad()\n"
    assert last in code
    (tmp_path / "ddp.py").write_text(code.replace(last, last + "        __import__('hook').hook(run)\n"))
    (tmp_path / "hook.py").write_text(HOOK)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two ranks of this machine make of LONG."""
    return train(ddp.train, tmp_path_factory.mktemp("reference") / "run", 2, *LONG)
