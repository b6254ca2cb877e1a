"""Many plans, several at a time; what became of them is counted, and told for those that went wrong."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.helpers.fuzz.judging import Outcome, play
from tests.helpers.fuzz.launched import draw_blows, play_launched
from tests.helpers.fuzz.on_slurm import draw_cluster_blows, play_on_slurm
from tests.helpers.fuzz.plans import draw
from tests.helpers.fuzz.starts import warm

WAYS = ("forked", "launched", "slurm")


@dataclass
class Tally:
    """What became of some runs.

    Attributes:
        last: the last seed.
        counts: runs, lost (a start that was not as it should be), differing bits, and what Outcome counts.
        places: kills by where they hit.
        trained: kills by recipe and by task.
        failed: the seeds that went wrong, each with its first line.
        said: a line for each run, and all that is known of one that went wrong.
    """

    last: int
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(("runs", "lost", "differing bits"), 0)))
    places: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.places.update(other.places)
        self.trained.update(other.trained)
        self.failed += other.failed

    def enter(self, name: str, trained: list[str], outcome: Outcome, seconds: float, folder: Path) -> None:
        """A run that has ended: its folder is kept where something is wrong."""
        self.counts.update(outcome.counts)
        self.places.update(outcome.places)
        for each in trained:
            self.trained[each] += outcome.counts["kills"]
        self.counts["runs"] += 1
        end = "DIFFERS" if outcome.wrong else "equal"
        self.said.append(f"seed {name}: {'; '.join(outcome.events)}: {end}, {seconds:.1f} s")
        if outcome.wrong:
            self.counts["differing bits" if outcome.differs else "lost"] += 1
            self.failed.append(f"seed {name}: {outcome.wrong.splitlines()[0][:60]}")
            self.said += [f"seed {name}: {outcome.wrong}", f"seed {name}: its files are in {folder}"]
        else:
            shutil.rmtree(folder)


def play_seed(way: str, variants: int, seed: int) -> Tally:
    """The plan of a seed, and its variants."""
    tally = Tally(seed)
    for variant in range(variants):
        name = f"{seed}.{variant}" if variant else str(seed)
        folder = Path(tempfile.mkdtemp(prefix=f"lockstep-fuzz-{name}-"))
        began = time.monotonic()
        if way == "launched":
            what, trained, outcome = (
                "recipes.ddp, launched",
                ["ddp", "task=images"],
                play_launched(draw_blows(seed), folder),
            )
        elif way == "slurm":
            what, trained = "recipes.ddp +cluster=slurm", ["ddp", "task=images"]
            outcome = play_on_slurm(draw_cluster_blows(seed, variant), folder)
        else:
            plan = draw(seed, variant)
            sizes = f" then × {', '.join(map(str, plan.sizes[1:]))}" if plan.sizes else ""
            what, trained = f"{plan.setup}{sizes}", [plan.setup.recipe, f"task={plan.setup.task}"]
            outcome = play(plan, folder)
        tally.enter(f"{name}: {what}", trained, outcome, time.monotonic() - began, folder)
    return tally


def played(play_one: Callable[[int], Tally], seeds: range, jobs: int, until: float) -> Iterator[tuple[int, Tally]]:
    """Seeds and what became of them, in order; none is begun after `until`, a time of time.monotonic."""
    waiting: deque[tuple[int, Future[Tally]]] = deque()
    left = iter(seeds)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        while True:
            while len(waiting) < jobs + 1 and time.monotonic() < until:
                number = next(left, None)
                if number is None:
                    break
                waiting.append((number, pool.submit(play_one, number)))
            if not waiting:
                return
            number, future = waiting.popleft()
            yield number, future.result()


def fuzz(
    runs: int,
    seed: int,
    way: str = "forked",
    say: Callable[[str], None] = print,
    *,
    variants: int = 1,
    jobs: int = 1,
    seconds: float = math.inf,
) -> Tally:
    """Play the plans of `runs` seeds from `seed` on; a run that went wrong is told in full, and its folder kept.

    Args:
        way: of WAYS.
        variants: plans per seed, which share its undisturbed run.
        jobs: seeds that are played at a time.
        seconds: after so many no further seed is begun.
    """
    whole, until = Tally(seed), time.monotonic() + seconds
    with warm():
        for number, tally in played(partial(play_seed, way, variants), range(seed, seed + runs), jobs, until):
            whole.add(tally)
            whole.last = number
            for line in tally.said:
                say(line)
    say(", ".join(f"{number} {name}" for name, number in whole.counts.items()))
    return whole
