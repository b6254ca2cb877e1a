"""What became of a run: judgement of what it has left (lockstep.diagnose.evidence), and what to do next."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lockstep.diagnose.evidence import collect_evidence
from lockstep.diagnose.findings import Facts, Finding, findings_table, warning_if
from lockstep.distributed.heartbeat import DATA_WAIT_SHARE, wait_share
from lockstep.utils.files import write_json
from lockstep.utils.text import count, mebibytes, short, some_of, worded

POSTMORTEM_FILE = "postmortem.json"
SLOWED_DOWN = 0.7  # of its earlier speed, below which a run is said to have slowed down
UNEVEN = 2.0  # times the median that the slowest twentieth of the steps may take
FEW_STEPS = 5  # below which a rank's step times say nothing
STRAGGLER = 1.2  # times the median that the slowest rank may compute
SHOWN_ATTEMPTS = 3  # earlier attempts whose end is shown
GROWN = 1.3  # times its earlier peak, from which memory is said to grow
REMEDIES = {  # what an error's words call for
    r"out of memory|bad_alloc|can't allocate memory": "see where memory goes: python -m recipes.doctor memory; or "
    "global_batch_size=auto, accumulate=2, precision=bf16, recipes.fsdp",
    r"No space left|Disk quota": "make room there, or name another out; what was saved before is intact",
    r"not finite|\bnan\b": "lower optim.lr, or set gradients.clip_norm; gradients.stop_on_nan=true names the layer",
    r"did not join|could not reach": "look at the host that is named; python -m recipes.doctor, started the same way",
    r"[Tt]imed out|time-?out": "a rank was missing: compare the ranks' steps; python -m recipes.doctor tries the links",
    r"in use|EADDRINUSE": "set another MASTER_PORT",
    r"DataLoader worker": "a worker was killed, most often because memory ran out: set data.workers lower",
    r"CUDA error|NCCL error|ECC": "leave that host out; python -m recipes.doctor, started the same way, tries the rest",
}


def explain_run(out: Path, resume_command: Callable[[str, str, Path], str]) -> None:
    """Print what became of the run in a folder, and write postmortem.json there if possible.

    Args:
        resume_command: called with the recipe's name, the text of its config and the folder.

    Raises:
        UserError: it is no run's folder.
    """
    facts = collect_evidence(out)
    found = judge_run(facts)
    command = "the command that started it"
    with contextlib.suppress(OmegaConfBaseException, ValueError):  # the config is another version's
        command = resume_command(facts["recipe"], facts["config"], out)
    step = next_command(facts, command)
    with contextlib.suppress(OSError):
        plain = {name: value for name, value in facts.items() if name not in ("config", "metrics")}
        write_json(out / POSTMORTEM_FILE, {"findings": [asdict(each) for each in found], "next": step, **plain})
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(findings_table(found, f"{short(out)}: a run of recipes.{facts['recipe']}"))
    console.print(f"next: {step}", soft_wrap=True, markup=False)  # in one piece, to be copied


# What it means -------------------------------------------------------------------------------------------------------


def judge_run(facts: Facts) -> list[Finding]:
    """How it ended and why, how far it came, how well it went, and what is safe."""
    judges = [judge_errors, judge_earlier_attempts, judge_steps, judge_speed]
    judges += [judge_slowest_rank, judge_data_wait, judge_memory, judge_loss]
    return [judge_end(facts), *(each for judge in judges for each in judge(facts)), judge_checkpoints(facts)]


def judge_end(facts: Facts) -> Finding:
    """How it ended."""
    result, status = facts["result"], facts["result"].get("status")
    begun = format_time(facts["started"])
    last = format_time(facts["last_sign"]) if facts["last_sign"] else "never"
    if facts["running"]:
        return Finding("end", "ok", f"it is running: started {begun}, last file written {last}")
    if facts["report"]:
        return warning_if("end", status == "failed", f"completed, {last}", f"read {facts['report']}")
    if status == "finished":
        scores = {name[5:]: value for name, value in result.items() if name.startswith("eval_") and value is not None}
        loss = {"loss": scores.pop("loss")} if "loss" in scores else {}
        score = "".join(f", {worded(name, value)}" for name, value in list((scores or loss).items())[:1])
        return Finding("end", "ok", f"finished at step {result.get('steps')}{score}, {last}")
    if status == "preempted":
        return Finding("end", "warning", f"stopped by a signal, after step {result.get('steps')}, {last}")
    if status == "failed":
        return Finding("end", "fails", f"failed: started {begun}, last file written {last}")
    if not facts["ranks"] or facts["last_sign"] is None:
        return Finding("end", "fails", f"no rank wrote anything: started {begun}", "look at what the launcher printed")
    figure = f"ended without an error message: started {begun}, last file written {last}"
    remedy = "killed from outside, or its host was lost: look there with dmesg, uptime, or Slurm's sacct"
    return Finding("end", "fails", figure, remedy)


def judge_errors(facts: Facts) -> Iterator[Finding]:
    """The first error: not one that only says that another rank is gone."""
    if facts["running"] or facts["report"] or facts["result"].get("status") in ("finished", "preempted"):
        return
    lacking = facts["out_of_memory"]
    own = sorted((one for one in facts["ranks"] if one["error"] and not one["secondary"]), key=first_in_time)
    lost = [one for one in facts["ranks"] if one["secondary"] or (not one["error"] and one["heartbeat"].get("asked"))]
    silent = [one for one in facts["ranks"] if not one["error"] and one not in lost]
    if own:
        one, at = own[0], f" at {own[0]['place']}" if own[0]["place"] else ""
        more = f"; {count(len(own) - 1, 'other rank')} failed too" if len(own) > 1 else ""
        words = cut_to_length(one["error"])
        yield Finding("error", "fails", f"{name_ranks([one])}: {words}{at}{more}", remedy_for(one["error"]))
    elif lost and silent:
        beat, them = silent[0]["heartbeat"], "it" if len(silent) == 1 else "them"
        where = f" in step {beat['step']} ({beat.get('phase', 'unknown')})" if "step" in beat else ""
        figure = f"{name_ranks(silent)} left no error message{where}, and {name_ranks(lost)} waited for {them}"
        remedy = "it was killed, mostly by the kernel for lack of memory (dmesg | grep -i oom): global_batch_size=auto"
        yield Finding("error", "fails", figure, remedy)
    elif lost:
        words = cut_to_length(lost[0]["error"]) or "waited too long for the others"
        yield Finding("error", "fails", f"{name_ranks(lost)}: {words}", "look at the network")
    if lacking:
        figure = f"out of memory on rank {lacking.get('rank')} in step {lacking.get('step')}"
        yield Finding("memory", "fails", figure, "out_of_memory.json says what was held, and what would help most")
    if facts["job"].get("said"):
        yield Finding("job", "warning", f"{facts['job']['log']}: {' / '.join(facts['job']['said'])}")


def judge_earlier_attempts(facts: Facts) -> Iterator[Finding]:
    """How the attempts before the last start ended."""
    said: dict[str, list[Facts]] = {}
    for one in facts["earlier"]:
        host = next((known["host"] for known in facts["ranks"] if known["rank"] == one["rank"]), None)
        words = one["verdict"] or f"{name_ranks([one | {'host': host}])}: {one['words']}"
        said.setdefault(words, []).append(one)
    for words, some in list(said.items())[-SHOWN_ATTEMPTS:]:
        files = some_of([one["file"] for one in some])
        have = "has" if len(some) == 1 else "have"
        figure = f"{format_time(some[0]['at'])}: {words}"
        yield Finding("earlier", "warning", figure, f"ranks/{files} {have} the stacks")


def first_in_time(one: Facts) -> tuple[float, int]:
    """By the time of the error: a rank that had one wrote no more into its log."""
    return one["log_modified"], one["rank"]


def name_ranks(some: list[Facts]) -> str:
    words = [f"{one['rank']} ({one['host']})" if one["host"] else str(one["rank"]) for one in some]
    return f"rank{'s' if len(some) > 1 else ''} {', '.join(words[:4])}{' …' if len(words) > 4 else ''}"


def cut_to_length(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + " …"


def remedy_for(error: str) -> str:
    for sign, remedy in REMEDIES.items():
        if re.search(sign, error):
            return remedy
    return "the whole traceback is in that rank's log in ranks/"


def judge_steps(facts: Facts) -> Iterator[Finding]:
    """How far each rank came."""
    beats = [one for one in facts["ranks"] if "step" in one["heartbeat"]]
    logged = [line["step"] for line in facts["metrics"] if isinstance(line.get("step"), int)]
    if facts["report"]:
        return
    if beats:
        last = max(one["heartbeat"]["step"] for one in beats)
        behind = [one for one in beats if one["heartbeat"]["step"] < last]
        places: dict[str, list[Facts]] = {}
        for one in beats:
            where = f"step {one['heartbeat']['step']} ({one['heartbeat'].get('phase', 'unknown')})"
            places.setdefault(where, []).append(one)
        figure = "; ".join(f"{name_ranks(some)} in {where}" for where, some in places.items())
        late = bool(behind) and facts["result"].get("status") != "finished"
        remedy = f"the others waited for {name_ranks(behind)}: look at its log and host"
        yield warning_if("steps", late, figure, remedy)
        return
    by_log = {one["rank"]: one["logged_step"] for one in facts["ranks"] if one["logged_step"] is not None}
    figure = f"rank 0 logged step {max(logged)} last" if logged else "no step was logged"
    others = [f"rank {rank} {step}" for rank, step in by_log.items() if rank]
    if others:
        figure += f"; in their logs {', '.join(others[:6])}"
    yield warning_if("steps", not logged, figure, "")


def judge_speed(facts: Facts) -> Iterator[Finding]:
    """Whether it slowed down, and whether its steps were even."""
    # The first one counts samples; of sequences, tokens and operations follow.
    names = [name for line in facts["metrics"] for name in line if name.endswith("_per_second")]
    unit = names[0] if names else "samples_per_second"
    rates = [line[unit] for line in facts["metrics"] if line.get(unit)]
    if not rates:
        return
    figure = f"{statistics.median(rates):,.0f} {unit.removesuffix('_per_second')}/s (median of {count(len(rates), 'logged line')})"
    remedy, quarter = "", max(1, len(rates) // 4)
    before, after = statistics.median(rates[quarter:-quarter] or rates), statistics.median(rates[-quarter:])
    middle, late = facts["result"].get("step_seconds_p50"), facts["result"].get("step_seconds_p95")
    if len(rates) >= 8 and after < SLOWED_DOWN * before:
        figure += f"; {after:,.0f} in the last quarter, {before:,.0f} before"
        remedy = "another process on a host, a throttled device, or slower data: python -m recipes.doctor there"
    elif middle and late and late > UNEVEN * middle:
        figure += f"; a step takes {1e3 * middle:.0f} ms, one in twenty more than {1e3 * late:.0f}"
        remedy = "data.workers higher, or other work on these hosts"
    yield warning_if("speed", bool(remedy), figure, remedy)


def judge_slowest_rank(facts: Facts) -> Iterator[Finding]:
    """Which rank keeps the others waiting: it computes longest in a step.

    Not of GPUs, whose hosts compute while they wait for them.
    """
    if facts["environment"].get("device", "cpu") != "cpu":
        return
    beats = [(one["heartbeat"], one) for one in facts["ranks"] if one["heartbeat"].get("taken", 0) >= FEW_STEPS]
    busy = [(beat["busy"] / beat["taken"], one) for beat, one in beats if beat.get("busy")]
    if len(busy) < 2:
        return
    median = statistics.median(seconds for seconds, _ in busy)
    most, late = max(busy, key=lambda pair: pair[0])
    figure = f"{name_ranks([late])} computed for {1e3 * most:.3g} ms per step, "
    figure += f"{most / median - 1:.0%} more than the ranks' median"
    remedy = "look at its host: other work, a throttled or another device; python -m recipes.doctor tries them all"
    yield warning_if("slowest", most > STRAGGLER * median, figure, remedy)


def judge_data_wait(facts: Facts) -> Iterator[Finding]:
    """How much of their steps' time the ranks waited for batches."""
    shares = [(wait_share(spent), one) for one in facts["ranks"] if (spent := one["heartbeat"].get("spent"))]
    if not shares:
        return
    share, most = max(shares, key=lambda pair: pair[0])
    figure = f"{name_ranks([most])} waited longest for data: {share:.0%} of its steps' time, the ranks' median "
    figure += f"{statistics.median(pair[0] for pair in shares):.0%}"
    yield warning_if("data", share > DATA_WAIT_SHARE, figure, "set data.workers higher, or data.root to a faster disk")


