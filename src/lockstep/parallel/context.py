"""A model whose sequences several ranks share: each has some positions of every sequence, and all weights.

What sees each position by itself (embedding, norms, MLP, output, loss) needs no other rank. What is left is done here:
attention sees the positions of all ranks, rotations and position embeddings know which positions they have, dropout
drops what one process would drop, and a rank's loss has the weight of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lockstep.data.batch import describe, map_tensors, tree_tensors
from lockstep.data.batches import items_of
from lockstep.errors import UserError
from lockstep.parallel.context_plan import chunks_of, require_length, require_plain_attention, sequence_length
from lockstep.parallel.ring_attention import ring_attention, zigzag_positions
from lockstep.parallel.tensor import SlicedDropout
from lockstep.parallel.ulysses import ulysses_attention
from lockstep.training.accumulate import MicroBatch


class ContextShare:
    """Which positions of each sequence this rank has, and who has the others.

    Args:
        group: the ranks that share a sequence.
        by: ring (two chunks for each rank, an early and a late one) or ulysses (neighbouring positions).
        weigh: the task's: targets → what its loss is a mean over; None: all positions count alike.
        slices: into which each rank's positions are cut once more.

    Attributes:
        chunks: of which the length of a sequence must be a multiple.
        filled: whether the present sequences are, behind their end.
    """

    def __init__(
        self, group: dist.ProcessGroup, by: str, weigh: Callable[[Any], Tensor] | None = None, slices: int = 1
    ) -> None:
        self.group, self.by, self._weigh, self.slices = group, by, weigh, slices
        self.place, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.chunks, self.filled = math.lcm(chunks_of(self.size, by), self.size * slices), False

    def positions(self, length: int, device: torch.device | None = None, place: int | None = None) -> Tensor:
        """Those of this rank, or of the rank at `place`: [length / size], int64, ascending."""
        place = self.place if place is None else place
        if self.by == "ring":
            return zigzag_positions(length, place, self.size, device)
        return torch.arange(length, device=device).chunk(self.size)[place]

    def cut(self, tree: Any, length: int) -> Any:
        """A tree of tensors with this rank's positions of those that are [samples, length, …]; others are kept."""

        def mine(tensor: Tensor) -> Tensor:
            return tensor[:, self.positions(length, tensor.device)] if is_sequence(tensor, length) else tensor

        return map_tensors(mine, tree)

    def part(self, micro: MicroBatch) -> MicroBatch:
        """The same whole inputs, with this rank's positions of the targets and their weight, a float64 number.

        The mean over all ranks of loss · weight, and of its gradient, is that of the whole sequences.

        Raises:
            UserError: the targets have no positions.
        """
        if self.size == 1:
            return micro._replace(weight=torch.as_tensor(micro.weight, dtype=torch.float64))
        length = sequence_length(micro.inputs)
        require_length(length, self.size, self.by, self.slices)
        if not any(is_sequence(tensor, length) for tensor in tree_tensors(micro.targets)):
            raise UserError(
                f"context={self.size}: of sequences of {length} each rank has some positions, and the targets "
                f"{describe(micro.targets)} have none; allowed are targets for every position, [samples, {length}, …]"
            )
        targets = self.cut(micro.targets, length)
        weight = torch.as_tensor(micro.weight, dtype=torch.float64)
        if self._weigh is not None:
            weight = weight.to(items_of(self._weigh, targets).device)
            weight = weight * items_of(self._weigh, targets) * self.size
            weight = weight / items_of(self._weigh, micro.targets).clamp(min=1)
        return micro._replace(targets=targets, weight=weight)

    def counted(self, loss: Tensor, micro: MicroBatch) -> Tensor:
        """The mean loss of a part; of one that is all padding it is nan, and counts for nothing."""
        return torch.where(torch.as_tensor(micro.weight) > 0, loss, 0.0)

    def gather(self, tree: Any, length: int) -> Any:
        """Outputs of all positions from those of each rank, [samples, length / size, …]; the ranks call it together."""
        order = torch.cat([self.positions(length, place=place) for place in range(self.size)]).argsort()

        def everyone(tensor: Tensor) -> Tensor:
            if not is_sequence(tensor, length // self.size):
                return tensor
            parts = tensor.new_empty(self.size, *tensor.shape)
            dist.all_gather_into_tensor(parts.flatten(0, 1), tensor.contiguous(), group=self.group)
            return parts.movedim(0, 1).flatten(1, 2)[:, order.to(tensor.device)]

        return map_tensors(everyone, tree)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """F.scaled_dot_product_attention of this rank's queries over the keys of all ranks.

        Raises:
            UserError: it is asked for what cannot be cut.
        """
        require_plain_attention("", query, key, attn_mask, dropout_p)
        if self.filled and not is_causal:
            raise UserError(
                f"context={self.size}: the evaluation's sequences do not divide by {self.chunks}, and only where attention "
                "is causal could they be filled up; evaluate sequences of a multiple of it"
            )
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # as it casts for torch's own attention
            query, key, value = (
                each if each.dtype == torch.float64 else each.to(torch.get_autocast_dtype(kind))
                for each in (query, key, value)
            )
        attention = ring_attention if self.by == "ring" else ulysses_attention
        return attention(query, key, value, self.group, is_causal, scale)


class OverAllRanks(TorchFunctionMode):
    """Within it F.scaled_dot_product_attention is over the positions of all ranks."""

    def __init__(self, share: ContextShare) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attends = func is F.scaled_dot_product_attention
        return (self._share.attend if attends else func)(*args, **(kwargs or {}))


class AttendsOverRanks(nn.Module):
    """What the class of a module that a task names becomes a subclass of."""

    share: ContextShare

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with OverAllRanks(self.share):  # in a second forward, of a checkpointed block in backward, too
            return super().forward(*inputs, **named)


class PlacedDropout(nn.Dropout):
    """Dropout on a rank's positions, dim 1: it drops what one process would drop there.

    All ranks have the same random numbers. Each draws the mask of the whole sequence and uses its positions of it.

    Attributes:
        positions: of this rank.
        length: of the whole sequence.
    """

    positions: Tensor | None = None
    length = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.positions is None:
            return x
        if x.dim() < 2 or x.shape[1] != len(self.positions):
            return super().forward(x)
        mask = F.dropout(x.new_ones(x.shape[0], self.length, *x.shape[2:]), self.p)
        return x * mask[:, self.positions]


class CutModel(nn.Module):
    """What the class of a model becomes a subclass of: its names and its state_dict stay what they were.

    It takes whole sequences. In training it gives this rank's positions of the outputs; in evaluation all of them.
    """

    share: ContextShare
    placed: Sequence[nn.Module]
    _tokens = 0

    def enter(self, inputs: Any) -> Any:
        """This rank's positions of whole sequences; in evaluation these are filled up first."""
        share, self._tokens = self.share, sequence_length(inputs)
        if self.training:
            require_length(self._tokens, share.size, share.by, share.slices)
        whole = self._tokens + -self._tokens % share.chunks
        share.filled = whole > self._tokens  # behind the end: what is causal does not see it
        filled = map_tensors(lambda tensor: fill(tensor, self._tokens, whole), inputs) if share.filled else inputs
        positions = share.positions(whole, next(tree_tensors(inputs)).device)
        for module in self.placed:
            cast(Any, module).positions = positions
            if isinstance(module, PlacedDropout | SlicedDropout):
                module.length = whole
        return share.cut(filled, whole)

    def forward(self, inputs: Any) -> Any:
        outputs = super().forward(CutModel.enter(self, inputs))
        if self.training:
            return outputs
        length, whole = self._tokens, self._tokens + -self._tokens % self.share.chunks
        found = self.share.gather(outputs, whole)
        return map_tensors(lambda tensor: tensor[:, :length] if is_sequence(tensor, whole) else tensor, found)


def entered(model: nn.Module, inputs: Any) -> Any:
    """What the layers of a model that is shared, cut or neither are given of its inputs."""
    for kind in type(model).__mro__:
        if "enter" in vars(kind):
            inputs = cast(Any, kind).enter(model, inputs)
    return inputs


def left(model: nn.Module, outputs: Any) -> Any:
    """What its layers gave, as its outputs in training."""
    for kind in reversed(type(model).__mro__):
        if "leave" in vars(kind):
            outputs = cast(Any, kind).leave(model, outputs)
    return outputs


def is_sequence(tensor: Tensor, length: int) -> bool:
    return tensor.dim() > 1 and tensor.shape[1] == length


def fill(tensor: Tensor, length: int, whole: int) -> Tensor:
    """[N, length, …] to [N, whole, …], with zeros."""
    if not is_sequence(tensor, length):
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], whole - length, *tensor.shape[2:])], 1)


def share_sequence(
    model: nn.Module, names: Sequence[str], share: ContextShare, around: nn.Module | None = None
) -> nn.Module:
    """Have a model compute this rank's positions of each sequence, in place.

    Args:
        model: a whole one, or a part of it.
        names: `context_modules`'.
        around: what takes the inputs and gives the outputs, where that is not `model` itself.
    """
    if share.size == 1:
        return model
    placed = []
    modules: dict[str, Any] = dict(model.named_modules())
    for name in names:
        if name in modules:
            modules[name].__class__ = subclass_of(AttendsOverRanks, type(modules[name]))
            modules[name].share = share
            placed.append(modules[name])
    for module in modules.values():
        if type(module) is nn.Dropout:
            module.__class__ = PlacedDropout
        if isinstance(module, PlacedDropout | SlicedDropout):
            placed.append(module)
    outer = cast(Any, model if around is None else around)
    outer.__class__ = subclass_of(CutModel, type(outer))
    object.__setattr__(outer, "placed", placed)  # a list of modules, which are the model's already
    outer.share = share
    return model


def subclass_of(first: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (first, kind), {"__module__": kind.__module__})
