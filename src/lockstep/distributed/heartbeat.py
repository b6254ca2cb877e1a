"""Where every rank is, readable from outside whatever has become of it: ranks/<rank>.heartbeat, a line of JSON.

    {"step": 8, "phase": "training", "at": 1795285031.284, "spent": {"waiting for data": 0.031, "training": 1.204},
     "taken": 7, "busy": 0.967, "rank": 1, "host": "node1", "pid": 4711, "born": 81}

`spent` are the seconds of this start in each phase, `taken` its steps, and `busy` the seconds of them in which the
process computed, or was kept from a core by others: a rank that waits for another one does neither, so the slowest has
most. It is added up once a step, for to ask the kernel takes as long as all the rest.

A rank rewrites its line at each change of phase, by one write without flushing: the kernel keeps it however the process
ends. (A mapped file would kill the rank where the disk is full.) A rank that is asked where it is adds `call` and
`collectives`, and one that ends, `end`. No torch in here: launchers read these files as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRAINING, WAITING = STEP = "training", "waiting for data"  # the phases of a step
HUNGRY = 0.05  # share of its steps from which a rank's wait for data is spoken of
SIZE = 8192  # bytes of a heartbeat file, more than a line ever has
ROWS = 8  # of ranks that are told apart in a message
FINISHED, FAILED = "finished", "failed"
VERDICT = "the verdict: "  # before it, in a rank's stack file
Facts = dict[str, Any]
Clocks = tuple[float, float, float]  # seconds: computed by this process, by its main thread, kept from a core
NOTHING: Clocks = (0.0, 0.0, 0.0)


class Heartbeat:
    """This rank's line.

    Args:
        folder: the run's ranks/; None: nothing is written, as for a tool's ranks.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self.facts: Facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid())}
        self._telling = threading.Lock()
        self._rest = json.dumps(self.facts)[1:]  # the end of the line: all that no change of phase changes
        self._spent: dict[str, float] = {}  # seconds passed
        self._seconds: dict[str, str] = {}  # the same, as it stands in the line
        self._taken, self._since = 0, 0.0
        self._used = self._used_before = NOTHING  # in steps; by the last time that the clocks were read
        self._file: int | None = None
        self._schedule: int | None = None
        with contextlib.suppress(OSError):
            self._schedule = os.open("/proc/self/schedstat", os.O_RDONLY)  # the main thread's
        if folder is not None:
            with contextlib.suppress(OSError):  # a full disk costs the heartbeat, not the run
                self._file = os.open(folder / f"{rank}.heartbeat", os.O_RDWR | os.O_CREAT, 0o644)
        self.enter("starting", 0)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase; `step`: the one that is being taken, else as before."""
        if step is not None:
            self.facts["step"] = step
        now, before = time.perf_counter(), self.facts.get("phase")
        if before is not None:
            self._spent[before] = spent = self._spent.get(before, 0.0) + now - self._since
            self._seconds[before] = f'"{before}": {spent:.3f}'
        if before == TRAINING:
            self._taken += 1
        if phase == WAITING or not (before in STEP and phase in STEP):
            clocks = self._clocks()
            self._used, self._used_before = self._used_by(clocks), clocks
        self._since = now
        self.facts["phase"], self.facts["at"] = phase, time.time()
        self._write()

    def of_steps(self) -> tuple[float, float, float, float]:
        """Seconds of this start's steps so far: all, computed by the process, by its main thread, waiting for data."""
        spent, running = dict(self._spent), self.facts["phase"]
        spent[running] = spent.get(running, 0.0) + time.perf_counter() - self._since
        process, main, _ = self._used_by(self._clocks())
        return sum(spent.get(phase, 0.0) for phase in STEP), process, main, spent.get(WAITING, 0.0)

    def _used_by(self, clocks: Clocks) -> Clocks:
        """What the steps have used when the clocks stand so."""
        if self.facts.get("phase") not in STEP:
            return self._used
        process, main, kept = (
            used + now - before for used, now, before in zip(self._used, clocks, self._used_before, strict=True)
        )
        return process, main, kept

    def _clocks(self) -> Clocks:
        return time.process_time(), time.thread_time(), self._delayed()

    def _delayed(self) -> float:
        """Seconds that the main thread has waited for a core."""
        if self._schedule is not None:
            with contextlib.suppress(OSError, IndexError, ValueError):
                return int(os.pread(self._schedule, 100, 0).split()[1]) / 1e9
        return 0.0

    def tell(self, **facts: Any) -> None:
        """Add to what is known of this rank; from any thread."""
        with self._telling:
            self.facts |= facts
            rest = {name: value for name, value in self.facts.items() if name not in ("step", "phase", "at")}
            text = json.dumps(rest)[1:]
            if len(text) > SIZE // 2:  # very many groups; in the store, where the others look first, there is room
                text = json.dumps(rest | {"collectives": {}, "last": ""})[1:]
            self._rest = text
            self._write()

    def _write(self) -> None:
        """Put the line together by hand: json.dumps would take as long as all the rest of a change of phase."""
        if self._file is None:
            return
        facts, spent = self.facts, ", ".join(self._seconds.values())
        line = (
            f'{{"step": {facts["step"]}, "phase": "{facts["phase"]}", "at": {facts["at"]:.3f}, "spent": {{{spent}}}, '
            f'"taken": {self._taken}, "busy": {self._used[0] + self._used[2]:.3f}, {self._rest}'
        )
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.encode().ljust(SIZE - 1) + b"\n", 0)


