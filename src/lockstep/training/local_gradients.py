"""What one rank holds of gradients and weights, however they are sharded or cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.distributed.dtensor import full_tensor, is_sharded, local_shard
from lockstep.training.clip import register_clip_pre_hook


class LocalGradients:
    """What one rank holds of the gradients and weights that its optimizer works on, and when they can be seen.

    Args:
        owns: whether what this rank holds counts, where others may hold the same.
        differ: whether ranks hold different parts, so that their sums add up to the whole.
        among: ranks that hold this stage of the model, or its copies; 0: all.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, owns: bool = True, differ: bool = False, among: int = 0
    ) -> None:
        self._module, self.parameters = module, dict(module.named_parameters())
        self._optimizer, self._owns, self._among = optimizer, owns, among
        self._shards = any(is_sharded(parameter) for parameter in self.parameters.values())
        self.differ = differ or self._shards

    def before_update(self, call: Callable[[], None]) -> None:
        """Have something called in each step when its gradients are complete, before the weights change.

        Where the recipe clips them by their norm, it is called before that.
        """
        called = False

        def before_clipping() -> None:
            nonlocal called
            called = True
            call()

        def before_step(*_: Any) -> None:
            nonlocal called
            if not called:
                call()
            called = False

        register_clip_pre_hook(self._module, before_clipping)
        self._optimizer.register_step_pre_hook(before_step)

    def after_update(self, call: Callable[[], None]) -> None:
        """Have something called in each step when the weights have changed."""
        self._optimizer.register_step_post_hook(lambda *_: call())

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part of a gradient."""
        return None if parameter.grad is None else local_shard(parameter.grad)

    def full_gradient(self, parameter: nn.Parameter, device: torch.device) -> Tensor | None:
        """A whole gradient. Where it is sharded, all ranks call this together, and `device` is where they talk."""
        return None if parameter.grad is None else full_tensor(parameter.grad.detach(), device)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a parameter."""
        return local_shard(parameter.detach())

    def counts(self, parameter: nn.Parameter, gradient: bool) -> bool:
        """Whether this rank's part of a parameter, or of its gradient, belongs into the sum over ranks."""
        if not is_sharded(parameter):  # beside others that are, such as experts, it is the same on all ranks
            return self._owns and (not self._shards or dist.get_rank() == 0)
        sharded = cast(Any, parameter)  # in several copies: those in the first row of the mesh
        if not self._owns and sharded.device_mesh.size() < (
            self._among or dist.get_world_size()
        ):  # it knows nothing of the others
            return False
        places = zip(sharded.placements, sharded.device_mesh.get_coordinate(), strict=True)
        return all(place == 0 for placement, place in places if placement.is_replicate())
