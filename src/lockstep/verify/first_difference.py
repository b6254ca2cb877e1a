"""Where two recorded runs part: the first step, layer, operation and tensor that differ beyond a tolerance.

Forward is looked at in its order, then the loss, then backward in its order, parameters' gradients, weights and buffers.
What differs inside a layer and not in what comes out of it is no difference: the rows of a mixture's experts, say, lie in
another order where a batch is cut.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.callbacks.tensor_recorder import INPUT, OUTPUT, TENSORS_FOLDER, CallEvent
from lockstep.utils.text import count
from lockstep.verify.recording import RecordedStep, Way, parents, recorded_steps

LARGEST_ALLOWED = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}  # by precision
# A parameter, or its gradient, that is smaller than this share of all of them is rounding.
SMALLEST = {"fp64": 1e-6, "fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}
BEGINNING, FORWARD, LOSSES, BACKWARD = "start", "forward", "loss", "backward"
GRADIENTS, WEIGHTS, BUFFERS = "gradients", "weights", "buffers"
LARGEST = 10  # differences that are shown


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from the other run's.

    Attributes:
        step, phase: where in the run: FORWARD, BACKWARD, …
        layer: its path in the model, "" for the model itself; of parameters, the layer that has them.
        tensor: in words: its input, gradient of its output, …
        event: of FORWARD and BACKWARD.
        off: ‖a − b‖ / ‖b‖.
        shape: of the whole tensor.
        largest: (place, the one's number, the other's) where they are furthest apart.
        factor: what the one is times the other, where that is all of the difference.
        apart: ranks of the first run that should have the same differ.
    """

    step: int
    phase: str
    layer: str
    tensor: str
    off: float
    shape: tuple[int, ...] = ()
    largest: tuple[tuple[int, ...], float, float] | None = None
    factor: float | None = None
    apart: bool = False
    event: CallEvent | None = None


@dataclass(frozen=True)
class Parting:
    """What a comparison has found.

    Attributes:
        first: None where nothing is off.
        kind: the class of its layer.
        operation: which one makes the first difference, in words.
        largest: some differences of its step; of all steps where nothing is off.
        off: how many tensors are in that step.
        compared, steps: how many tensors, in how many steps.
        unordered: layers that have their rows in another order, and of which nothing is compared.
        inside: the first operation of torch's that differs there, in words; empty where it is not known.
    """

    first: Difference | None
    kind: str
    operation: str
    largest: list[Difference]
    off: int
    compared: int
    steps: int
    allowed: float
    inside: str = ""
    unordered: tuple[str, ...] = ()


def find_parting(steps: Iterable[tuple[int, RecordedStep, RecordedStep]], allowed: float | None = None) -> Parting:
    """Compare runs step by step, up to the first one in which they part.

    Args:
        steps: (its number, the one run's, the other run's).
        allowed: the largest relative difference; None: by precision, the coarser of both.
    """
    every: list[Difference] = []
    compared, number, limit = 0, 0, 0.0
    for number, mine, theirs in steps:
        precisions = [mine.about["precision"], theirs.about["precision"]]
        limit = max(LARGEST_ALLOWED[each] for each in precisions) if allowed is None else allowed
        found = list(step_differences(number, mine, theirs, max(SMALLEST[each] for each in precisions)))
        compared += len(found)
        unordered = {each.layer for each in found if each.phase == FORWARD and hidden(each, found, limit)}
        seen = coming_out(found, limit, unordered)
        every += seen
        off = [each for each in seen if not each.off <= limit]
        if off:
            kinds = theirs.kinds | mine.kinds
            kind, operation = kinds.get(off[0].layer, ""), guilty(off[0], kinds, seen, limit)
            largest, mixed = by_size(off), tuple(sorted(unordered))
            return Parting(off[0], kind, operation, largest, len(off), compared, number, limit, unordered=mixed)
    return Parting(None, "", "", by_size(every), 0, compared, number, limit)