def wait_share(spent: Mapping[str, float]) -> float:
    """Of the seconds that a rank has spent in steps, by phase, the share in which it waited for data."""
    whole = sum(spent.get(phase, 0.0) for phase in STEP)
    return spent.get(WAITING, 0.0) / whole if whole else 0.0


def read(folder: Path, rank: int) -> Facts:
    """What a rank wrote last; only its number where it wrote nothing."""
    for _ in range(3):  # it may be writing
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((folder / f"{rank}.heartbeat").read_text()))
    return {"rank": rank}


def born(pid: int) -> int | None:
    """When a process of this machine was started, in ticks since boot: with its number, who it is. None: it is gone."""
    return process(pid)[1]


def process(pid: int) -> tuple[str, int | None]:
    """(the letter of its state, when it was started) of a process of this machine; ("", None) where there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], int(words[19])
    return "", None


def state(facts: Mapping[str, Any], answered: bool) -> str:
    """What has become of a rank: failed, finished, answered, gone, stopped, or silent, which says nothing."""
    end = facts.get("end", "")
    if end and not facts.get("stuck"):  # whoever ends because it waited in vain is not the cause
        return FINISHED if end == FINISHED else FAILED
    if answered:
        return "answered"
    if facts.get("host") == socket.gethostname() and "pid" in facts:
        letter, start = process(facts["pid"])
        if letter in ("", "Z", "X") or start != facts["born"]:
            return "gone"
        if letter in ("T", "t"):
            return "stopped"
    return "silent"


# In words ---------------------------------------------------------------------------------------------------------


def verdict(everyone: list[Facts], states: list[str], *, asker: int, seconds: float, folder: Path) -> str:
    """What holds a run up, in a line, and where each rank is, in one a rank or group of ranks.

    Args:
        everyone: what is known of each rank.
        states: what has become of each, as `state` says.
        asker: the rank that has waited in vain.
        seconds: timeout_seconds.
        folder: the run's ranks/.
    """
    for facts, what in zip(everyone, states, strict=True):
        if what == "gone" and (place := left_behind(folder, facts["rank"])):
            facts["call"] = place
    why = causes(everyone, states) or parted(everyone, seconds) or [disagreement(everyone, asker, seconds)]
    stacks = [f"{r}.stack" for r in range(len(everyone)) if has_content(folder / f"{r}.stack")]
    more = [f"stack traces: {folder.name}/{listing(stacks)}"] if stacks else []
    return "\n".join(["; ".join(why), *rows(everyone, states), *more])


def causes(everyone: list[Facts], states: list[str]) -> list[str]:
    """Of each kind of rank that can no longer take part, a phrase."""
    words = {
        FAILED: "{who} failed{where}: {end}",
        "gone": "{who} ended without a word{where}",
        FINISHED: "{who} ended{where}, and the others go on: it took fewer steps, or left early",
        "stopped": "{who} stands still{where}: stopped by SIGSTOP, Ctrl-Z or a debugger",
        "silent": "{who} does not answer{last}: its host or its network is lost, or it is stopped",
    }
    found = []
    for kind, phrase in words.items():
        ranks = [facts for facts, what in zip(everyone, states, strict=True) if what == kind]
        if ranks:
            first = ranks[0]
            last = f", last heard of{when(first)}" if when(first) else ""
            found.append(phrase.format(who=names(ranks), where=when(first), last=last, end=first.get("end", "")))
    return found


def parted(everyone: list[Facts], seconds: float) -> list[str]:
    """Which of the ranks that all live can no longer be reached.

    Neither side of a broken network can know which of them has broken, unless an interface has lost its link. Then
    those are named that are cut off from rank 0, in whose store all meet.
    """
    down = [facts for facts in everyone if facts.get("lost_link")]
    if down:
        return [f"{names(down)} lost the network{when(down[0])}: {down[0]['lost_link']} has no link"]
    cut = [facts for facts in everyone if facts.get("cut")]
    there = "where all meet" if everyone[0] in cut else f"{names(everyone[:1])}, where all meet"
    return [f"{names(cut)} can no longer be reached from {there} (timeout_seconds={seconds:g})"] if cut else []


def disagreement(everyone: list[Facts], asker: int, seconds: float) -> str:
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
            return (
                f"{names(behind)} {have} not come to {collective(latest, group)}, in which {names(ahead)} waited for "
                f"{waited}"
            )
        kinds: dict[str, list[Facts]] = {}
        for facts in there:
            kinds.setdefault(collective(facts, group), []).append(facts)
        if len(kinds) > 1:
            apart = ", ".join(f"{names(ranks)} in {kind}" for kind, ranks in kinds.items())
            return f"the ranks are in different collectives ({waited}): {apart}"
    if len({(facts.get("step"), facts.get("call")) for facts in everyone}) > 1:
        return f"{names([everyone[asker]])} waited in vain for ranks that are elsewhere ({waited})"
    return f"{names([everyone[asker]])} waited in vain ({waited}), though all are in the same place: their network?"


def rows(everyone: list[Facts], states: list[str]) -> list[str]:
    """Where each rank is; those at the same place share a line."""
    places: dict[str, list[Facts]] = {}
    for facts, what in zip(everyone, states, strict=True):
        places.setdefault(where(facts, what), []).append(facts)
    lines = [f"  {names(ranks)}: {place}" for place, ranks in places.items()]
    return lines[:ROWS] + ([f"  and {len(lines) - ROWS} other places"] if len(lines) > ROWS else [])


def where(facts: Facts, what: str = "answered") -> str:
    """One rank's step, phase, call and last collective."""
    if "step" not in facts:
        return "left no heartbeat"
    parts = [f"step {facts['step']}", facts["phase"]]
    if "call" in facts:
        parts.append(facts["call"])
    if "writing" in facts:
        parts.append(f"writing a checkpoint at {facts['writing']}")
    if facts.get("last"):
        parts.append(f"last collective {collective(facts, facts['last'])}")
    return ", ".join(parts if what == "answered" else [*parts, what])


