"""`compile=true`: equal blocks share one compilation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.models.gpt import GPT, GPTConfig
from lockstep.training import compiling
from lockstep.training.compiling import compile_model

graphs: list[int] = []


def count(graph: Any, inputs: Any) -> Any:
    """A backend that compiles nothing, and counts what it is asked for."""
    graphs.append(len(inputs))
    return graph.forward


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    graphs.clear()
    monkeypatch.setitem(compiling.COMPILE_OPTIONS, "backend", count)


@pytest.mark.usefixtures("counted")
def test_equal_blocks_share_one_compilation() -> None:
    model = GPT(GPTConfig(4, 16, 2, 2, 16, vocabulary=20))
    inputs = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(0))
    expected, names = model(inputs), list(model.state_dict())
    compile_model(model, [f"blocks.{number}" for number in range(4)])
    for _ in range(2):
        found = model(inputs)
        found.sum().backward()
    assert torch.equal(found, expected)
    assert len(graphs) == 1, "one for four blocks and two steps"
    assert list(model.state_dict()) == names


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("widths", [(4, 4, 8), (4, 8, 4)])
def test_other_models_are_compiled_whole(widths: tuple[int, ...]) -> None:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    compile_model(model, ["0", "1"])
    assert model._compiled_call_impl is not None
    assert model[0]._compiled_call_impl is None
