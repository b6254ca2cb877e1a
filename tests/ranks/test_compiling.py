"""`compile=true`: a GPT that is compiled block by block trains what it trains without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.training import compiling
from recipes import ddp, fsdp
from tests.helpers.harness import train


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [ddp, fsdp])
def test_compiled_blocks_of_a_gpt_train_the_same(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("task=language", "precision=fp64", "max_steps=2", "epochs=1")
    expected = train(recipe.train, tmp_path / "plain", 2, *words)
    monkeypatch.setitem(compiling.COMPILE_OPTIONS, "backend", "eager")  # no code is generated, which would take minutes
    found = train(recipe.train, tmp_path / "compiled", 2, *words, "compile=true")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)
