"""What a run has left behind, and what it says of how the run ended.

    config.yaml               which recipe, when it was last started, and with what
    .lock                     held by rank 0 while it lives
    result.json               how it ended, where a rank or the launcher could still say so
    metrics.jsonl             what rank 0 logged: losses, speed, memory
    ranks/<rank>.log          each rank's words, its traceback among them; a rank that was killed has no last ones
    ranks/<rank>.heartbeat    where each rank was, how it ended, and what it spent its time on (lockstep.pulse)
    ranks/<rank>.stack        where it crashed, or was when another rank waited for it
    checkpoints/              what can be gone on from
    slurm/<n>/*_log.out       what a job's first process saw

Nothing but the first has to be there, or whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lockstep import checkpoint, findings
from lockstep.errors import UserError
from lockstep.files import write_json
from lockstep.findings import Finding
from lockstep.inquest import lost_a_peer
from lockstep.pulse import FINISHED, HUNGRY, left_behind, wait_share
from lockstep.rundir import CHECKPOINTS, read_result
from lockstep.schema import Config, from_yaml
from lockstep.words import count, mebibytes, short

Facts = dict[str, Any]
FILE = "postmortem.json"
SLOWER = 0.7  # of its earlier speed, from which a run is said to have slowed down
UNEVEN = 2.0  # times the median that the slowest twentieth of the steps may take
FEW_STEPS = 5  # below which a rank's step times say nothing
STRAGGLES = 1.2  # times the median that the slowest rank may compute
GROWN = 1.3  # times its earlier peak, from which memory is said to grow
REPORTS = {  # what a tool ends with, instead of a result.json
    "verify": ["verify.json"],
    "compare": ["compare.json"],
    "doctor": ["preflight.json", "memory.json"],
}
BEGUN = re.compile(r"^\d\d:\d\d:\d\d \S+: [\d,]+ ranks? on [\d,]+ host")  # Report.start's first line
REMEDIES = {  # what an error's words call for
    r"out of memory|bad_alloc|can't allocate memory": "see where memory goes: python -m recipes.doctor memory; or "
    "batch_size=auto, accumulate=2, precision=bf16, recipes.fsdp",
    r"No space left|Disk quota": "make room there, or name another out; what was saved before is intact",
    r"not finite|\bnan\b": "lower optim.lr, or set gradients.clip_norm; gradients.stop_on_nan=true names the layer",
    r"did not join|could not reach": "look at the host that is named; python -m recipes.doctor, started the same way",
    r"[Tt]imed out|time-?out": "a rank was missing: compare the ranks' steps; python -m recipes.doctor tries the links",
    r"in use|EADDRINUSE": "set another MASTER_PORT",
    r"DataLoader worker": "a worker was killed, most often for want of memory: set data.workers lower",
    r"CUDA error|NCCL error|ECC": "leave that host out; python -m recipes.doctor, started the same way, tries the rest",
}


def tell(out: Path, again: Callable[[str, Config, Path], str]) -> None:
    """Print what became of the run in a folder, and write it down there where that can be.

    Args:
        again: called with the recipe's name, its config and the folder: the command that would go on.

    Raises:
        UserError: it is no run's folder.
    """
    facts = collect(out)
    found = judge(facts)
    command = again(facts["recipe"], facts["config"], out) if facts["config"] else "the command that started it"
    step = what_next(facts, command)
    with contextlib.suppress(OSError):
        plain = {name: value for name, value in facts.items() if name not in ("config", "metrics")}
        write_json(out / FILE, {"findings": [asdict(each) for each in found], "next": step, **plain})
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(findings.table(found, f"{short(out)}: a run of recipes.{facts['recipe']}"))
    console.print(f"next: {step}", soft_wrap=True, markup=False)  # in one piece, to be copied


# What is there ------------------------------------------------------------------------------------------------------


def collect(out: Path) -> Facts:
    """All that the folder tells, as plain values but `config`; nothing is changed.

    Raises:
        UserError: it is no run's folder.
    """
    try:
        text = (out / "config.yaml").read_text(errors="replace")
    except OSError:
        raise refused(out) from None
    named = re.match(r"# recipe: (\S+)\n", text)
    if named is None:
        raise UserError(f"run={out}: its config.yaml is not one that a run writes; name a run's folder")
    config: Config | None = None
    with contextlib.suppress(OmegaConfBaseException, ValueError):  # an older version's
        config = from_yaml(text)
    started = modified(out / "config.yaml")
    environment: Facts = {}
    with contextlib.suppress(OSError, ValueError):
        environment = dict(json.loads((out / "environment.json").read_text()))
    ran_out: Facts = {}
    with contextlib.suppress(OSError, ValueError):
        ran_out = dict(json.loads((out / "out_of_memory.json").read_text()))
    signs = [*out.glob("metrics.jsonl"), *out.glob("ranks/*"), *out.glob(f"{CHECKPOINTS}/*"), *out.glob("result.json")]
    return {
        "recipe": named[1],
        "config": config,
        "started": started,
        "last_sign": max(map(modified, signs), default=None),
        "running": is_locked(out / ".lock"),
        "result": read_result(out),
        "report": next((name for name in REPORTS.get(named[1], []) if modified(out / name) >= started), None),
        "environment": environment,
        "out_of_memory": ran_out,
        "metrics": list(objects(out / "metrics.jsonl")),
        "ranks": ranks(out / "ranks", environment.get("hosts", [])),
        "checkpoints": checkpoints(out / CHECKPOINTS),
        "job": job_log(out / "slurm"),
    }


def refused(out: Path) -> UserError:
    """Why a folder without a config.yaml is not read."""
    if not out.is_dir():
        return UserError(f"run={out}: no such folder; name a run's, such as outputs/ddp/2026-11-21_11-20-16")
    inside = sorted((short(path.parent) for path in out.glob("*/config.yaml")), reverse=True)
    hint = f"name one of those in it, such as {inside[0]}" if inside else "name one that holds a config.yaml"
    return UserError(f"run={out}: is not a run's folder; {hint}")


def modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def is_locked(path: Path) -> bool:
    """Whether a process is training there, here or on another host."""
    try:
        with path.open("r+") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def objects(path: Path) -> Iterator[Facts]:
    """The JSON objects of a file, a line each; a line that its writer died in is left out."""
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def ranks(folder: Path, hosts: list[str]) -> list[Facts]:
    """Of each rank that left something: its host, its last step, its error, and its heartbeat."""
    numbers = {int(path.stem) for path in folder.glob("*.*") if path.stem.isdecimal()}
    found = []
    for rank in sorted(numbers):
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = (folder / f"{rank}.log").read_text(errors="replace").splitlines()
        starts = [number for number, line in enumerate(lines) if BEGUN.match(line)]
        lines = lines[starts[-1] :] if starts else lines  # of the last start
        steps = [int(step) for line in lines for step in re.findall(r"^\d\d:\d\d:\d\d .*?step ([\d]+)/\d", line)]
        heartbeat = next(objects(folder / f"{rank}.heartbeat"), {})
        error, place = error_in(lines)
        end = str(heartbeat.get("end", ""))
        error = error or (end if end != FINISHED else "")
        if not error and (crash := left_behind(folder, rank)):
            error = f"crashed at {crash}"
        found.append(
            {
                "rank": rank,
                "host": heartbeat.get("host") or (hosts[rank] if rank < len(hosts) else None),
                "logged_step": steps[-1] if steps else None,
                "error": error,
                "place": place,
                "secondary": bool(error) and lost_a_peer(RuntimeError(error)),
                "log_modified": modified(folder / f"{rank}.log"),
                "heartbeat": heartbeat,
            }
        )
    return found


def error_in(lines: list[str]) -> tuple[str, str]:
    """(the last error that a log holds, in a line; `file.py:12`, the innermost line outside of installed packages)."""
    begins = [number for number, line in enumerate(lines) if line.lstrip().startswith("Traceback (most recent call")]
    if not begins:
        said = [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "Fatal Python error: "))]
        return (said[-1] if said else ""), ""
    place = error = ""
    for line in lines[begins[-1] + 1 :]:
        frame = re.match(r'\s+File "(.+)", line (\d+)', line)
        if frame and "site-packages" not in frame[1] and "/lib/python" not in frame[1]:
            place = f"{Path(frame[1]).name}:{frame[2]}"
        if line and not line[0].isspace():
            error = line
            break
    return error, place


def checkpoints(folder: Path) -> Facts:
    """The newest checkpoint that is intact, what is wrong with the newer ones, and what a killed save has left."""
    found: Facts = {"names": [path.name for path in checkpoint.names(folder)], "wrong": {}, "intact": None}
    found["unfinished"] = [path.name for path in folder.glob(f"{checkpoint.UNFINISHED}*")]
    for path in checkpoint.names(folder):
        wrong = checkpoint.whats_wrong(path)
        if not wrong:
            manifest = json.loads((path / "manifest.json").read_text())
            found["intact"] = {"name": path.name, "step": manifest["step"], "saved": modified(path / "manifest.json")}
            break
        found["wrong"][path.name] = wrong
    return found


def job_log(folder: Path) -> Facts:
    """The end of the newest log of a Slurm job's first process, and what in it tells of the end."""
    logs = sorted(folder.glob("*/*_log.out"), key=modified)
    if not logs:
        return {}
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = logs[-1].read_text(errors="replace").splitlines()
    telling = re.compile(r"oom|DUE TO|CANCELLED|Killed|requeue|does not answer|NODE_FAIL|Exited with|^error: ", re.I)
    return {"log": short(logs[-1]), "said": [line for line in lines if telling.search(line)][-3:]}


