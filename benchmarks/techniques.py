"""What each technique costs on this machine, for its page: recipes.compare on two ranks, into docs/measured.json.

    python -m benchmarks.techniques [--rounds N] [--steps N]

Each technique is compared on a task that it can do: a GPT of 200,000 weights on the digits, one with experts, and a ResNet
for BatchNorm. Ratios are taken within a round. The machine should have nothing else to do: the file says whether it had.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

FILE = ROOT / "docs" / "measured.json"
WORDS = ("nproc=2", "eval_every=0", "threads=1")
TASKS = {  # what they are compared on: (the recipes, null for all that can; further words)
    "language": ("null", ["task=language"]),
    "experts": ("[single,ddp,expert_parallel]", ["task=language", "task.experts=8"]),
    "images": ("[single,ddp,sync_batchnorm]", []),
}
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
    FILE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(f"written: {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
