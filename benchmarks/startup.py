"""How long a run takes that does almost nothing: ours against a hand-written torchrun script, in turn, as a ratio.

    python -m benchmarks.startup [PAIRS]

Both start two ranks, load the digits, take one step of ResNet-18, evaluate and save the weights. Ours composes and
checks a config, writes a run directory and prints its summaries as well. Wall time of the whole command, start to exit.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = ["-m", "recipes.ddp", "max_steps=1", "nproc=2", "device=cpu"]
BARE = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    str(Path(__file__).with_name("bare_ddp.py")),
]


def seconds(words: list[str], folder: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pairs + 1):
            bare = seconds([*BARE, f"{folder}/bare.pt"], folder)
            ours = seconds([*OURS, f"out={folder}/{number}"], folder)
            if number:  # the first pair warms the file cache
                found.append((bare, ours))
                print(f"pair {number}: bare {bare:.2f} s, lockstep {ours:.2f} s, ratio {ours / bare:.2f}")
    ratios = sorted(ours / bare for bare, ours in found)
    print(
        f"start-up ratio lockstep / bare: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )


if __name__ == "__main__":
    main()
