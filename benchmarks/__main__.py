"""All benchmarks, one after the other, and one table of their ratios; `bench.json` holds the same.

    python -m benchmarks [NAME ...] [--rounds N]          or: make bench

Says which targets are met on this machine and which are not; to be slow is no failure, to break is one. The machine
should have nothing else to do. NAME: those to run, as `loop`; all unless told.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import common

ALL = (
    "answers",
    "startup",
    "loop",
    "peers",
    "communication",
    "pipeline",
    "recompute",
    "checkpoint",
    "saves",
    "input",
    "plan",
)


def main() -> None:
    there = [name for name in ALL if Path(__file__).with_name(f"{name}.py").exists()]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(there)}")
    parser.add_argument("--rounds", type=int, help="how often all take their turn")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="bench.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(there):
        parser.error(f"{', '.join(sorted(unknown))}: no such benchmark; allowed are {', '.join(there)}")
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or there:
            file = Path(folder, f"{name}.json")
            rounds = [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
            print(f"{name} …", file=sys.stderr, flush=True)
            try:
                common.run(["-m", f"benchmarks.{name}", *rounds, "--json", file])
            except RuntimeError as error:
                print(error, file=sys.stderr)
                failed.append(name)
                continue
            rows += common.read(file)
    common.show(rows)
    common.write(rows, arguments.out)
    missed = [row for row in rows if row.met is False]
    print(f"{sum(row.met is True for row in rows)} targets met, {len(missed)} not; {arguments.out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
