"""What each technique costs on this machine, for its page, on two ranks: into docs/measured.json.

    python -m benchmarks.techniques [--rounds N] [--steps N]

recipes.compare sets them beside one process on a task that each can do: a GPT of 200,000 weights on the digits, one with
experts, and a ResNet for BatchNorm. What trains a part of a trained model does other work, and is set beside recipes.ddp
on the same five digits. Ratios are taken within a round. The machine should have nothing else to do: the file says
whether it had.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT

FILE = ROOT / "docs" / "measured.json"
WORDS = ("nproc=2", "eval_every=0", "threads=1")
TASKS = {  # what they are compared on: (the recipes, null for all that can; further words)
    "language": ("null", ["task=language"]),
    "experts": ("[single,ddp,expert_parallel]", ["task=language", "task.experts=8"]),
    "images": ("[single,ddp,sync_batchnorm]", []),
}
PARTS = {"ddp": [], "transfer_learning": ["resume={base}"], "lora": ["resume={base}", "new_head=true"]}
OTHER_DIGITS = ["data.classes=[5,6,7,8,9]", "global_batch_size=96"]
KEPT = ("label", "ranks", "samples_per_second", "speedup", "speedup_from", "speedup_to", "against", "exposed_share")
KEPT += ("sent_bytes", "memory_bytes", "state_bytes", "cores_of_others")


def measure(recipes: str, words: list[str]) -> dict[str, Any]:
    """One comparison: the command, what was compared, and {recipe: figures}.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "recipes.compare", f"recipes={recipes}", *words]
        subprocess.run([sys.executable, *command, f"out={folder}/run"], cwd=ROOT, check=True)
        found = json.loads((Path(folder) / "run" / "compare.json").read_text(encoding="utf-8"))
    rows = {row["recipe"]: {name: row[name] for name in KEPT} for row in found["rows"]}
    return {"command": f"python {' '.join(command)}", "about": found["about"], "rows": rows, **found["environment"]}


def measure_parts(rounds: int, words: list[str]) -> dict[str, Any]:
    """The same of what trains a part of a model that has learnt five digits, on the other five."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, *more: str, out: str) -> dict[str, Any]:
            command = [sys.executable, "-m", f"recipes.{name}", *more, f"out={folder}/{out}"]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            return dict(json.loads(Path(folder, out, "result.json").read_text(encoding="utf-8")))

        run("ddp", "nproc=2", "data.classes=[0,1,2,3,4]", "max_steps=30", "eval_every=0", out="base")
        for number in range(rounds):
            for name, own in PARTS.items():
                told = [each.format(base=f"{folder}/base") for each in own]
                out = f"{name}-{number}"
                results[name].append(run(name, *told, *OTHER_DIGITS, *words, "profile=5", out=out))
    rows = {name: row_of(name, results) for name in PARTS}
    about = {"": "resnet18", "on": "five digits, after the other five"}
    command = f"python -m recipes.NAME {' '.join([*OTHER_DIGITS, *words])} profile=5"
    return {"command": command, "about": about, "rows": rows}


def row_of(name: str, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """As recipes.compare has it, set beside recipes.ddp."""
    mine, speeds = results[name], {each: [run["samples_per_second"] for run in runs] for each, runs in results.items()}
    ratios = [speed / base for speed, base in zip(speeds[name], speeds["ddp"], strict=True)]
    exposed = [max(run["exposed_communication_seconds_by_rank"]) / run["step_seconds_p50"] for run in mine]
    row: dict[str, Any] = {"label": f"{name} on 2 ranks", "ranks": 2, "samples_per_second": median(speeds[name])}
    if name != "ddp":
        row |= {"speedup": median(ratios), "speedup_from": min(ratios), "speedup_to": max(ratios), "against": "ddp"}
    row |= {"exposed_share": median(exposed), "sent_bytes": max(mine[-1]["sent_bytes_by_rank"])}
    row |= {"memory_bytes": mine[-1]["peak_memory_bytes_by_rank"], "state_bytes": mine[-1]["state_bytes_by_rank"]}
    return dict.fromkeys(KEPT) | row


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that each recipe is run, in turn")
    parser.add_argument("--steps", type=int, default=30, help="of each run, 5 of them warm-up and 5 profiled")
    arguments = parser.parse_args()
    length = [f"rounds={arguments.rounds}", f"max_steps={arguments.steps}"]
    measured: dict[str, Any] = {"date": str(datetime.date.today())}
    for name, (recipes, words) in TASKS.items():
        found = measure(recipes, [*words, *WORDS, *length])
        measured |= {each: found[each] for each in ("cpu", "cores", "versions")}
        measured[name] = {each: found[each] for each in ("command", "about", "rows")}
    measured["parts"] = measure_parts(arguments.rounds, [*WORDS, f"max_steps={arguments.steps}"])
    FILE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(f"written: {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
