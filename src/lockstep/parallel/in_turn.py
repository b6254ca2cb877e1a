"""A cut model's forward by the ranks of a pipeline, one part after the other: evaluation needs no schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.data.batch import map_tensors, tree_tensors, with_tensors
from lockstep.distributed.dtensor import full_tensor

Spec = tuple[tuple[int, ...], torch.dtype]


class PartsInTurn(nn.Module):
    """The whole model's forward, which all ranks of a pipeline make together: none of them holds another's weights.

    Each part's outputs are sent to the rank of the next part, and the last part's to all, so that each rank returns the
    model's outputs. The parts are not its submodules: they are trained, saved and counted elsewhere.

    Args:
        parts: this rank's, by their numbers. A part takes and returns tensors; part 0 takes the inputs', in their order.
        count: parts of the whole model; part i is on rank i % size of `pipeline`.
        pipeline: the ranks that hold one model together.
        copies: the ranks that hold the same parts of its copies.
        gives: what the model's outputs look like where they are no single tensor, after a forward; asked on the rank of
            the last part.
        device: where the parts are.

    Attributes:
        gathers: whether fully_shard has made the parts so that their forwards communicate.
    """

    def __init__(
        self,
        parts: Mapping[int, nn.Module],
        count: int,
        pipeline: dist.ProcessGroup,
        copies: dist.ProcessGroup,
        gives: Any,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.gathers = any(hasattr(part, "set_requires_gradient_sync") for part in parts.values())
        self._parts, self._count, self._gives, self._device = dict(parts), count, gives, device
        self._ranks, self._pipeline, self._copies = dist.get_process_group_ranks(pipeline), pipeline, copies
        self._known: dict[Any, Any] = {}  # what crosses each cut, by the inputs' shapes: told once

    def train(self, mode: bool = True) -> PartsInTurn:
        """In evaluation, running statistics are those of the first copy, which are saved and exported too."""
        for part in self._parts.values():
            part.train(mode)
            for buffer in () if mode else part.buffers():
                dist.broadcast(buffer, src=dist.get_process_group_ranks(self._copies)[0], group=self._copies)
        return super().train(mode)

    def forward(self, inputs: Any) -> Any:
        rank, values, form = dist.get_rank(), tuple(tree_tensors(inputs)), None
        shapes = tuple((tuple(x.shape), x.dtype) for x in values)
        for number in range(self._count):
            owner = self._ranks[number % len(self._ranks)]
            takers = self._ranks if number == self._count - 1 else [self._ranks[(number + 1) % len(self._ranks)]]
            outputs: tuple[Tensor, ...] = ()
            if rank == owner:
                given = self._parts[number](*values)
                outputs = tuple(full_tensor(x, x.device) for x in (given if isinstance(given, tuple) else (given,)))
            specs, form = self._told((shapes, number), outputs, owner)
            values = self._sent(outputs, specs, owner, takers)
        return values[0] if form is None else with_tensors(form, values)

    def _told(self, key: Any, outputs: tuple[Tensor, ...], owner: int) -> tuple[list[Spec], Any]:
        """(shapes and types of a part's outputs, what they look like as the model's outputs) on every rank."""
        if key not in self._known:
            gives = self._gives() if dist.get_rank() == owner and key[1] == self._count - 1 else None
            form = map_tensors(lambda x: x.new_empty(0, device="cpu"), gives)
            told: list[Any] = [[(tuple(x.shape), x.dtype) for x in outputs], form]
            dist.broadcast_object_list(told, src=owner, group=self._pipeline, device=self._device)
            self._known[key] = (told[0], told[1])
        found: tuple[list[Spec], Any] = self._known[key]
        return found

    def _sent(self, outputs: tuple[Tensor, ...], specs: list[Spec], owner: int, takers: list[int]) -> Any:
        """A part's outputs on the ranks that take them; nothing elsewhere."""
        rank = dist.get_rank()
        if len(takers) > 1:
            values = outputs or tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in specs)
            for value in values:
                dist.broadcast(value, src=owner, group=self._pipeline)
            return values
        if takers == [owner]:
            return outputs
        if rank == owner:
            for value in outputs:
                dist.send(value, takers[0], group=self._pipeline)
        if rank not in takers:
            return ()
        values = tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in specs)
        for value in values:
            dist.recv(value, owner, group=self._pipeline)
        return values
