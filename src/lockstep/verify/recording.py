"""What a run has recorded by `record_tensors`, read back: whole tensors from the parts that its ranks have kept.

Where a part belongs follows from the run's layout: shares of the batch are joined along it in the ranks' order, shards
of DTensors by their placements, positions of a shared sequence by the rank that has them. Of a plain tensor of a layer
that ranks share, nothing says whether each has it whole or a part: there it is read off the other run's whole tensor,
whose shape only one of the ways to join gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.callbacks.tensor_recorder import OUTPUT, TENSORS_FOLDER, CallEvent
from lockstep.parallel.ring_attention import zigzag_positions

COPY, SUM = "copy", "sum"  # each rank has the whole tensor; each has an addend of it
Way = tuple[Any, Any, Any]  # how micro-batches, mates and shares are joined: along a dim, COPY or SUM
BATCH = 0  # the dim of the samples


def recorded_steps(out: Path) -> dict[int, list[Path]]:
    """The files of each recorded step, in the ranks' order."""
    found: dict[int, dict[int, Path]] = {}
    for path in (out / TENSORS_FOLDER).glob("step-*-rank-*.pt"):
        if named := re.fullmatch(r"step-(\d+)-rank-(\d+)", path.stem):
            found.setdefault(int(named[1]), {})[int(named[2])] = path
    return {step: [path for _, path in sorted(ranks.items())] for step, ranks in sorted(found.items())}


