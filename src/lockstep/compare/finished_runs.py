"""Finished runs side by side, from what they have left behind: nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lockstep.compare.config import CompareConfig
from lockstep.config.run_directory import frozen_recipe, read_result
from lockstep.errors import UserError
from lockstep.launch.run_records import apart, print_tables, score_columns
from lockstep.registry import list_recipes
from lockstep.utils.tables import folded_table, terminal_tables
from lockstep.utils.text import mebibytes, short

# Where a run lies, how it was started and what it keeps. What a technique alone has is not compared either, unless all runs have it.
NOT_COMPARED = ("out", "resume_prefix", "launcher", "start", "nproc", "device", "cluster", "checkpoint", "logger")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, its recipe, its settings by dotted key, and its result.json."""

    out: Path
    recipe: str
    settings: dict[str, Any]
    result: dict[str, Any]


def compare_runs(config: CompareConfig) -> int | None:
    """Print the tables of the runs that the command names, in this process; None where it names none.

    Raises:
        UserError: fewer than two, or one of them is no finished run.
    """
    if config.runs is None:
        return None
    if len(config.runs) < 2:
        raise UserError(f"runs=[{','.join(config.runs)}]: name two or more: python -m recipes.compare RUN_A RUN_B")
    found = [read_finished(name) for name in config.runs]
    shared = set.intersection(*(set(run.settings) for run in found))
    labels = apart([{name: value for name, value in run.settings.items() if name in shared} for run in found])
    for number, run in enumerate(found, 1):
        print(f"{number} = {short(run.out)}")  # in one piece, to be copied
    print()
    names = {"run": [str(number) for number in range(1, len(found) + 1)], "recipe": [run.recipe for run in found]}
    metric = next((f"eval_{name.removeprefix('eval_')}" for run in found if (name := run.settings.get("metric"))), "")
    results = [run.result for run in found]
    scores = score_columns(results, metric or "eval_accuracy")
    told = {"settings": labels} if any(labels) else {}
    print_tables(folded_table("result", {**names, **told, **scores}, text=("run", "recipe", "settings")))
    print_tables(*terminal_tables("cost", {"run": names["run"], **cost_columns(results)}, text=("run", "device")))
    if any(result.get("resumed_from") for result in results):
        print("+ it was resumed: the time of its last start alone")
    return 0


def read_finished(name: str) -> FinishedRun:
    """The run in a folder.

    Raises:
        UserError: it is none, or has not finished.
    """
    out = Path(name).expanduser()
    if not out.is_dir():
        more = f"; recipes are named as recipes=[{name},…]" if name in list_recipes() else ""
        raise UserError(f"runs: {name}: no such folder; name folders of finished runs{more}")
    try:
        text = (out / "config.yaml").read_text(encoding="utf-8")
        settings = dict(flat_settings(OmegaConf.to_container(OmegaConf.create(text))))
    except (OSError, ValueError, AttributeError, OmegaConfBaseException, YAMLError):
        raise UserError(f"runs: {name}: holds no run; name folders with config.yaml and result.json") from None
    recipe, result = frozen_recipe(text), read_result(out)
    status = result.get("status", "it left no result.json")
    if status != "finished":
        raise UserError(f"runs: {name}: has not finished ({status}); continue it with out={name}, or leave it out")
    if "train_loss" not in result:
        raise UserError(f"runs: {name}: is a tool's, which trains nothing; name folders of finished trainings")
    return FinishedRun(out, recipe or str(result.get("recipe")), settings, result)


def flat_settings(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of a frozen config but those that are not compared."""
    for name, value in content.items():
        if prefix or name not in NOT_COMPARED:
            if isinstance(value, Mapping) and value:
                yield from flat_settings(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value


def cost_columns(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Ranks, throughput and its ratio to the first run's, memory of the fullest rank, and time."""
    first = results[0].get("samples_per_second")

    def ratio(result: dict[str, Any]) -> str:
        speed = result.get("samples_per_second")
        return f"{speed / first:.2f}" if speed and first else ""

    def number(result: dict[str, Any], name: str, form: str, factor: float = 1) -> str:
        value = result.get(name)
        return "" if value is None else format(value * factor, form)

    return {
        "device": [f"{result.get('world_size')} × {result.get('device')}" for result in results],
        "samples/s": [number(result, "samples_per_second", ",.0f") for result in results],
        "ratio": [ratio(result) for result in results],
        "ms per step": [number(result, "step_seconds_p50", ",.1f", 1000) for result in results],
        "peak MiB": [mebibytes(result.get("peak_memory_bytes", 0), 0) for result in results],
        "steps": [number(result, "steps", ",") for result in results],
        "time s": [
            number(result, "wall_seconds", ",.1f") + "+" * bool(result.get("resumed_from")) for result in results
        ],
    }
