"""ZeRO-1: each rank keeps the optimizer's state of some parameters, updates those, and sends them to all others.

torch's ZeroRedundancyOptimizer does it. Here it gets the face that checkpoints and whoever looks on expect of an optimizer:
`state` is what this rank keeps, by parameter. So a checkpoint holds each state once, under its name in the whole model,
written by the rank that keeps it, and any number of ranks reads it; nothing is consolidated on one rank, which might not
have the memory for it.
Source: https://arxiv.org/abs/1910.02054, https://docs.pytorch.org/docs/stable/distributed.optim.html
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from lockstep.training.muon import MuonAndAdamW


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """An optimizer that has made no step yet, with its parameters dealt out to the ranks, the largest first.

    Whole tensors are dealt out, so it takes optimizers that need them whole, such as Muon. All ranks make it together, and
    step together; gradients are the same on all of them, as DistributedDataParallel leaves them.

    Args:
        optimizer: of all parameters, with their groups. It is of no use afterwards.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        kind: Any = muon_and_adamw if isinstance(optimizer, MuonAndAdamW) else type(optimizer)
        takes = inspect.signature(kind).parameters  # a class may have further defaults, which the groups have, too
        settings = {name: value for name, value in optimizer.defaults.items() if name in takes}
        super().__init__(optimizer.param_groups, kind, **settings)

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """{parameter: its state}, of the parameters that this rank updates."""
        return self.optim.state if "optim" in vars(self) else {}

    @state.setter
    def state(self, state: Any) -> None:
        """torch's constructor makes one of its own, which stays empty."""

    def keeps(self, parameter: Tensor) -> bool:
        """Whether this rank updates a parameter."""
        mine = [each for group in self.optim.param_groups for each in group["params"]]
        return any(parameter is each for each in mine)

    def state_dict(self) -> dict[str, Any]:
        """As the whole optimizer's, with this rank's states alone."""
        found: dict[str, Any] = Optimizer.state_dict(self)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of the parameters that this rank updates; what belongs to others is left out."""
        super().load_state_dict(state_dict)
        vars(self).pop("state", None)  # a second copy, which torch leaves


def muon_and_adamw(groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> MuonAndAdamW:
    """A rank's part of a MuonAndAdamW; all other settings are in the groups."""
    return MuonAndAdamW(groups, {"lr": lr, "weight_decay": weight_decay})
