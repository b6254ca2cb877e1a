"""A comparison's figures in words."""

from __future__ import annotations

import os

from lockstep.compare.figures import ComparisonRow
from lockstep.compare.tables import percent, score, shares
from lockstep.utils.text import count, mebibytes

NOTABLE_SHARE = 0.05  # of a step
SAME_BYTES = 1e-3  # difference of what a step sends that is a message of a run's own, such as its logs
BUSY_SHARE = 0.1  # of the machine's cores, from which other work spoils a comparison


def verdicts(rows: list[ComparisonRow]) -> list[str]:
    """The figures as sentences, the most important first."""
    if not rows:
        return ["No run came to its end."]
    best = max(rows, key=lambda row: row.samples_per_second)
    said = (
        [f"{best.label} is the fastest: {best.samples_per_second:,.0f} {best.unit}/s{spread(best)}."]
        if rows[1:]
        else []
    )
    largest = {row.recipe: max(other.ranks for other in rows if other.recipe == row.recipe) for row in rows}
    # One rank of what several can do is in the table.
    said += [sentence(row) for row in rows if row.ranks > 1 or largest[row.recipe] == 1]
    busy = busy_sentence(rows, len(os.sched_getaffinity(0)))
    return list(
        filter(
            None, [busy, *said, data_sentence(rows), memory_sentence(rows), score_sentence(rows), plan_sentence(rows)]
        )
    )


def busy_sentence(rows: list[ComparisonRow], cores: int) -> str:
    """Whether other work slowed them."""
    others = [row.cores_of_others for row in rows if row.cores_of_others is not None]
    if not others or max(others) < BUSY_SHARE * cores:
        return ""
    return (
        f"The machine was busy: other work had up to {max(others):.1f} of its {count(cores, 'core')} meanwhile. Times and "
        "ratios say little; start it again when the machine is quiet."
    )


def spread(row: ComparisonRow) -> str:
    return f" ({row.slowest:,.0f} to {row.fastest:,.0f} over {count(row.rounds, 'round')})" if row.rounds > 1 else ""


def sentence(row: ComparisonRow) -> str:
    """One row: how fast against its baseline, and where its time goes."""
    if row.speedup is None or row.efficiency is None:
        clauses = [f"{row.label} trains {row.samples_per_second:,.0f} {row.unit}/s{spread(row)}"]
    else:
        clauses = [f"{row.label} is {row.speedup:.2f} × {row.against}"]
        if row.rounds > 1:
            low, high = row.speedup_from or 0, row.speedup_to or 0
            clauses[0] += f" ({low:.2f} to {high:.2f} over {count(row.rounds, 'round')})"
            if low < 1 < high:
                clauses[0] += ", a difference within the spread of the rounds"
        if row.devices > 1:
            clauses[0] += f", an efficiency of {percent(row.efficiency)}"
    where = []
    if row.exposed_share and not row.idle_shares:
        where.append(f"{percent(row.exposed_share)} of a step is exposed communication")
    if row.idle_shares:
        where.append(f"its parts sit idle {shares(row.idle_shares)} of the time")
    if row.data_wait_share is not None and row.data_wait_share >= NOTABLE_SHARE:
        where.append(f"{percent(row.data_wait_share)} of a step is waiting for data")
    if row.threads_busy is not None and row.ranks > 1:
        where.append(f"of its {row.ranks} threads, {row.threads_busy:.2f} compute at a time in the forward")
    if row.threads_busy is not None and row.cores_busy is not None and row.devices > 1:
        where.append(f"its one process keeps {row.cores_busy:.2f} of {count(row.devices, 'core')} busy")
    return "; ".join([*clauses, *where]) + "."


def data_sentence(rows: list[ComparisonRow]) -> str:
    """Whether input keeps up everywhere."""
    waits = [row.data_wait_share for row in rows if row.data_wait_share is not None]
    if not waits or max(waits) >= NOTABLE_SHARE:
        return ""
    return f"None of them waits for data for more than {percent(max(waits), 1)} of a step."


def memory_sentence(rows: list[ComparisonRow]) -> str:
    """Who holds the least on its fullest rank, and who the most."""
    held = [row for row in rows if row.memory_bytes]
    if len(held) < 2:
        return ""
    by_peak = sorted(held, key=lambda row: max(row.memory_bytes))
    low, high = by_peak[0], by_peak[-1]
    least, most = max(low.memory_bytes), max(high.memory_bytes)
    words = f"At its peak the fullest rank of {low.label} holds the least, {mebibytes(least, 0)} MiB, and that of "
    words += f"{high.label} the most, {mebibytes(most, 0)} MiB"
    if most < 1.01 * least:
        words = f"At its peak the fullest rank of each holds about {mebibytes(most, 0)} MiB"
    uneven = [row for row in held if row.memory_imbalance and row.memory_imbalance > 1.1]
    if uneven:
        listed = ", ".join(f"{row.label} ({row.memory_imbalance:.2f} × the mean)" for row in uneven)
        words += f"; ranks are uneven in {listed}"
    return f"{words}."


def score_sentence(rows: list[ComparisonRow]) -> str:
    """How far apart what they learnt is."""
    known = sorted((row for row in rows if row.reached is not None), key=lambda row: row.reached or 0.0)
    if len(known) < 2:
        return ""
    low, high, name = known[0], known[-1], known[0].metric.replace("_", " ")
    if score(low, 2) == score(high, 2):
        return f"All of them reach {'an' if name[0] in 'aeiou' else 'a'} {name} of {score(low, 2)}."
    words = "Accuracies go" if name == "accuracy" else f"Their {name} goes"
    return f"{words} from {score(low, 2)} ({low.label}) to {score(high, 2)} ({high.label})."


def plan_sentence(rows: list[ComparisonRow]) -> str:
    """How far recipes.plan is off."""
    ratios = [row.planned_ratios for row in rows]
    steps, sent = ([each[name] for each in ratios if name in each] for name in ("seconds", "sent"))
    if not steps:
        return ""
    ends = dict.fromkeys(f"{share:.2f}" for share in (min(steps), max(steps)))
    words = f"recipes.plan predicts {' to '.join(ends)} of the steps' time"
    if sent:
        same = sum(abs(each - 1) < SAME_BYTES for each in sent)
        words += f", and the bytes sent of {same} of {len(sent)}"
    return f"{words}."