@dataclass(frozen=True)
class RecordedStep:
    """One step of a run.

    Attributes:
        ranks: what each has written, lockstep.callbacks.tensor_recorder.
        local: whether ranks update weights of their own; of their gradients the mean is looked at.
    """

    ranks: list[dict[str, Any]]
    local: bool = False

    @classmethod
    def load(cls, paths: Sequence[Path], local: bool = False) -> RecordedStep:
        return cls([torch.load(path, weights_only=True, mmap=True) for path in paths], local)

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.ranks[0]["about"])

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The class of each layer, by its name."""
        return {name: kind for rank in self.ranks for name, kind in rank["about"]["kinds"].items()}

    def events(self, kind: str) -> list[CallEvent]:
        """Those of forward or backward in their order; a pipeline's stages one after the other.

        The gradient of what a layer gives is known before any within it; where the last of its own layers gives the
        same tensor, that one's hook was called first.
        """
        ranks = sorted(self.ranks, key=lambda rank: rank["about"]["place"])
        if kind == "forward":
            return list(dict.fromkeys(event for rank in ranks for event in rank[kind]))
        if self.about["stages"]:
            ranks.reverse()
        found: dict[CallEvent, None] = {}
        every = list(dict.fromkeys(event for rank in ranks for event in rank[kind]))
        again = {layer for layer, call, _, _ in every if call}  # called several times
        given: dict[str, list[CallEvent]] = {}
        for event in every:
            if event[2] == OUTPUT and event[0] not in again:
                given.setdefault(event[0], []).append(event)
        for event in every:
            for layer in reversed(list(parents(event[0]))):
                found.update(dict.fromkeys(given.get(layer, [])))
            found[event] = None
        return list(found)

    def loss(self) -> Tensor | None:
        """Of the global batch: the mean over those who know it."""
        known = [rank["loss"] for rank in self.ranks if rank["loss"] is not None]
        return torch.stack(known).mean() if known else None

    def named(self, kind: str) -> dict[str, list[Tensor]]:
        """Every rank's copy of each parameter's gradient, weight or buffer; of buffers, those that are saved."""
        found: dict[str, list[Tensor]] = {}
        for rank in self.ranks:
            if kind != "buffers" or rank["about"]["shard"] == 0:
                for name, tensor in rank[kind].items():
                    found.setdefault(name, []).append(tensor)
        if self.local and kind == "gradients":
            found = {name: [torch.stack(copies).mean(0)] for name, copies in found.items()}
        return found

    def parts(self, kind: str, event: CallEvent) -> dict[tuple[int, int], list[Any]]:
        """By (share of the batch, place among those who hold one model): a tensor of each micro-batch."""
        found: dict[tuple[int, int], list[Any]] = {}
        for rank in self.ranks:
            about = rank["about"]
            if event in rank[kind]:
                found.setdefault((about["shard"], about["place"]), rank[kind][event])
        return found

    def ways(self, kind: str, event: CallEvent) -> Iterator[tuple[Way, tuple[int, ...]]]:
        """The ways to put a tensor together, and the shape that each gives; the likeliest first."""
        parts = {key: [as_meta(each) for each in tensors] for key, tensors in self.parts(kind, event).items()}
        shards, places = ({key[index] for key in parts} for index in (0, 1))
        pieces = max(map(len, parts.values()))
        dims = next(iter(parts.values()))[0]
        rank = (dims[0] if isinstance(dims, tuple) else dims).dim()
        mates = [COPY, *reversed(range(rank)), SUM] if len(places) > 1 and not isinstance(dims, tuple) else [COPY]
        among = [BATCH, COPY, *[SUM] * (kind == "backward" and "operations" in self.ranks[0])]  # a weight's gradient
        for way in product(among if pieces > 1 else [COPY], mates, among if len(shards) > 1 else [COPY]):
            if (found := self._joined(parts, way)) is not None:
                yield way, tuple(found[0].shape)

    def joined(self, kind: str, event: CallEvent, way: Way) -> list[Tensor]:
        """The whole tensor in float64, as often as there are copies of it."""
        found = self._joined(self.parts(kind, event), way) or []
        scale = self.about["gradient_scale"] if kind == "backward" else 1.0
        return [tensor.double() * scale for tensor in found]

    def _joined(self, parts: dict[tuple[int, int], list[Any]], way: Way) -> list[Tensor] | None:
        """None where the parts do not fit together so."""
        micro, mates, shares = way
        try:
            by_shard: dict[int, list[list[Tensor]]] = {}
            for shard in sorted({key[0] for key in parts}):
                own = [parts[key] for key in sorted(parts) if key[0] == shard]  # by place
                pieces = [self._mates([tensors[number] for tensors in own], mates) for number in range(len(own[0]))]
                copies = list(zip(*pieces, strict=True))  # by copy, over micro-batches
                by_shard[shard] = [joined_so(each, micro) for each in copies]
            flat = {shard: [tensor for copy in copies for tensor in copy] for shard, copies in by_shard.items()}
            if shares != COPY:
                return [tensor for each in zip(*flat.values(), strict=True) for tensor in joined_so(each, shares)]
            found = [tensor for copies in flat.values() for tensor in copies]
            return found if len({tensor.shape for tensor in found}) == 1 else None
        except (RuntimeError, IndexError, ValueError):  # sizes that do not fit
            return None

    def _mates(self, tensors: list[Any], way: Any) -> list[Tensor]:
        """The copies of a tensor that those who hold one model have between them."""
        if isinstance(tensors[0], tuple):
            return [from_shards(tensors)]
        if way == COPY:
            return tensors
        if way == SUM:
            return [torch.stack([tensor.double() for tensor in tensors]).sum(0)]
        whole = torch.cat(tensors, way)
        if not self.about["sequences"] or whole.is_meta:
            return [whole]
        order = sequence_order(whole.shape[way], len(tensors), self.about["sequences"])
        return [whole.index_select(way, order)]


def parents(layer: str) -> Iterator[str]:
    """`a.b`, `a` and the model itself, of a.b.c."""
    while layer:
        layer = layer.rpartition(".")[0]
        yield layer


def joined_so(tensors: Sequence[Tensor], way: Any) -> list[Tensor]:
    if way == COPY:
        return list(tensors)
    return [torch.stack([each.double() for each in tensors]).sum(0) if way == SUM else torch.cat(list(tensors), way)]


def as_meta(part: Any) -> Any:
    return (part[0].to("meta"), *part[1:]) if isinstance(part, tuple) else part.to("meta")


def from_shards(parts: Sequence[tuple[Tensor, list[tuple[int, int]], bool]]) -> Tensor:
    """A DTensor's whole tensor, of all its shards: joined along one cut after the other, the innermost first."""
    if parts[0][2]:
        return torch.stack([local for local, _, _ in parts]).sum(0)
    found = {tuple(map(tuple, cuts)): local for local, cuts, _ in parts}  # copies of a shard are one
    while any(found):
        outer: dict[Any, list[Tensor]] = {}
        dims: dict[Any, int] = {}
        for cuts, local in sorted(found.items(), key=lambda item: item[0]):
            outer.setdefault(cuts[:-1], []).append(local)
            dims[cuts[:-1]] = cuts[-1][0]
        found = {cuts: torch.cat(locals, dims[cuts]) for cuts, locals in outer.items()}
    return next(iter(found.values()))


def sequence_order(length: int, ranks: int, by: str) -> Tensor:
    """Where each position is among those of all ranks, one rank's after the other."""
    if by != "ring":
        return torch.arange(length)
    return torch.cat([zigzag_positions(length, place, ranks) for place in range(ranks)]).argsort()