def when(facts: Facts) -> str:
    """` in step 8 (training)`, or nothing where nothing is known."""
    return f" in step {facts['step']} ({facts['phase']})" if "step" in facts else ""


def collective(facts: Facts, group: str) -> str:
    """`all_reduce no. 45 of [4000]`"""
    number, name, sizes = facts["collectives"][group]
    return f"{name} no. {number}" + (f" of {sizes}" if sizes else "")


def names(ranks: list[Facts]) -> str:
    """`ranks 0 (node1), 3 (node2)`; of very many, the first."""
    words = [f"{facts['rank']} ({facts['host']})" if "host" in facts else str(facts["rank"]) for facts in ranks]
    return f"rank{'s' if len(ranks) > 1 else ''} {listing(words)}"


def listing(words: list[str]) -> str:
    return ", ".join(words[:ROWS]) + (f" and {len(words) - ROWS} more" if len(words) > ROWS else "")


def has_content(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


def keep_stack(folder: Path, rank: int) -> None:
    """Put aside what an earlier attempt left in ranks/<rank>.stack, as <rank>.stack.1, 2, ...: the next one's is to
    come in its place."""
    old = folder / f"{rank}.stack"
    if has_content(old):
        number = 1
        while (kept := old.with_name(f"{old.name}.{number}")).exists():
            number += 1
        old.rename(kept)


def left_behind(folder: Path, rank: int) -> str:
    """The place that a crash left in ranks/<rank>.stack; empty where it left none."""
    return crash_in(folder / f"{rank}.stack")


def crash_in(stack: Path) -> str:
    """The place of a crash that a stack file tells of; empty where it tells of none.

    faulthandler lists the threads' frames from the innermost outwards, and the main thread last.
    """
    try:
        text = stack.read_text(errors="replace")
    except OSError:
        return ""
    cause = re.search(r"^Fatal Python error: (.+)", text, re.MULTILINE)
    blocks = re.split(r"^(?:Current thread|Thread) .*\n", text[cause.start() :] if cause else "", flags=re.MULTILINE)
    frames = re.findall(r'^  File "(.+)", line (\d+) in \S+', blocks[-1], re.MULTILINE)
    if not cause or not frames:
        return ""
    mismatch = cause[1] == "Aborted" and any("/torch/" in file for file, _ in frames)
    said = "in a collective of another size than the others'" if mismatch else cause[1]
    return f"{spot([(file, int(line)) for file, line in reversed(frames)])}, {said}"


def obituary(out: Path, rank: int, aborted: bool = False) -> tuple[str, list[str]]:
    """What is to be said of a rank that broke: (on which host and in which step, with a blank in front; lines more).

    Args:
        aborted: by itself, as gloo does where the ranks' collectives do not fit together: then all ranks are told of.
    """
    folder = out / "ranks"
    facts = read(folder, rank)
    if "step" not in facts:
        return "", []
    lines = []
    if aborted:
        numbers = sorted(int(path.stem) for path in folder.glob("[0-9]*.heartbeat"))
        everyone = [read(folder, number) for number in numbers]
        for each in everyone:
            if place := left_behind(folder, each["rank"]):
                each["call"] = place
        lines = rows(everyone, ["answered"] * len(everyone))
    return f" on {facts['host']}{when(facts)}", lines


# Where a stack is -------------------------------------------------------------------------------------------------

MINE = os.path.dirname(__file__) + os.sep


def spot(frames: list[tuple[str, int]]) -> str:
    """The innermost line of the user's in a stack, as `loss.backward() (ddp.py:50)`; else the innermost of lockstep's.

    Args:
        frames: (file, line) of each frame, the innermost last.
    """
    starts = [number for number, (file, _) in enumerate(frames) if file == MINE + "rank.py"]
    inside = frames[starts[-1] + 1 :] if starts else frames  # what is outside has only started this rank
    theirs = [frame for frame in inside if not is_library(frame[0])]
    known = theirs or [frame for frame in inside if frame[0].startswith(MINE)] or frames[-1:]
    if not known:
        return "nowhere"
    return quoted(*known[-1])


def quoted(file: str, line: int) -> str:
    """`loss.backward() (ddp.py:50)`"""
    import linecache

    text = linecache.getline(file, line).strip()
    return f"{text} ({os.path.basename(file)}:{line})" if text else f"{os.path.basename(file)}:{line}"


def is_library(file: str) -> bool:
    """Whether a file is lockstep's, Python's or a package's, and not the user's own."""
    return (
        file.startswith((MINE, "<", os.path.dirname(os.__file__) + os.sep)) or f"{os.sep}site-packages{os.sep}" in file
    )
