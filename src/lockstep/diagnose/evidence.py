"""What a run has left behind, read without changing anything; lockstep.diagnose.postmortem judges it.

    config.yaml               which recipe, when it was last started, and with what
    .lock                     held by rank 0 while it lives
    result.json               how it ended, where a rank or the launcher could still say so
    metrics.jsonl             what rank 0 logged: losses, speed, memory
    ranks/<rank>.log          each rank's output, its traceback included; a rank that was killed leaves none (with many
                              ranks, those of healthy ones stay on their hosts)
    ranks/<rank>.heartbeats   where each rank of a host was, how it ended, and what it spent its time on; newer ones may
                              be in this host's memory (lockstep.distributed.host_memory)
    ranks/<rank>.stack        where it crashed, or was when another rank waited for it; .1, .2, … of earlier attempts
    checkpoints/              what a resume can start from
    slurm/<n>/*_log.out       the output of a job's first process

Nothing but the first has to be there, or whole.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lockstep.checkpoint import directory
from lockstep.config.run_directory import CHECKPOINTS, frozen_recipe, read_result
from lockstep.diagnose.findings import Facts
from lockstep.diagnose.stacks import VERDICT_MARK, crash_place
from lockstep.distributed.collective_errors import lost_a_peer
from lockstep.distributed.host_logs import find_log
from lockstep.distributed.host_memory import FINISHED, read_heartbeats
from lockstep.errors import UserError
from lockstep.utils.files import is_locked, modified_at, read_json
from lockstep.utils.text import short

REPORTS = {  # what a tool ends with, instead of a result.json
    "verify": ["verify.json"],
    "compare": ["compare.json"],
    "doctor": ["preflight.json", "memory.json"],
}
BEGUN = re.compile(r"^\d\d:\d\d:\d\d \S+: [\d,]+ ranks? on [\d,]+ host")  # Report.start's first line


def collect_evidence(out: Path) -> Facts:
    """All that the folder tells, as plain values; nothing is changed.

    Raises:
        UserError: it is no run's folder.
    """
    try:
        text = (out / "config.yaml").read_text(errors="replace", encoding="utf-8")
    except OSError:
        raise refuse_folder(out) from None
    recipe = frozen_recipe(text)
    if recipe is None:
        raise UserError(f"run={out}: its config.yaml is not one that a run writes; name a run's folder")
    started = modified_at(out / "config.yaml")
    environment = read_json(out / "environment.json")
    ranks = rank_records(out / "ranks", environment.get("hosts", []))
    signs = [*out.glob("metrics.jsonl"), *out.glob("ranks/*"), *out.glob(f"{CHECKPOINTS}/*"), *out.glob("result.json")]
    signs_at = [*map(modified_at, signs), *(one["heartbeat"].get("at", 0.0) for one in ranks)]
    return {
        "recipe": recipe,
        "config": text,
        "started": started,
        "last_sign": max(signs_at, default=None),
        "running": is_locked(out / ".lock"),
        "result": read_result(out),
        "report": next((name for name in REPORTS.get(recipe, []) if modified_at(out / name) >= started), None),
        "environment": environment,
        "out_of_memory": read_json(out / "out_of_memory.json"),
        "metrics": list(json_lines(out / "metrics.jsonl")),
        "ranks": ranks,
        "earlier": earlier_attempts(out / "ranks"),
        "checkpoints": checkpoint_record(out / CHECKPOINTS),
        "job": job_log(out / "slurm"),
    }


def refuse_folder(out: Path) -> UserError:
    """Why a folder without a config.yaml is not read."""
    if not out.is_dir():
        return UserError(f"run={out}: no such folder; name a run's, such as outputs/ddp/2026-11-21_11-20-16")
    inside = sorted((short(path.parent) for path in out.glob("*/config.yaml")), reverse=True)
    hint = f"name one of those in it, such as {inside[0]}" if inside else "name one that holds a config.yaml"
    return UserError(f"run={out}: is not a run's folder; {hint}")


def json_lines(path: Path) -> Iterator[Facts]:
    """The JSON objects of a file, a line each; a line that its writer died in is left out."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def rank_records(folder: Path, hosts: list[str]) -> list[Facts]:
    """Of each rank that left something: its host, its last step, its error, and its heartbeat."""
    beats = read_heartbeats(folder)
    found = []
    for rank in sorted(beats.keys() | {int(path.stem) for path in folder.glob("*.*") if path.stem.isdecimal()}):
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = find_log(folder, rank).read_text(errors="replace", encoding="utf-8").splitlines()
        starts = [number for number, line in enumerate(lines) if BEGUN.match(line)]
        lines = lines[starts[-1] :] if starts else lines  # of the last start
        steps = [int(step) for line in lines for step in re.findall(r"^\d\d:\d\d:\d\d .*?step ([\d]+)/\d", line)]
        heartbeat = beats.get(rank, {})
        error, place = error_in(lines)
        end = str(heartbeat.get("end", ""))
        error = error or (end if end != FINISHED else "")
        if not error and (crash := crash_place(folder / f"{rank}.stack")):
            error = f"crashed at {crash}"
        found.append(
            {
                "rank": rank,
                "host": heartbeat.get("host") or (hosts[rank] if rank < len(hosts) else None),
                "logged_step": steps[-1] if steps else None,
                "error": error,
                "place": place,
                "secondary": bool(error) and lost_a_peer(RuntimeError(error)),
                "log_modified": modified_at(find_log(folder, rank)),
                "heartbeat": heartbeat,
            }
        )
    return found


def earlier_attempts(folder: Path) -> list[Facts]:
    """What the stack files of earlier attempts tell, oldest first: the verdict, else that rank's own crash or error."""
    found = []
    for path in sorted(folder.glob("*.stack.*"), key=modified_at):
        text = ""
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace", encoding="utf-8")
        verdict = text.rpartition(VERDICT_MARK)[2].partition("\n")[0] if VERDICT_MARK in text else ""
        crash = crash_place(path)
        words = f"crashed at {crash}" if crash else error_in(text.splitlines())[0] or "only its stacks are left"
        rank = int(path.name.partition(".")[0])
        found.append({"rank": rank, "file": path.name, "at": modified_at(path), "verdict": verdict, "words": words})
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


def checkpoint_record(folder: Path) -> Facts:
    """The newest checkpoint that is intact, what is wrong with the newer ones, and what a killed save has left."""
    found: Facts = {"names": [path.name for path in directory.list_checkpoints(folder)], "wrong": {}, "intact": None}
    found["unfinished"] = [path.name for path in folder.glob(f"{directory.UNFINISHED}*")]
    for path in directory.list_checkpoints(folder):
        wrong = directory.find_damage(path)
        if not wrong:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            found["intact"] = {
                "name": path.name,
                "step": manifest["step"],
                "saved": modified_at(path / "manifest.json"),
            }
            break
        found["wrong"][path.name] = wrong
    return found


def job_log(folder: Path) -> Facts:
    """The end of the newest log of a Slurm job's first process, and what in it tells of the end."""
    logs = sorted(folder.glob("*/*_log.out"), key=modified_at)
    if not logs:
        return {}
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = logs[-1].read_text(errors="replace", encoding="utf-8").splitlines()
    telling = re.compile(r"oom|DUE TO|CANCELLED|Killed|requeue|does not answer|NODE_FAIL|Exited with|^error: ", re.I)
    return {"log": short(logs[-1]), "said": [line for line in lines if telling.search(line)][-3:]}
