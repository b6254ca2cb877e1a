"""What a collective sends, over which links, and how long it takes: NCCL's own reckoning, a latency and a rate.

A ring over n ranks sends S · (n − 1) / n bytes from each rank for an all-gather to S bytes, or a reduce-scatter of S
bytes, and twice as many for an all-reduce. It takes n − 1 hops, or twice as many; where the ranks are on m nodes, m − 1 of
these are between nodes. An all-reduce over several nodes may be a tree instead, whose hops between nodes are log2 m.
On g ranks of a node all g network cards carry their part, so a card carries 1 / g of what a ring sends between nodes.
Source: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc,
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lockstep.plan.hardware import ACROSS, Hardware
from lockstep.plan.measured_seconds import seconds_at

INSIDE, BETWEEN = "inside", "between"

# The kinds of torch's operations, functional or not, by the names that both namespaces give them.
COLLECTIVE_KINDS = {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
}


def collective_kind(operation: str) -> str:
    """`_allgather_base_` and `all_gather_into_tensor_out` are both an `all-gather`."""
    name = operation.lstrip("_")
    found = [known for known in COLLECTIVE_KINDS if name.startswith(known)]
    return COLLECTIVE_KINDS[max(found, key=len)] if found else name


@dataclass(frozen=True)
class Collective:
    """One that a rank takes part in.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send or receive.
        size: bytes that are reduced, gathered, scattered or sent in all.
        ranks: that take part.
        nodes: that these ranks are on.
    """

    kind: str
    size: int
    ranks: int
    nodes: int

    @classmethod
    def among(cls, kind: str, size: int, ranks: Sequence[int], per_node: int) -> Collective:
        """A collective of these ranks of the world, `per_node` of which are on each node."""
        return cls(kind, size, len(ranks), len({rank // per_node for rank in ranks}))

    @property
    def link(self) -> str:
        """The slowest link that it needs."""
        return BETWEEN if self.nodes > 1 else INSIDE

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        n = self.ranks
        if n == 1:
            return 0.0
        if self.kind == "all-reduce":
            return 2 * self.size * (n - 1) / n
        if self.kind in ("all-gather", "reduce-scatter", "all-to-all"):
            return self.size * (n - 1) / n
        return 0.0 if self.kind == "receive" else float(self.size)

    def seconds(self, hardware: Hardware) -> float:
        """How long it takes when all ranks have come."""
        if self.ranks == 1 or not self.size or self.kind == "receive":  # whose time is the send's
            return 0.0
        if self.curve in hardware.measured:
            return self._measured(hardware, self.curve)
        inside, between = hardware.inside, hardware.between
        n, m = self.ranks, self.nodes
        if self.kind == "send":
            link = between if m > 1 else inside
            return hardware.collective + link.latency + self.size / link.rate
        hops = (2 if self.kind == "all-reduce" else 1) * ((n - m) * inside.latency + (m - 1) * between.latency)
        if self.kind == "all-reduce" and m > 1:
            hops = min(hops, 2 * ((n / m - 1) * inside.latency + math.log2(m) * between.latency))
        share = n / m  # ranks of a node, each with a network card
        within = self.sent / inside.rate if share > 1 else 0.0
        across = self.leaves / between.rate
        return hardware.collective + hops + max(within, across if m > 1 else 0.0)

    @property
    def curve(self) -> str:
        """What its seconds are called in a profile that was measured."""
        return self.kind if self.nodes == 1 else self.kind + ACROSS

    @property
    def leaves(self) -> float:
        """Bytes that a rank's network card sends: of an all-to-all its own rank's, else its part of the node's."""
        return (
            self.size * (self.nodes - 1) / self.nodes
            if self.kind == "all-to-all"
            else self.sent * self.nodes / self.ranks
        )

    def work(self, hardware: Hardware) -> float:
        """Seconds of a rank's processor, where that was measured."""
        if self.ranks == 1 or not self.size or self.kind == "receive":
            return 0.0
        return self._measured(hardware, f"{self.curve}, work")

    def _measured(self, hardware: Hardware, curve: str) -> float:
        """On a curve that was measured among all ranks, of a node or of all nodes.

        A ring of fewer ranks in a node has so many fewer hops. Between nodes, a message of nearly nothing takes what its hops
        between them take, and what a larger one takes besides follows the bytes that leave a node.
        """
        points = hardware.measured.get(curve)
        if not points:
            return 0.0
        seconds = seconds_at(points, self.size)
        if self.kind == "send":
            return seconds
        if self.nodes == 1:
            return seconds * (self.ranks - 1) / max(1, hardware.per_node - 1)
        everyone = replace(self, ranks=hardware.per_node * hardware.nodes, nodes=hardware.nodes)
        hops, least = self._hops(hardware) / everyone._hops(hardware), points[0][1]
        return least * hops + (seconds - least) * self.leaves / everyone.leaves

    def _hops(self, hardware: Hardware) -> float:
        """Between nodes, one after the other: of a ring, or of NCCL's tree."""
        tree = self.kind == "all-reduce" and hardware.device == "cuda"
        return math.log2(self.nodes) if tree else self.nodes - 1.0