def parting_of(
    mine: Path, theirs: Path, local: tuple[bool, bool] = (False, False), allowed: float | None = None
) -> Parting:
    """Compare the recordings of two trainings of a tool's, which are deleted then: they are large.

    Args:
        local: of each, whether its ranks update weights of their own.
    """
    a, b = recorded_steps(mine), recorded_steps(theirs)
    steps = (
        (step, RecordedStep.load(a[step], local[0]), RecordedStep.load(b[step], local[1])) for step in a if step in b
    )
    parting = find_parting(steps, allowed)
    for out in (mine, theirs):
        shutil.rmtree(out / TENSORS_FOLDER)
    return parting


def by_size(found: list[Difference]) -> list[Difference]:
    """The largest ones."""
    return sorted((each for each in found if each.off), key=lambda each: -each.off)[:LARGEST]


def step_differences(step: int, mine: RecordedStep, theirs: RecordedStep, floor: float) -> Iterator[Difference]:
    """Every tensor that both have, in the order of a step."""
    yield from of_names(step, BEGINNING, mine, theirs, floor)
    yield from of_events(step, FORWARD, mine, theirs)
    losses = mine.loss(), theirs.loss()
    if losses[0] is not None and losses[1] is not None:
        off, largest, factor = distance(losses[0], losses[1], 0.0)
        yield Difference(step, LOSSES, "", "the loss", off, (), largest, factor)
    yield from of_events(step, BACKWARD, mine, theirs)
    for phase in (GRADIENTS, WEIGHTS, BUFFERS):
        yield from of_names(step, phase, mine, theirs, floor)


def of_events(step: int, phase: str, mine: RecordedStep, theirs: RecordedStep) -> Iterator[Difference]:
    """What layers' calls take and give."""
    a, b = mine.events(phase), theirs.events(phase)
    both = set(a) & set(b)
    for event in a if theirs.about["stages"] else b:
        if event not in both:
            continue
        if (found := compare(phase, event, mine, theirs)) is not None:
            (off, largest, factor), shape, apart = found
            layer, call, what, index = event
            named = {INPUT: "its input", OUTPUT: "its output"}[what]
            named = f"gradient of {named}" if phase == BACKWARD else named
            named += f" {index + 1}" * bool(index) + f", call {call + 1}" * bool(call)
            yield Difference(step, phase, layer, named, off, shape, largest, factor, apart, event)


def compare(
    phase: str, event: CallEvent, mine: RecordedStep, theirs: RecordedStep, other: CallEvent | None = None
) -> Any:
    """((how far, where, factor), shape, whether ranks are apart) by the ways to join that give both one shape; None where
    there are none. Of several such ways, the one in which they are closest.

    Args:
        other: what the event is called in `theirs`, where it is called something else.
    """
    best: Any = None
    other = other or event
    shapes: dict[tuple[int, ...], list[Way]] = {}
    for way, shape in theirs.ways(phase, other):
        shapes.setdefault(shape, []).append(way)
    for way, shape in mine.ways(phase, event):
        for their_way in shapes.get(shape, []) if shape else []:
            a, b = mine.joined(phase, event, way), theirs.joined(phase, other, their_way)
            found = furthest(a, b, 0.0), shape, ranks_differ(a)
            if best is None or found[0][0] < best[0][0]:
                best = found
            if best[0][0] <= 1e-12:
                return best
    return best


def of_names(step: int, phase: str, mine: RecordedStep, theirs: RecordedStep, floor: float) -> Iterator[Difference]:
    """Parameters' gradients, in the order of backward, or weights, or buffers."""
    a, b = mine.named(phase), theirs.named(phase)
    norm = sum(copies[0].double().norm().item() ** 2 for copies in b.values()) ** 0.5
    names = list(reversed(b)) if phase == GRADIENTS else list(b)
    for name in names:
        if name in a:
            off, largest, factor = furthest(a[name], b[name], floor * norm)
            what = {GRADIENTS: f"gradient of {name}", BEGINNING: f"{name} before the first step"}.get(phase, name)
            layer = name.rpartition(".")[0]
            yield Difference(
                step, phase, layer, what, off, tuple(b[name][0].shape), largest, factor, ranks_differ(a[name])
            )


def furthest(mine: Sequence[Tensor], theirs: Sequence[Tensor], floor: float) -> Any:
    """Of several copies, those that are furthest apart; as `distance`."""
    pairs = [(mine[number % len(mine)], theirs[number % len(theirs)]) for number in range(max(len(mine), len(theirs)))]
    return max((distance(a, b, floor) for a, b in pairs), key=lambda found: found[0])


