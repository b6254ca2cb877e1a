"""Within the layer that differs: the first operation whose result does, of those that two runs have recorded.

An operation whose result is off while the result of one that takes it is equal is passed over: a part of a tensor that
was made flat cannot always be put in its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lockstep.callbacks.base import Callback
from lockstep.callbacks.operation_recorder import ENTERED, GRADIENT_IN, GRADIENT_OUT, LEFT, OperationRecorder, Stretch
from lockstep.callbacks.tensor_recorder import INPUT, OUTPUT, TENSORS_FOLDER
from lockstep.distributed.collectives import broadcast_object
from lockstep.run import Run
from lockstep.verify.first_difference import BACKWARD, FORWARD, Parting, compare
from lockstep.verify.recording import RecordedStep, parents

SUSPECTS = 3  # operations that only one run has, and that are named


def stretch_of(parting: Parting) -> Stretch | None:
    """Where to look for the operation that makes a first difference; None where it is none of forward or backward, or
    where rows within lie in another order."""
    first = parting.first
    if first is None or first.event is None:
        return None
    layer, call, what, _ = first.event
    around = layer.rpartition(".")[0]
    if first.phase == FORWARD:
        begins, ends = (layer if what == OUTPUT else around, ENTERED), (layer, LEFT if what == OUTPUT else ENTERED)
    elif what == INPUT:
        begins, ends = (layer, GRADIENT_IN), (layer, GRADIENT_OUT)
    else:
        begins, ends = (around, GRADIENT_IN) if layer else ("", LEFT), (layer, GRADIENT_IN)
    mixed = any(begins[0] in (each, *parents(each)) for each in parting.unordered)
    nothing = begins == ends or (mixed and begins != ("", LEFT))
    return None if nothing else Stretch(first.step, begins, ends, call)


def first_operation(mine: Path, theirs: Path, allowed: float) -> str:
    """The first operation that differs beyond `allowed`, of two runs' folders, in words; empty where none does."""
    a, b = recorded_operations(mine), recorded_operations(theirs)
    if a is None or b is None:
        return ""
    ours, others = a.ranks[0]["operations"], b.ranks[0]["operations"]
    matcher = SequenceMatcher(None, [each[0] for each in ours], [each[0] for each in others], autojunk=False)
    pairs = {i + k: j + k for i, j, size in matcher.get_matching_blocks() for k in range(size)}
    off = {i: found for i, j in pairs.items() if (found := result_off(i, j, a, b)) is not None}
    takers: dict[int, list[int]] = {}
    for number, (_, _, sources) in enumerate(ours):
        for source in sources:
            takers.setdefault(source, []).append(number)
    right = {i for i in off if off[i] <= allowed}
    for i in sorted(off, reverse=True):
        if right.intersection(takers.get(i, [])):
            right.add(i)
    first = min(off.keys() - right, default=None)
    if first is not None:
        name, place, _ = ours[first]
        told = f"{name} at {place}, {first + 1} of {len(ours)}, off by {off[first]:.0e}"
        return "; ".join([told, *lonely(ours, others, pairs, first)])
    return "; ".join(lonely(ours, others, pairs, len(ours)))


def with_operation(
    run: Run[Any],
    parting: Parting | None,
    folders: tuple[Path, Path],
    shards: Sequence[int | None],
    again: Callable[[int, Callback], None],
) -> Parting | None:
    """A parting, with the first operation that differs within its layer, where that is found; all ranks call it.

    Args:
        parting: on rank 0, None elsewhere.
        folders: of the two trainings.
        shards: as `Run` has them, of each.
        again: trains one of the two (0 or 1) again, while a callback looks on.
    """
    stretch = broadcast_object(stretch_of(parting) if parting else None)
    if stretch is None:
        return parting
    for number in (0, 1):
        again(number, OperationRecorder(stretch, shards[number]))
    if parting is None:
        return None
    found = first_operation(*folders, parting.allowed)
    for folder in folders:
        shutil.rmtree(folder / TENSORS_FOLDER)
    return replace(parting, inside=found)


def recorded_operations(out: Path) -> RecordedStep | None:
    paths = sorted(
        (out / TENSORS_FOLDER).glob("operations-rank-*.pt"), key=lambda path: int(path.stem.rpartition("-")[2])
    )
    found = RecordedStep.load(paths) if paths else None
    return found if found and found.ranks[0]["operations"] else None


def result_off(mine: int, theirs: int, a: RecordedStep, b: RecordedStep) -> float | None:
    """How far the results of two operations are apart; None where they cannot be compared."""
    events = ("", mine, OUTPUT, 0), ("", theirs, OUTPUT, 0)
    for phase in (FORWARD, BACKWARD):
        if a.parts(phase, events[0]) and b.parts(phase, events[1]):
            found = compare(phase, events[0], a, b, events[1])
            return None if found is None else float(found[0][0])
    return None


def lonely(ours: list[Any], others: list[Any], pairs: dict[int, int], at: int) -> list[str]:
    """Operations in front of this one that only one run has, behind the last one that both have, in words."""
    before = max((i for i in pairs if i < at), default=-1)
    found = ours[before + 1 : at], others[pairs.get(before, -1) + 1 : pairs.get(at, len(others))]
    return [
        f"only the {which} run has {', '.join(f'{name} at {place}' for name, place, _ in each[:SUSPECTS])}"
        for which, each in zip(("first", "second"), found, strict=True)
        if each
    ]
