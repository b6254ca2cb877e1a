"""The runs of a comparison: each is a command of its own, which is not run again once it has ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from lockstep.compare.cases import Case, common_words
from lockstep.compare.config import CompareConfig
from lockstep.compare.figures import Result
from lockstep.config import run_directory
from lockstep.config.keys import typed
from lockstep.distributed.signals import Preempted
from lockstep.launch import recipe_process
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe
from lockstep.run import Run
from lockstep.utils.files import read_json, write_json
from lockstep.utils.system import OtherWork

VERIFY_KEYS = {
    "task",
    "model",
    "data",
    "precision",
    "seed",
    "device",
    "backend",
    "start",
}  # what recipes.verify is told, too


def run_to_end(run: Run[CompareConfig], target: str, words: list[str], out: Path) -> tuple[float, float]:
    """Run a command in a session of its own, where this very one has not ended before.

    Returns:
        its seconds, and how many cores other work of the machine had meanwhile.

    Raises:
        recipe_process.RecipeFailed: it has failed.
        Preempted: this process is to leave.
    """
    note, asked = out.with_name(f"{out.name}.json"), {"command": target, "words": words}
    if note.is_file() and (noted := json.loads(note.read_text(encoding="utf-8"))) == noted | asked:
        return float(noted["seconds"]), float(noted.get("others", 0.0))
    if out.exists():  # of a start that was cut off, whose run may be saving still; half a run measures nothing
        run_directory.lock(out, recipe_process.SAVING_SECONDS).close()
        shutil.rmtree(out)
    began, other_work = time.perf_counter(), OtherWork()
    process = recipe_process.RecipeProcess(target, words, out, os.getcwd(), {})
    while not process.ended(0.5):
        if run.listener and run.listener.received:
            run.listener.announce(run.listener.received)
            process.stop()
            raise Preempted(signal.Signals(run.listener.received).name)
    seconds, others = time.perf_counter() - began, other_work.cores()
    write_json(note, asked | {"seconds": seconds, "others": others})
    return seconds, others


def measure_case(run: Run[CompareConfig], case: Case, number: int, out: Path) -> Result:
    """The result.json of a case's run in round `number`, and its way to step 1 and how busy others kept the machine."""
    profiled = case.profile and (number > 1 or run.config.rounds == 1)
    words = [*case.words, *([f"profile={case.profile}"] if profiled else [])]
    seconds, others = run_to_end(run, case.target, words, out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    start = seconds - result["wall_seconds"] + result["setup_seconds"]
    return dict(result, start_seconds=start, cores_of_others=others)


def measure_all(run: Run[CompareConfig], cases: list[Case]) -> tuple[dict[Case, list[Result]], dict[Case, str]]:
    """The results of each case by round, and of those that failed their last words. Cases take turns in each round."""
    results: dict[Case, list[Result]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    for number in range(1, run.config.rounds + 1):
        for case in cases:
            if case in failed:
                continue
            run.world.heartbeat.move()
            run.report.line(f"round {number} of {run.config.rounds}: {case.label}")
            out = run.out / "runs" / f"{case.name}-{number}"
            try:
                results[case].append(measure_case(run, case, number, out) | {"folder": str(out.relative_to(run.out))})
            except recipe_process.RecipeFailed as error:
                failed[case] = f"{case.label}: {error}"
                run.report.line(f"failed: {failed[case]}")
    return results, failed


def run_verify(
    run: Run[CompareConfig], tool: Recipe, proven: list[str], ranks: int
) -> tuple[list[dict[str, Any]], str]:
    """recipes.verify's rows of these recipes; and what it says is wrong.

    Args:
        tool: recipes.compare itself, whose config is handed on.
        proven: those of the recipes that declare a proof.
    """
    if not proven:
        return [], "none of the recipes declares what recipes.verify could hold it to"
    run.report.line(f"recipes.verify: {', '.join(proven)}")
    words = common_words(run.asked, tool, get_recipe("verify"))
    words = [word for word in words if word.partition("=")[0].partition(".")[0] in VERIFY_KEYS]
    words += [typed("recipes", proven), f"nproc={ranks}"]
    out, problem = run.out / "runs" / "verify", ""
    try:
        run_to_end(run, "lockstep.recipes.verify", words, out)
    except recipe_process.RecipeFailed as error:
        problem = f"recipes.verify: {error}"
    return read_json(out / "verify.json").get("rows", []), problem