def ranks_differ(copies: Sequence[Tensor]) -> bool:
    """Whether what ranks have alike is not alike."""
    return any(each.shape == copies[0].shape and distance(each, copies[0], 0.0)[0] > 1e-6 for each in copies[1:])


def distance(mine: Tensor, theirs: Tensor, floor: float) -> tuple[float, Any, float | None]:
    """(‖a − b‖ / ‖b‖, where they are furthest apart, the factor between them if that is all)."""
    if mine.shape != theirs.shape:
        return float("inf"), None, None
    a, b = mine.double(), theirs.double()
    gap = torch.where(a == b, 0.0, (a - b).abs())  # inf − inf
    off = gap.norm().item()
    if off == 0:
        return 0.0, None, None
    off = off / max(b.norm().item(), floor, 1e-30)
    off = off if off == off else float("inf")
    flat = int(gap.nan_to_num(nan=float("inf")).flatten().argmax()) if gap.numel() else 0
    place = tuple(int(each) for each in torch.unravel_index(torch.tensor(flat), b.shape)) if b.dim() else ()
    factor = None
    if b.any() and torch.isfinite(a).all():
        times = ((a * b).sum() / (b * b).sum()).item()
        factor = times if (a - times * b).norm() <= 1e-3 * gap.norm() else None
    return off, (place, a.flatten()[flat].item(), b.flatten()[flat].item()), factor


def coming_out(found: Sequence[Difference], limit: float, unordered: set[str]) -> list[Difference]:
    """Without those that do not come out of the layer around them, and backward of what does not so in forward."""
    return [
        each
        for each in found
        if not (each.phase == BACKWARD and within(each.layer, unordered)) and not hidden(each, found, limit)
    ]


def within(layer: str, layers: set[str]) -> bool:
    return not layers.isdisjoint([layer, *parents(layer)])


def hidden(each: Difference, found: Sequence[Difference], limit: float) -> bool:
    """Whether a difference within a layer does not come out of it."""
    if each.event is None or each.off <= limit:
        return False
    what = OUTPUT if each.phase == FORWARD else INPUT
    for layer in parents(each.layer):
        out = [other.off for other in found if (other.phase, other.layer) == (each.phase, layer) and is_of(other, what)]
        if out:
            return all(off <= limit for off in out)
    return False


def is_of(each: Difference, what: str) -> bool:
    """Whether it is one of what a layer takes (INPUT) or gives (OUTPUT)."""
    return each.event is not None and each.event[2] == what


def guilty(first: Difference, kinds: dict[str, str], found: Sequence[Difference], limit: float) -> str:
    """Which operation makes the first difference, in words."""
    layer, kind = first.layer, kinds.get(first.layer, "")
    if first.event is None:
        same = [each for each in found if each.phase == first.phase]
        off = [each for each in same if not each.off <= limit]
        several = len({each.layer for each in off}) > 1
        many = f" (of {len(off)} of {count(len(same), 'parameter')})" * several
        after = "what is done to gradients after backward: adding up, averaging"
        return {
            BEGINNING: "none: the weights before training" + many,
            LOSSES: "the loss, of outputs that are equal",
            GRADIENTS: after + many if several else f"backward of {kind} to its weights, or {after}",
            WEIGHTS: "the update: clipping, learning rate, optimizer" + many,
            BUFFERS: f"{kind}.forward, which updates them",
        }[first.phase]
    has_layers = any(layer in parents(other) for other in kinds if other != layer)
    around = kinds.get(layer.rpartition(".")[0], "the model") if layer else ""
    if first.phase == FORWARD:
        if first.event[2] == OUTPUT:
            return f"{kind}.forward" + ", in its own operations behind its layers'" * has_layers
        return f"{around}.forward, in front of it" if layer else "the batch: data, order, augmentation"
    if first.event[2] == INPUT:
        return f"backward of {kind}" + ", of its own operations in front of its layers'" * has_layers
    return (
        f"backward of {around}.forward, behind it"
        if layer
        else "backward of the loss, or what the loss is multiplied by"
    )
