"""Whether all ranks are about to do the same work, asked once before the first step.

A rank whose host holds a file less runs dry at the end of an epoch, and hangs the others; one that holds other files
trains on them without a word.
"""

from __future__ import annotations

from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.process_group import World
from lockstep.errors import UserError


def check_consistency(facts: dict[str, int], where: str, world: World) -> None:
    """Compare what the ranks are about to do; all call it together.

    Args:
        facts: {what is counted: this rank's number}; of a name that begins with `other` the number is a checksum.
        where: the setting that says where the data lie.

    Raises:
        UserError: on all ranks, about the first fact that differs from rank 0's.
    """
    if world.world_size == 1:
        return
    if words := first_difference(gather_objects(facts, world.control), world.hosts):
        raise UserError(f"{words}; {where} must be the same on all hosts")


def first_difference(everyone: list[dict[str, int]], hosts: list[str]) -> str:
    """`rank 1 (node2) has 99 images to train on, and rank 0 (node1) has 100`; empty where all are alike."""
    for what, expected in everyone[0].items():
        others = [rank for rank, theirs in enumerate(everyone) if theirs[what] != expected]
        if others:
            who, first = (f"rank {rank} ({hosts[rank]})" for rank in (others[0], 0))
            more = f" ({len(others)} ranks differ from it)" if len(others) > 1 else ""
            if what.startswith("other"):
                return f"{who} has {what} than {first}{more}"
            return f"{who} has {everyone[others[0]][what]} {what}, and {first} has {expected}{more}"
    return ""