# What it means -------------------------------------------------------------------------------------------------------


def judge(facts: Facts) -> list[Finding]:
    """How it ended and why, how far it came, how well it went, and what is safe."""
    found = [ending(facts), *causes(facts), *steps(facts), *speed(facts), *slowest(facts), *data_wait(facts)]
    return [*found, *memory(facts), *losses(facts), kept(facts)]


def ending(facts: Facts) -> Finding:
    """How it ended."""
    result, status = facts["result"], facts["result"].get("status")
    begun = when(facts["started"])
    last = when(facts["last_sign"]) if facts["last_sign"] else "never"
    if facts["running"]:
        return Finding("end", "ok", f"it is running: started {begun}, last sign of life {last}")
    if facts["report"]:
        verdict: findings.Verdict = "warning" if status == "failed" else "ok"
        return Finding("end", verdict, f"came to its end, {last}", f"read {facts['report']}" if status else "")
    if status == "finished":
        accuracy = result.get("eval_accuracy")
        score = f", accuracy {accuracy:.2%}" if accuracy is not None else ""
        return Finding("end", "ok", f"finished at step {result.get('steps')}{score}, {last}")
    if status == "preempted":
        return Finding("end", "warning", f"asked to leave, and left after step {result.get('steps')}, {last}")
    if status == "failed":
        return Finding("end", "fails", f"failed: started {begun}, last sign of life {last}")
    if not facts["ranks"] or facts["last_sign"] is None:
        return Finding("end", "fails", f"no rank left a word: started {begun}", "look at what the launcher said")
    figure = f"ended without a word: started {begun}, last sign of life {last}"
    remedy = "killed from outside, or its host was lost: look there with dmesg, uptime, or Slurm's sacct"
    return Finding("end", "fails", figure, remedy)


