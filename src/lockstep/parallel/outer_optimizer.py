"""Local SGD and DiLoCo: replicas that train apart, and every so many steps are brought together by a second optimizer.

The weights that all replicas last agreed on are θ. A replica has come from there to θ_r in `period` steps of its own
optimizer. The mean of θ − θ_r over the replicas is taken for a gradient at θ, and the outer optimizer makes its step with
it. Its result is the new θ, and where every replica starts again. An outer learning rate of 1 without momentum makes it
the plain mean of the θ_r: local SGD.
Source: https://arxiv.org/abs/1805.09767 (local SGD), https://arxiv.org/abs/2311.08105 (DiLoCo),
https://arxiv.org/abs/2501.18512 (fragments, one after the other)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.errors import UserError


class OuterOptimizer:
    """Brings the replicas of a model together, all of it at once or in fragments that take turns.

    All ranks make it together, with the same weights, and call its methods together.

    Args:
        model: this rank's replica.
        period: steps of the replicas' own optimizers between two synchronisations of the same weights.
        lr, momentum: of the outer optimizer, SGD with Nesterov's momentum if there is any.
        fragments: into how many parts of about equal size the parameters are dealt, in their order. Each is synchronised
            every `period` steps, but not in the same step as another: a rank never sends more than one at a time.

    Attributes:
        steps: that the replicas have made.
        own_weights: what tells checkpoints that ranks hold different weights under the same names.

    Raises:
        UserError: there are more fragments than steps in a period, or than parameters.
    """

    own_weights = True

    def __init__(
        self, model: nn.Module, period: int, lr: float = 1.0, momentum: float = 0.0, fragments: int = 1
    ) -> None:
        self._agreed = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        if not 1 <= fragments <= (most := min(period, len(self._agreed))):
            raise UserError(
                f"fragments={fragments}: allowed are 1…{most}: no more than period={period} steps and the model's "
                f"{len(self._agreed)} parameters; set a larger period"
            )
        self.model, self.period, self.steps = model, period, 0
        self._fragments = cut_evenly({name: p.numel() for name, p in self._agreed.items()}, fragments)
        self._due = [round((number + 1) * period / fragments) % period for number in range(fragments)]
        self._optimizer = torch.optim.SGD(self._agreed.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the replicas, and bring together the fragment whose turn it is."""
        self.steps += 1
        for due, names in zip(self._due, self._fragments, strict=True):
            if self.steps % self.period == due:
                self._synchronise(names)

    def _synchronise(self, names: list[str]) -> None:
        replica = dict(self.model.named_parameters())
        moved = [self._agreed[name] - replica[name] for name in names]
        for name, gradient in zip(names, all_reduce_mean(moved), strict=True):
            self._agreed[name].grad = gradient
        self._optimizer.step()  # of those that have a gradient
        self._optimizer.zero_grad()
        for name in names:
            replica[name].copy_(self._agreed[name])

    @torch.no_grad()
    def mean(self) -> nn.Module:
        """A model with the mean of all replicas' weights and running statistics, as they are now: to be evaluated."""
        whole = copy.deepcopy(self.model)
        tensors = [tensor for tensor in whole.state_dict().values() if tensor.is_floating_point()]
        for tensor, mean in zip(tensors, all_reduce_mean(tensors), strict=True):
            tensor.copy_(mean)
        return whole

    def state_dict(self) -> dict[str, Any]:
        """The weights last agreed on and the outer momentum, the same on all ranks."""
        found: dict[str, Any] = {"steps": self.steps}
        for name, parameter in self._agreed.items():
            found[f"agreed.{name}"] = parameter.detach()
            if self._optimizer.defaults["momentum"]:
                momentum = self._optimizer.state[parameter].get("momentum_buffer")
                found[f"momentum.{name}"] = torch.zeros_like(parameter) if momentum is None else momentum
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for name, parameter in self._agreed.items():
            parameter.copy_(state[f"agreed.{name}"])
            if f"momentum.{name}" in state:
                self._optimizer.state[parameter]["momentum_buffer"] = state[f"momentum.{name}"].clone()


def all_reduce_mean(tensors: list[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all ranks, sent as one vector per dtype."""
    found: dict[torch.dtype, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors}:
        found[dtype] = torch.cat([tensor.flatten() for tensor in tensors if tensor.dtype == dtype])
        dist.all_reduce(found[dtype])
        found[dtype] /= dist.get_world_size()
    means, taken = [], dict.fromkeys(found, 0)
    for tensor in tensors:
        start = taken[tensor.dtype]
        taken[tensor.dtype] += tensor.numel()
        means.append(found[tensor.dtype][start : taken[tensor.dtype]].view_as(tensor))
    return means


def cut_evenly(sizes: Mapping[str, int], pieces: int) -> list[list[str]]:
    """The names in their order, in so many groups of about equal size, none of them empty."""
    names, found = list(sizes), list[list[str]]()
    for left in range(pieces, 0, -1):
        share, size, group = sum(sizes[name] for name in names) / left, 0, list[str]()
        while len(names) >= left and (not group or (left > 1 and size + sizes[names[0]] / 2 <= share)):
            group.append(names.pop(0))
            size += sizes[group[-1]]
        if left == 1:
            group += names
        found.append(group)
    return found
