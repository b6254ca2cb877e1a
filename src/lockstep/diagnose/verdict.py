"""Why ranks wait for each other, in words: which rank is the cause, and where each rank is.

Pure judgement of the ranks' heartbeats. No torch in here: launchers use it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.diagnose.stacks import crash_place, has_content
from lockstep.distributed.heartbeat import FAILED, Beat, process_state
from lockstep.distributed.host_memory import FINISHED, read_heartbeat, read_heartbeats

MAX_LISTED = 8  # ranks, or places, that a message lists


def rank_state(facts: Mapping[str, Any], answered: bool) -> str:
    """What has become of a rank: failed, finished, answered, gone, stopped, or silent, which says nothing."""
    end = facts.get("end", "")
    if end and not facts.get("stuck"):  # a rank that ends because it waited too long is not the cause
        return FINISHED if end == FINISHED else FAILED
    if answered:
        return "answered"
    if facts.get("host") == socket.gethostname() and "pid" in facts:
        letter, start = process_state(facts["pid"])
        if letter in ("", "Z", "X") or start != facts["born"]:
            return "gone"
        if letter in ("T", "t"):
            return "stopped"
    return "silent"


def explain_wait(
    everyone: list[Beat], states: list[str], *, asker: int, seconds: float, folder: Path, why: str = ""
) -> str:
    """A line that says what holds the run up, then a line per rank, or group of ranks, that says where it is.

    Args:
        everyone: what is known of each rank.
        states: what has become of each, from rank_state.
        asker: the rank that has waited too long.
        seconds: timeout_seconds.
        folder: the run's ranks/.
        why: the reason, where no rank is missing or cut off; empty: what they disagree about.
    """
    add_crash_places([facts for facts, what in zip(everyone, states, strict=True) if what == "gone"], folder)
    reasons = missing_ranks(everyone, states) or unreachable_ranks(everyone, seconds)
    reasons = reasons or [why or disagreement(everyone, asker, seconds)]
    stacks = [f"{r}.stack" for r in range(len(everyone)) if has_content(folder / f"{r}.stack")]
    more = [f"stack traces: {folder.name}/{join_words(stacks)}"] if stacks else []
    return "\n".join(["; ".join(reasons), *rank_lines(everyone, states), *more])


def missing_ranks(everyone: list[Beat], states: list[str]) -> list[str]:
    """Of each kind of rank that can no longer take part, a phrase."""
    words = {
        FAILED: "{who} failed{where}: {end}",
        "gone": "{who} ended without an error message{where}",
        FINISHED: "{who} ended{where}, while the others continue: {it} took fewer steps, or returned early",
        "stopped": "{who} {be} stopped{where}: by SIGSTOP, Ctrl-Z or a debugger",
        "silent": "{who} {do} not answer{last}: {its} host or {its} network is lost, or {it} {be} stopped",
    }
    one, several = ("it", "its", "is", "does"), ("they", "their", "are", "do")
    found = []
    for kind, phrase in words.items():
        ranks = [facts for facts, what in zip(everyone, states, strict=True) if what == kind]
        if ranks:
            first = ranks[0]
            last = f", last heartbeat{at_step(first)}" if at_step(first) else ""
            who, end = list_ranks(ranks), first.get("end", "")
            it, its, be, do = one if len(ranks) == 1 else several
            said = phrase.format(who=who, where=at_step(first), last=last, end=end, it=it, its=its, be=be, do=do)
            found.append(said)
    return found


def unreachable_ranks(everyone: list[Beat], seconds: float) -> list[str]:
    """Which ranks, all of them alive, can no longer be reached.

    Neither side of a broken network knows which of them is broken, unless an interface has lost its link. Without such
    a sign, the ranks are named that are cut off from rank 0, which serves the store.
    """
    down = [facts for facts in everyone if facts.get("lost_link")]
    if down:
        return [f"{list_ranks(down)} lost the network{at_step(down[0])}: {down[0]['lost_link']} has no link"]
    cut = [facts for facts in everyone if facts.get("cut")]
    there = "the store" if everyone[0] in cut else f"{list_ranks(everyone[:1])}, which serves the store"
    return [f"{list_ranks(cut)} can no longer be reached from {there} (timeout_seconds={seconds:g})"] if cut else []


def disagreement(everyone: list[Beat], asker: int, seconds: float) -> str:
    """What ranks that all answer disagree about."""
    waited = f"timeout_seconds={seconds:g}"
    mine = everyone[asker].get("collectives", {})
    # A checkpoint's thread has a group of its own, whose collective need not be the last one.
    for group in sorted(mine, key=lambda group: group != everyone[asker]["last"]):
        there = [facts for facts in everyone if group in facts.get("collectives", {})]
        latest = max(there, key=lambda facts: facts["collectives"][group][0])
        ahead = [facts for facts in there if facts["collectives"][group][0] == latest["collectives"][group][0]]
        behind = [facts for facts in there if facts not in ahead]
        if behind:
            have = "has" if len(behind) == 1 else "have"
            name = collective_name(latest, group)
            return f"{list_ranks(behind)} {have} not reached {name}, in which {list_ranks(ahead)} waited for {waited}"
        kinds: dict[str, list[Beat]] = {}
        for facts in there:
            kinds.setdefault(collective_name(facts, group), []).append(facts)
        if len(kinds) > 1:
            apart = ", ".join(f"{list_ranks(ranks)} in {kind}" for kind, ranks in kinds.items())
            return f"the ranks are in different collectives ({waited}): {apart}"
    who = list_ranks([everyone[asker]])
    if len({(facts.get("step"), facts.get("call")) for facts in everyone}) > 1:
        return f"{who} waited too long for ranks that are elsewhere ({waited})"
    return f"{who} waited too long ({waited}), though all ranks are in the same place: look at their network"


def rank_lines(everyone: list[Beat], states: list[str]) -> list[str]:
    """Where each rank is; those at the same place share a line."""
    places: dict[str, list[Beat]] = {}
    for facts, what in zip(everyone, states, strict=True):
        places.setdefault(position(facts, what), []).append(facts)
    lines = [f"  {list_ranks(ranks)}: {place}" for place, ranks in places.items()]
    return lines[:MAX_LISTED] + ([f"  and {len(lines) - MAX_LISTED} other places"] if len(lines) > MAX_LISTED else [])


def position(facts: Beat, what: str = "answered") -> str:
    """One rank's step, phase, call and last collective."""
    if "step" not in facts:
        return "left no heartbeat"
    parts = [f"step {facts['step']}", facts["phase"]]
    if "call" in facts:
        parts.append(facts["call"])
    if "writing" in facts:
        parts.append(f"writing a checkpoint at {facts['writing']}")
    if facts.get("last"):
        parts.append(f"last collective {collective_name(facts, facts['last'])}")
    return ", ".join(parts if what == "answered" else [*parts, what])


