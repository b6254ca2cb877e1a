"""Whether all ranks are about to do the same work, asked once before the first step.

A rank whose host holds a file less runs dry at the end of an epoch, and hangs the others; one that holds other files
trains on them without a word.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from lockstep.checkpoint import gather
from lockstep.data import Images
from lockstep.errors import UserError

if TYPE_CHECKING:
    from lockstep.run import Run


def hold_alike(run: Run) -> None:
    """Compare the ranks' data sets and steps; all call it together.

    Raises:
        UserError: on all ranks, about the first one that differs from rank 0.
    """
    if run.world.world_size == 1:
        return
    mine = {
        "images to train on": len(run.train_set),
        "images to evaluate": len(run.eval_set),
        "steps to take": run.total_steps,
        "other images to train on": checksum(run.train_set),
        "other images to evaluate": checksum(run.eval_set),
    }
    where = f"data.root={run.config.data.root}" if run.config.data.root else f"data={run.config.data.name}"
    if words := difference(gather(mine, run.world.control), run.world.hosts):
        raise UserError(f"{words}; {where} must be the same on all hosts")


def checksum(images: Images) -> int:
    """Of the labels and, where the images are files, of their names; what is in the files would take too long."""
    names = "\n".join("/".join(path.parts[-2:]) for path in getattr(images, "paths", []))
    return zlib.crc32(names.encode(), zlib.crc32(images.labels.numpy().tobytes()))


def difference(everyone: list[dict[str, int]], hosts: list[str]) -> str:
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
