"""Where memory goes, counted instead of guessed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


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