def at_step(facts: Beat) -> str:
    """` in step 8 (training)`, or nothing where nothing is known."""
    return f" in step {facts['step']} ({facts['phase']})" if "step" in facts else ""


def collective_name(facts: Beat, group: str) -> str:
    """`all_reduce no. 45 of [4000]`"""
    number, name, sizes = facts["collectives"][group]
    return f"{name} no. {number}" + (f" of {sizes}" if sizes else "")


def list_ranks(ranks: list[Beat]) -> str:
    """`ranks 0 (node1), 3 (node2)`; of very many, the first."""
    words = [f"{facts['rank']} ({facts['host']})" if "host" in facts else str(facts["rank"]) for facts in ranks]
    return f"rank{'s' if len(ranks) > 1 else ''} {join_words(words)}"


def join_words(words: list[str]) -> str:
    return ", ".join(words[:MAX_LISTED]) + (f" and {len(words) - MAX_LISTED} more" if len(words) > MAX_LISTED else "")


def describe_failure(out: Path, rank: int, aborted: bool = False) -> tuple[str, list[str]]:
    """What to say of a rank that failed: (` on node1 in step 8 (training)`, or nothing; further lines).

    Args:
        aborted: it aborted, as gloo does where the ranks' collectives do not match: the further lines then say where
            every rank was.
    """
    folder, lines = out / "ranks", []
    facts = read_heartbeat(folder, rank)
    if "step" not in facts:
        return "", []
    if aborted:
        everyone = list(read_heartbeats(folder).values())
        add_crash_places(everyone, folder)
        lines = rank_lines(everyone, ["answered"] * len(everyone))
    return f" on {facts['host']}{at_step(facts)}", lines


def add_crash_places(everyone: list[Beat], folder: Path) -> None:
    """For each rank whose stack file tells of a crash: its place, as the rank's `call`."""
    for facts in everyone:
        if place := crash_place(folder / f"{facts['rank']}.stack"):
            facts["call"] = place
