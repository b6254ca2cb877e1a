"""Where two runs part, for people: a few lines and a table that fit 80 columns."""

from __future__ import annotations

import textwrap

from rich.markup import escape
from rich.table import Table

from lockstep.utils.tables import terminal_tables, terminal_width
from lockstep.utils.text import count
from lockstep.verify.first_difference import Difference, Parting

LABEL = 11  # columns of what a line is about


def parting_lines(parting: Parting, mine: str, theirs: str) -> list[str]:
    """Step, layer, operation and tensor of the first difference, or that there is none.

    Args:
        mine, theirs: the two runs in words.
    """
    compared = f"{count(parting.compared, 'tensor')} in {count(parting.steps, 'step')}"
    first = parting.first
    if first is None:
        largest = parting.largest[0] if parting.largest else None
        end = (
            f"the largest difference is {largest.off:.0e}, {described_difference(largest)}"
            if largest
            else "to the last bit"
        )
        return wrapped(f"equal: {mine} and {theirs} by {compared}; {end}; allowed is {parting.allowed:.0e}", "")
    lines = wrapped(f"{mine} and {theirs} part in step {first.step}, {worded_phase(first)}", "")
    entries = {
        "layer": f"{first.layer or 'the model itself'}" + f" ({parting.kind})" * bool(parting.kind),
        "operation": parting.operation,
        **({"inside": parting.inside} if parting.inside else {}),
        "tensor": first.tensor + f", {list(first.shape)}" * bool(first.shape),
        "off by": f"{first.off:.0e} of its length, allowed is {parting.allowed:.0e}",
    }
    if first.factor is not None:
        entries["off by"] += f"; it is {first.factor:.6g} times the other"
    if first.largest:
        place, a, b = first.largest
        entries["furthest"] = f"at {list(place)}: " * bool(place) + f"{a:.10g} and not {b:.10g}"
    if first.apart:
        entries["ranks"] = f"those of {mine} that should have the same do not"
    return [*lines, *(line for label, text in entries.items() for line in wrapped(text, f"  {label}"))]


def worded_phase(each: Difference) -> str:
    return {
        "start": "before its forward",
        "loss": "at its loss",
        "gradients": "in its gradients",
        "weights": "in its update",
    }.get(each.phase, f"in its {each.phase}")


def described_difference(each: Difference) -> str:
    """A difference in words, but for its size."""
    of = f" of {each.layer or 'the model'}" if each.event else ""
    return f"in step {each.step}, {each.phase}: {each.tensor}{of}"


def wrapped(text: str, label: str) -> list[str]:
    """A text in lines of a terminal, behind a label."""
    indent = " " * (LABEL + 2) if label else "  "
    start = f"{label:{LABEL + 2}}" if label else ""
    return textwrap.wrap(text, terminal_width(), initial_indent=start, subsequent_indent=indent)


def parting_tables(parting: Parting) -> list[Table]:
    """The largest differences of the step in which they part."""
    rows = parting.largest
    if parting.first is None or not rows:
        return []
    title = f"the largest of {count(parting.off, 'tensor')} that are off in step {parting.first.step}"
    columns = {
        "in": [each.phase for each in rows],
        "layer": [escape(each.layer or "(model)") for each in rows],
        "tensor": [escape(each.tensor if each.event else each.tensor.replace(f"{each.layer}.", "")) for each in rows],
        "off by": [f"{each.off:.0e}" for each in rows],
    }
    return terminal_tables(title, columns, text=("in", "layer", "tensor"))
