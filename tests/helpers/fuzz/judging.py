"""A plan played out: each start is judged, and the end."""

from __future__ import annotations

import re
import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from lockstep.checkpoint.directory import list_checkpoints
from lockstep.config import run_directory
from lockstep.distributed.signals import PREEMPTED
from tests.helpers.fuzz import results, starts
from tests.helpers.fuzz.damage import folders_of, inflict, state_of
from tests.helpers.fuzz.plans import Fault, Plan, Setup
from tests.helpers.fuzz.results import compare, compare_in_fp64, result_of
from tests.helpers.fuzz.starts import Ended


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        counts: kills, kills in a save, preemptions, damages, resumes, world-size changes.
        places: where kills hit, as `place_of` words it.
        events: what happened, in order.
        wrong: the first thing that was not as it should be; empty: the run ended as the undisturbed one did.
        differs: whether that is a bit of the end, and not how a start went.
    """

    counts: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    events: list[str] = field(default_factory=list)
    wrong: str = ""
    differs: bool = False


def play(plan: Plan, folder: Path) -> Outcome:
    """Run a plan in an empty folder, and judge each start as well as the end."""
    setup, outcome = plan.setup, Outcome()
    expected = results.reference(Setup(setup.recipe, setup.ranks, setup.words))
    out, damaged = folder / "out", set[str]()
    sizes = plan.sizes or (setup.ranks,) * (len(plan.faults) + 1)
    started = sizes[0]
    for fault, damage, ranks in zip((*plan.faults, Fault()), (*plan.damages, None), sizes, strict=True):
        if ranks != started:
            outcome.counts["world-size changes"] += 1
        started = ranks
        before = state_of(out / run_directory.CHECKPOINTS, damaged)
        broken_ones = folders_of(out / run_directory.CHECKPOINTS, damaged)
        wanted = next(
            (path for path in list_checkpoints(out / run_directory.CHECKPOINTS) if path.name not in damaged), None
        )
        newer = {
            path.name
            for path in list_checkpoints(out / run_directory.CHECKPOINTS)
            if not wanted or path.name > wanted.name
        }
        log = out / "ranks" / "0.log"
        read = log.stat().st_size if log.exists() else 0
        ended = starts.start(replace(setup, ranks=ranks), out, fault, expected.seconds)
        words = log.read_bytes()[read:].decode(errors="replace") if log.exists() else ""
        words = "\n".join(re.findall(r"^\d\d:\d\d:\d\d .*", words, re.MULTILINE))  # DeepSpeed talks there too
        resumed = re.search(r"resuming from \S*(step-\d+), at step", words)
        tell(outcome, fault, ended, resumed)
        outcome.wrong = (
            judge(fault, ended, out)
            or judge_resume(wanted, newer, resumed, words)
            or judge_files(before, state_of(out / run_directory.CHECKPOINTS, set()))
        )
        left = folders_of(out / run_directory.CHECKPOINTS, damaged)
        damaged = {name for name, inode in left.items() if broken_ones.get(name) == inode}  # others are saved anew
        if outcome.wrong or run_directory.read_result(out).get("status") == "finished":
            break
        if damage:
            what, broken = inflict(damage, out / run_directory.CHECKPOINTS)
            damaged |= {broken} - {""}
            if what:
                outcome.counts["damages"] += 1
                outcome.events.append(what)
    else:
        outcome.wrong = "the last start was undisturbed, and yet the run has not finished"
    if not outcome.wrong:
        alike = compare_in_fp64 if plan.sizes else compare
        outcome.wrong = alike(result_of(out), expected, "checkpoint.best=true" in setup.saving)
        outcome.differs = bool(outcome.wrong)
    return outcome


def tell(outcome: Outcome, fault: Fault, ended: Ended, resumed: re.Match[str] | None) -> None:
    """Count and describe what happened in a start."""
    if resumed:
        outcome.counts["resumes"] += 1
        outcome.events.append(f"from {resumed[1]}")
    if not ended.hit:
        outcome.events.append("undisturbed")
    elif fault.sign == signal.SIGKILL:
        outcome.counts["kills"] += 1
        outcome.counts["kills in a save"] += fault.share is None
        outcome.places[place_of(ended.hit)] += 1
        outcome.events.append(f"{fault} at {ended.hit}")
    else:
        outcome.counts["preemptions"] += set(ended.codes) == {PREEMPTED}
        outcome.events.append(f"{fault} at {ended.hit}, left with {', '.join(map(str, ended.codes))}")


def place_of(hit: str) -> str:
    """Where a kill hit, in words that do not name a step or a rank: `before rename: a shard`."""
    if hit == "a moment":
        return f"{hit} of training"
    when, _, path = hit.rpartition(" ")
    name = path.rpartition("/")[2]
    kinds = {
        "LATEST": "LATEST",
        "BEST": "BEST",
        "manifest": "the manifest",
        "metadata": "the metadata",
        "_hash": "a rank's hashes",
        ".distcp": "a shard",
    }
    kind = next((words for part, words in kinds.items() if part in name), "")
    kind = kind or ("a checkpoint's folder" if "step-" in name or name == "." else "another file")
    return f"{when}: {kind}"


def judge(fault: Fault, ended: Ended, out: Path) -> str:
    """What is wrong with how a start ended; empty: nothing."""
    if ended.hung:
        return ended.hung
    codes, numbered = set(ended.codes), list(enumerate(ended.codes))
    if not ended.hit:
        return "" if codes == {0} else f"undisturbed, and yet exit codes {ended.codes}\n{ended.said}"
    if 2 in codes:
        return f"a mistake of the user's, where there was none\n{ended.said}"
    if fault.sign == signal.SIGKILL:
        blamed = [f"rank {number} failed\n" in ended.said and code != -signal.SIGKILL for number, code in numbered]
        return f"rank {blamed.index(True)} blames itself for a kill\n{ended.said}" if any(blamed) else ""
    if ended.was_training:
        if codes not in ({0}, {PREEMPTED}):
            return f"{fault} while training: exit codes {ended.codes}\n{ended.said}"
        if codes == {PREEMPTED}:
            return judge_preempted(out)
    return ""


def judge_preempted(out: Path) -> str:
    """A run that was asked to leave has lost no step."""
    result = run_directory.read_result(out)
    if result.get("status") != "preempted":
        return f"preempted, and result.json says {result.get('status')}"
    saved = [path.name for path in list_checkpoints(out / run_directory.CHECKPOINTS)] or ["step-0"]
    if int(saved[0].removeprefix("step-")) != result["steps"]:
        return f"preempted after step {result['steps']}, and the newest checkpoint is {saved[0]}"
    return ""


def judge_resume(wanted: Path | None, newer: set[str], resumed: re.Match[str] | None, words: str) -> str:
    """Whether a start went on from the newest intact checkpoint, and named what it passed over.

    Args:
        wanted: that checkpoint.
        newer: the broken ones before it.
        words: what rank 0 logged in this start.
    """
    if resumed and (wanted is None or resumed[1] != wanted.name):
        return f"resumed from {resumed[1]}, not from {wanted and wanted.name}\n{words}"
    if wanted and not resumed and "  batch  " in words:
        return f"started anew, where {wanted.name} is intact\n{words}"
    named = set(re.findall(r"skipped (step-\d+): ", words))
    if (resumed or "  batch  " in words) and named != newer:
        return f"said to have skipped {sorted(named)}, not {sorted(newer)}\n{words}"
    return ""


def judge_files(before: dict[Path, tuple[int, int, int]], after: dict[Path, tuple[int, int, int]]) -> str:
    changed = [str(path) for path, facts in before.items() if path in after and after[path] != facts]
    return f"{changed[0]} was written again" if changed else ""
