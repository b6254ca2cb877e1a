"""Tables of docs/plan.md, from what was measured: nothing in them is written by hand.

    python -m recipes.plan check=true nproc=2 task=language task.size=tiny global_batch_size=24 threads=1 out=outputs/check
    python -m benchmarks.plan_tables check outputs/check                               a table of that run, or of several
    python -m benchmarks.published --json published.json
    python -m benchmarks.plan_tables published published.json                          a table of published trainings

Each replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in docs/plan.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT
from lockstep.plan.report import gigabytes
from lockstep.utils.text import count

PAGE = ROOT / "docs" / "plan.md"
WITHIN = {"memory_error": 0.05, "time_error": 0.15, "work_error": 0.15}  # what a plan is to be held to


def check_lines(rows: list[dict[str, Any]], about: str) -> list[str]:
    """A run of check=true as Markdown, and in how many cells the plan is as near as it should be."""
    lines = [
        f"{about}:",
        "",
        "| strategy | bytes | peak, measured | plan | step, measured | plan | CPU, measured | plan |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            row["label"],
            "equal" if row["bytes_predicted"] == row["bytes_measured"] else "differ",
            gigabytes(row["peak_measured"]),
            error(row["memory_error"], 1),
            f"{1e3 * row['seconds_measured']:,.1f} ms",
            error(row["time_error"], 0),
            f"{1e3 * row['work_measured']:,.1f} ms" if row["work_measured"] else "",
            error(row["work_error"], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", verdict(rows)]


def verdict(rows: list[dict[str, Any]], of: str = "Of") -> str:
    """In how many cells the plan is as near as it should be."""
    within = {
        name: sum(row[name] is not None and abs(row[name]) <= most for row in rows) for name, most in WITHIN.items()
    }
    equal = sum(row["bytes_predicted"] == row["bytes_measured"] for row in rows)
    return (
        f"{of} {len(rows)} cells, bytes are equal in {equal}. The peak is planned within 5 % in {within['memory_error']}, the "
        f"step by the clock within 15 % in {within['time_error']}, and the processor's time in it in {within['work_error']}."
    )


def about_run(folder: Path) -> str:
    """What was trained, and where."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    machine = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    day = datetime.date.fromtimestamp((folder / "check.json").stat().st_mtime)
    task = config["task"]
    trained = f"task={task['name']}" + (f" task.size={task['size']}" if "size" in task else "")
    return (
        f"`{trained} global_batch_size={config['global_batch_size']}`, {count(len(machine['hosts']), 'rank')} on "
        f"{machine['cores']} cores of {machine['cpu']}, torch {machine['versions']['torch']}, {day}"
    )


def published_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Published trainings as Markdown: those with tokens, and those with images."""
    lines = []
    for unit in dict.fromkeys(row["unit"] for row in rows):
        some = [row for row in rows if row["unit"] == unit]
        memory = any(row["published_memory"] for row in some)
        lines += [
            "",
            f"| model | GPUs | published, {unit}/s/GPU | plan | error |" + " memory published | plan |" * memory,
            "|---|---:|---:|---:|---:|" + "---:|---:|" * memory,
        ]
        for row in some:
            published, predicted = row["published_tokens"], row["predicted_tokens"]
            cells = [row["model"], str(row["gpus"]), f"{published:,.0f}", f"{predicted:,.0f}"]
            cells.append(error(predicted / published - 1, 0))
            if memory:
                held = row["published_memory"]
                cells += [gigabytes(held), error(row["predicted_memory"] / held - 1, 0)] if held else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]


def error(share: float | None, digits: int) -> str:
    """`+12 %`, `−0.3 %`."""
    return "" if share is None else f"{100 * share:+.{digits}f} %".replace("-", "−")


def put(page: str, name: str, lines: list[str]) -> str:
    """The page with other lines between the marks of this name."""
    marks = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
    assert len(re.findall(marks, page, re.DOTALL)) == 1, f"{PAGE.name} has no place for {name}"
    return re.sub(marks, lambda found: f"{found[1]}\n" + "\n".join(lines) + f"\n{found[2]}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("name", choices=("check", "published"))
    parser.add_argument("source", type=Path, nargs="+", help="check: folders of runs; published: the JSON file")
    arguments = parser.parse_args()
    if arguments.name == "check":
        runs = {each: json.loads((each / "check.json").read_text(encoding="utf-8")) for each in arguments.source}
        lines = [line for folder, rows in runs.items() for line in [*check_lines(rows, about_run(folder)), ""]][:-1]
        if len(runs) > 1:
            lines += ["", verdict([row for rows in runs.values() for row in rows], "Of all")]
    else:
        lines = published_lines(json.loads(arguments.source[0].read_text(encoding="utf-8")))
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), arguments.name, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
