"""What a pipeline over two single-threaded ranks gives: ResNet-50 against one single-threaded process, in turn.

    python -m benchmarks.pipeline [PAIRS]

Three runs on the same synthetic images, each through its recipe: `single` on the whole batch, `single` on the same
micro-batches one after the other (accumulate), and `pipeline_parallel` with `cut=balanced` and 1F1B. With p = 2 stages
and m = 4 micro-batches the bubble alone would allow p · m / (m + p − 1) = 1.6 times the second.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES, PIECES = 2, 4
COMMON = ["model=resnet50", "data=synthetic", "data.image_size=224", "data.size=64", "data.augment=false"]
COMMON += ["batch_size=16", "max_steps=5", "log_every=100", "eval_batch_size=16", "channels_last=true", "threads=1"]
RUNS = {
    "whole batch": ["-m", "recipes.single"],
    "micro-batches": ["-m", "recipes.single", f"accumulate={PIECES}"],
    "pipeline": ["-m", "recipes.pipeline_parallel", f"stages={STAGES}", f"micro_batches={PIECES}", "cut=balanced"],
}


def run(words: list[str], out: Path) -> dict[str, float]:
    """The run's result.json."""
    subprocess.run([sys.executable, *words, *COMMON, f"out={out}"], check=True, capture_output=True)
    return json.loads((out / "result.json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    ratios: dict[str, list[float]] = {"whole batch": [], "micro-batches": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pairs):
            results = {name: run(words, Path(folder, f"{name}-{number}")) for name, words in RUNS.items()}
            speed = {name: result["images_per_second"] for name, result in results.items()}
            for name, found in ratios.items():
                found.append(speed["pipeline"] / speed[name])
            shown = ", ".join(f"{name} {value:.1f}" for name, value in speed.items())
            print(f"images/s: {shown}; idle {results['pipeline']['idle_shares']}, cut {results['pipeline']['cuts']}")
    ideal = STAGES * PIECES / (PIECES + STAGES - 1)
    for name, found in ratios.items():
        print(f"pipeline / {name}: median {statistics.median(found):.2f}, {min(found):.2f} to {max(found):.2f}")
    print(f"bubble alone allows {ideal:.2f} times the micro-batches in one process")


if __name__ == "__main__":
    main()
