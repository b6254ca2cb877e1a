"""torch.compile: a model whose blocks are equal is compiled block by block (regional compilation), any other as a whole.

Equal blocks share one compilation, so that a GPT of 48 blocks compiles as long as one of 4, and what lies between blocks
(FSDP's gathers, a change of the model's inputs) breaks no graph. Names and state_dict stay.
Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

COMPILE_OPTIONS: dict[str, Any] = {"dynamic": False}  # of blocks: shapes are those of training, and of evaluation


def compile_model(model: nn.Module, blocks: Sequence[str]) -> None:
    """Have a model compiled when it is first called, in place.

    Args:
        blocks: names of the modules that it is made of one after the other.
    """
    found = [model.get_submodule(name) for name in blocks]
    if len(found) < 2 or any(kind_of(block) != kind_of(found[0]) for block in found):
        model.compile()
        return
    for block in found:
        block.compile(**COMPILE_OPTIONS)


def kind_of(block: nn.Module) -> list[Any]:
    """What two blocks have in common that one compilation fits: layers, and the shapes of their tensors."""
    shapes = [(name, tensor.shape) for name, tensor in block.state_dict().items()]
    return [*[(name, type(module)) for name, module in block.named_modules()], *shapes]