def causes(facts: Facts) -> Iterator[Finding]:
    """The first error: not one that only says that another rank has gone."""
    if facts["running"] or facts["report"] or facts["result"].get("status") in ("finished", "preempted"):
        return
    lacking = facts["out_of_memory"]
    own = sorted((one for one in facts["ranks"] if one["error"] and not one["secondary"]), key=_first)
    lost = [one for one in facts["ranks"] if one["secondary"] or (not one["error"] and one["heartbeat"].get("asked"))]
    silent = [one for one in facts["ranks"] if not one["error"] and one not in lost]
    if own:
        one, at = own[0], f" at {own[0]['place']}" if own[0]["place"] else ""
        more = f"; {count(len(own) - 1, 'other rank')} failed too" if len(own) > 1 else ""
        words = shortened(one["error"])
        yield Finding("error", "fails", f"{who([one])}: {words}{at}{more}", remedy_for(one["error"]))
    elif lost and silent:
        beat, them = silent[0]["heartbeat"], "it" if len(silent) == 1 else "them"
        where = f" in step {beat['step']} ({beat.get('phase', 'unknown')})" if "step" in beat else ""
        figure = f"{who(silent)} left no word{where}, and {who(lost)} waited in vain for {them}"
        remedy = "it was killed: most often by the kernel, out of memory (dmesg | grep -i oom); then batch_size=auto"
        yield Finding("error", "fails", figure, remedy)
    elif lost:
        words = shortened(lost[0]["error"]) or "waited in vain for the others"
        yield Finding("error", "fails", f"{who(lost)}: {words}", "look at the network")
    if lacking:
        figure = f"out of memory on rank {lacking.get('rank')} in step {lacking.get('step')}"
        yield Finding("memory", "fails", figure, "out_of_memory.json says what was held, and what would help most")
    if facts["job"].get("said"):
        yield Finding("job", "warning", f"{facts['job']['log']}: {' / '.join(facts['job']['said'])}")