def judge_memory(facts: Facts) -> Iterator[Finding]:
    """Whether memory grew."""
    peaks = [line["peak_memory_bytes"] for line in facts["metrics"] if line.get("peak_memory_bytes")]
    if len(peaks) < 8:
        return
    early, late = peaks[len(peaks) // 4], peaks[-1]
    figure = f"peak of the fullest rank {mebibytes(early, 0)} MiB early, {mebibytes(late, 0)} in the end"
    graphs = facts["result"].get("graphs_kept")
    remedy = "keep loss.item(), not loss: a graph outlives its step" if graphs else "python -m recipes.doctor memory"
    yield warning_if("memory", bool(graphs) or late > GROWN * early, figure, remedy)


def judge_loss(facts: Facts) -> Iterator[Finding]:
    """Whether the loss stayed finite."""
    found = [(line["step"], line["loss"]) for line in facts["metrics"] if "loss" in line and "step" in line]
    if not found:
        return
    wrong = [step for step, loss in found if not math.isfinite(loss)]
    if wrong:
        remedy = "lower optim.lr, or set gradients.clip_norm; gradients.stop_on_nan=true names the layer"
        yield Finding("loss", "fails", f"not finite from step {wrong[0]} on", remedy)
    else:
        (first, begun), (last, ended) = found[0], found[-1]
        yield Finding("loss", "ok", f"{begun:.4g} in step {first}, {ended:.4g} in step {last}")


def judge_checkpoints(facts: Facts) -> Finding:
    """What a resume can start from."""
    there = facts["checkpoints"]
    wrong = "; ".join(f"{name}: {why}" for name, why in there["wrong"].items())
    left = f"; {count(len(there['unfinished']), 'save')} was under way" if there["unfinished"] else ""
    intact = there["intact"]
    if failed := facts["result"].get("checkpoints_failed"):
        left += f"; {count(failed, 'save')} failed"
    if intact is None and not wrong:
        if failed:
            return Finding("checkpoints", "warning", f"none{left}", "look for `not saved` in ranks/0.log")
        done = facts["result"].get("status") == "finished" or facts["running"] or facts["report"]
        return warning_if("checkpoints", not done, f"none{left}", "set checkpoint.every, or checkpoint.minutes")
    if intact is None:
        return Finding("checkpoints", "fails", f"none is intact: {wrong}", "check the disk")
    logged = [line["step"] for line in facts["metrics"] if isinstance(line.get("step"), int)]
    lost = max(logged, default=intact["step"]) - intact["step"]
    figure = f"{intact['name']} is intact, {format_time(intact['saved'])}{left}"
    figure += f"; {count(lost, 'step')} will be repeated" if lost > 0 and not facts["running"] else ""
    figure += f"; skipped: {wrong}" if wrong else ""
    return warning_if("checkpoints", bool(wrong or failed), figure, "check the disk")


def next_command(facts: Facts, command: str) -> str:
    """What to type."""
    if facts["running"]:
        return "nothing to do: it is running"
    if facts["report"]:
        return f"nothing to do; {facts['report']} has what it found"
    if facts["result"].get("status") == "finished":
        return "nothing to do; raise max_steps, or epochs in a new run, to train on"
    intact = facts["checkpoints"]["intact"]
    where = f"resumes at step {intact['step']}" if intact else "starts again at step 0"
    return f"{command}    {where}"


def format_time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
