"""Where memory goes, counted instead of guessed."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.state import is_sharded


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps from one forward for the backward, parameters left out: the activations.

    Counted by saved-tensor hooks on a copy of the model, so on CPU and GPU alike, and without disturbing its BatchNorm
    statistics. Source: https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html
    """
    model = copy.deepcopy(model).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)  # held until the count is done: freed memory would be counted again at its old address
    total = sum(seen.values())
    del output
    return total


def state_bytes(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of parameters, gradients and optimizer state: (what this rank holds, what all of it is without shards).

    Counted for what the optimizer trains, gradients as if they were there, one the size of its parameter.
    """
    mine = total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
            for tensor in (parameter, parameter, *state):
                local = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
                mine += local.numel() * local.element_size()
                total += tensor.numel() * tensor.element_size()
    return mine, total