def _first(one: Facts) -> tuple[float, int]:
    """Whose error came first: who had it wrote no more into its log."""
    return one["log_modified"], one["rank"]


def who(some: list[Facts]) -> str:
    words = [f"{one['rank']} ({one['host']})" if one["host"] else str(one["rank"]) for one in some]
    return f"rank{'s' if len(some) > 1 else ''} {', '.join(words[:4])}{' …' if len(words) > 4 else ''}"


def shortened(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + " …"


def remedy_for(error: str) -> str:
    for sign, remedy in REMEDIES.items():
        if re.search(sign, error):
            return remedy
    return "the whole traceback is in that rank's log in ranks/"


def steps(facts: Facts) -> Iterator[Finding]:
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
        figure = "; ".join(f"{who(some)} in {where}" for where, some in places.items())
        done = facts["result"].get("status") == "finished"
        if behind and not done:
            yield Finding("steps", "warning", figure, f"the others waited for {who(behind)}: look at its log and host")
        else:
            yield Finding("steps", "ok", figure)
        return
    by_log = {one["rank"]: one["logged_step"] for one in facts["ranks"] if one["logged_step"] is not None}
    figure = f"rank 0 logged step {max(logged)} last" if logged else "no step was logged"
    others = [f"rank {rank} {step}" for rank, step in by_log.items() if rank]
    if others:
        figure += f"; in their logs {', '.join(others[:6])}"
    yield Finding("steps", "ok" if logged else "warning", figure)


def speed(facts: Facts) -> Iterator[Finding]:
    """Whether it slowed down, and whether its steps were even."""
    rates = [line["images_per_second"] for line in facts["metrics"] if line.get("images_per_second")]
    if not rates:
        return
    median = statistics.median(rates)
    figure = f"{median:,.0f} images/s (median of {count(len(rates), 'logged line')})"
    quarter = max(1, len(rates) // 4)
    if len(rates) >= 8:
        before, after = statistics.median(rates[quarter:-quarter]), statistics.median(rates[-quarter:])
        if after < SLOWER * before:
            figure += f"; {after:,.0f} in the last quarter, {before:,.0f} before"
            remedy = "another process on a host, a throttled device, or slower data: python -m recipes.doctor there"
            yield Finding("speed", "warning", figure, remedy)
            return
    middle, late = facts["result"].get("step_seconds_p50"), facts["result"].get("step_seconds_p95")
    if middle and late and late > UNEVEN * middle:
        figure += f"; a step takes {1e3 * middle:.0f} ms, one in twenty more than {1e3 * late:.0f}"
        yield Finding("speed", "warning", figure, "data.workers higher, or other work on these hosts")
        return
    yield Finding("speed", "ok", figure)


def slowest(facts: Facts) -> Iterator[Finding]:
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
    figure = (
        f"{who([late])} computed for {1e3 * most:.3g} ms a step, {most / median - 1:.0%} more than the ranks' median"
    )
    if most > STRAGGLES * median:
        remedy = "look at its host: other work, a throttled or another device; python -m recipes.doctor tries them all"
        yield Finding("slowest", "warning", figure, remedy)
    else:
        yield Finding("slowest", "ok", figure)


def data_wait(facts: Facts) -> Iterator[Finding]:
    """How much of their steps' time the ranks waited for batches."""
    shares = []
    for one in facts["ranks"]:
        if spent := one["heartbeat"].get("spent"):
            shares.append((wait_share(spent), one))
    if not shares:
        return
    share, most = max(shares, key=lambda pair: pair[0])
    figure = f"{who([most])} waited longest for data: {share:.0%} of its steps' time, the ranks' median "
    figure += f"{statistics.median(pair[0] for pair in shares):.0%}"
    if share > HUNGRY:
        yield Finding("data", "warning", figure, "set data.workers higher, or data.root to a faster disk")
    else:
        yield Finding("data", "ok", figure)


def memory(facts: Facts) -> Iterator[Finding]:
    """Whether memory grew."""
    peaks = [line["peak_memory_bytes"] for line in facts["metrics"] if line.get("peak_memory_bytes")]
    if len(peaks) < 8:
        return
    early, late = peaks[len(peaks) // 4], peaks[-1]
    figure = f"peak of the fullest rank {mebibytes(early, 0)} MiB early, {mebibytes(late, 0)} in the end"
    kept_graphs = facts["result"].get("graphs_kept")
    if kept_graphs or late > GROWN * early:
        remedy = (
            "keep loss.item(), not loss: a graph outlives its step"
            if kept_graphs
            else "python -m recipes.doctor memory"
        )
        yield Finding("memory", "warning", figure, remedy)
    else:
        yield Finding("memory", "ok", figure)


def losses(facts: Facts) -> Iterator[Finding]:
    """Whether the loss stayed finite."""
    found = [(line["step"], line["loss"]) for line in facts["metrics"] if "loss" in line and "step" in line]
    if not found:
        return
    wrong = [step for step, loss in found if not math.isfinite(loss)]
    if wrong:
        remedy = "lower optim.lr, or set gradients.clip_norm; gradients.stop_on_nan=true names the layer"
        yield Finding("loss", "fails", f"not finite from step {wrong[0]} on", remedy)
    else:
        yield Finding(
            "loss", "ok", f"{found[0][1]:.4g} in step {found[0][0]}, {found[-1][1]:.4g} in step {found[-1][0]}"
        )


def kept(facts: Facts) -> Finding:
    """What can be gone on from."""
    there = facts["checkpoints"]
    wrong = "; ".join(f"{name}: {why}" for name, why in there["wrong"].items())
    left = f"; {count(len(there['unfinished']), 'save')} was under way" if there["unfinished"] else ""
    intact = there["intact"]
    if intact is None and not wrong:
        done = facts["result"].get("status") == "finished" or facts["running"] or facts["report"]
        verdict: findings.Verdict = "ok" if done else "warning"
        return Finding(
            "checkpoints", verdict, f"none{left}", "" if done else "set checkpoint.every, or checkpoint.minutes"
        )
    if intact is None:
        return Finding("checkpoints", "fails", f"none is intact: {wrong}", "look after the disk")
    logged = [line["step"] for line in facts["metrics"] if isinstance(line.get("step"), int)]
    lost = max(logged, default=intact["step"]) - intact["step"]
    figure = f"{intact['name']} is intact, {when(intact['saved'])}{left}"
    figure += f"; {count(lost, 'step')} are to be taken again" if lost > 0 and not facts["running"] else ""
    if wrong:
        return Finding("checkpoints", "warning", f"{figure}; passed over: {wrong}", "look after the disk")
    return Finding("checkpoints", "ok", figure)


def what_next(facts: Facts, command: str) -> str:
    """What to type."""
    if facts["running"]:
        return "nothing to do: it is under way"
    if facts["report"]:
        return f"nothing to do; {facts['report']} has what it found"
    if facts["result"].get("status") == "finished":
        return "nothing to do; raise max_steps, or epochs in a new run, to train on"
    intact = facts["checkpoints"]["intact"]
    where = f"goes on from step {intact['step']}" if intact else "begins again at step 0"
    return f"{command}    {where}"


def when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
