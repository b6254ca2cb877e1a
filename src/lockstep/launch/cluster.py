"""A run on a cluster, as the submitting process sees it: checked for the ranks it will have there, frozen, handed over.

The launcher that `cluster.launcher` names does the rest. What a rank reads holds nothing of the cluster: the same
run directory can be continued on this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.config import run_directory, unfinished
from lockstep.config.check import check_values
from lockstep.config.keys import typed, walk
from lockstep.config.schema import ClusterConfig, Config
from lockstep.config.tasks import metric_of
from lockstep.distributed import environment
from lockstep.distributed.devices import resolve_device
from lockstep.distributed.environment import in_a_step_of_many
from lockstep.errors import UserError
from lockstep.launch.launcher import load_launcher
from lockstep.launch.run_records import apart, read_record, settings_of, show_sweep
from lockstep.launch.validate import validate

if TYPE_CHECKING:
    from lockstep.recipe import Recipe


def check_cluster(config: Config, recipe: Recipe) -> None:
    """Check all that can be checked from here, and fill in the ranks on each node, their device, and `out` of resume=last.

    Raises:
        UserError: a value is out of its range, or does not fit another one.
    """
    assert config.cluster is not None
    check_values(config)
    there = config.cluster
    if config.start != "auto":
        raise UserError(f"start={config.start}: is for ranks on this machine; srun starts those on a cluster")
    gpus = gpus_on_each(there)
    if there.tasks_per_node is None:
        there.tasks_per_node = recipe.ranks or gpus or 1
    world_size = there.nodes * there.tasks_per_node
    if recipe.ranks not in (None, world_size):
        raise UserError(
            f"cluster.nodes={there.nodes} cluster.tasks_per_node={there.tasks_per_node}: recipes.{recipe.name} runs on "
            f"{recipe.ranks} rank, not {world_size}; set both to 1"
        )
    if config.nproc not in (None, world_size):
        raise UserError(f"nproc={config.nproc}: is for this machine; on a cluster set cluster.tasks_per_node")
    # Of the devices this machine has nothing follows: a login node seldom has any.
    if config.device == "auto":
        config.device = "cuda" if gpus else "cpu"
    if config.device == "cpu":
        resolve_device(config.device, config.backend)
    elif config.backend != "gloo" and there.tasks_per_node > (gpus or there.tasks_per_node):
        raise UserError(
            f"cluster.tasks_per_node={there.tasks_per_node}: a rank needs a GPU of its own, and "
            f"cluster.gpus_per_node={there.gpus_per_node}; allowed are 1…{gpus} (or backend=gloo, whose "
            "ranks may share a device)"
        )
    validate(config, recipe, world_size)
    unfinished.offer_or_continue(config, recipe.name)


def gpus_on_each(there: ClusterConfig) -> int:
    """How many GPUs a node is asked for: 4 of `4` and of `a100:4`.

    Raises:
        UserError: it is neither.
    """
    given = re.fullmatch(
        r"(?:(?!gpu:)(?=[\w.+-]*[A-Za-z])[\w.+-]+:(?=0*[1-9]))?(\d{1,4})", str(there.gpus_per_node), re.ASCII
    )
    if not given:
        raise UserError(
            f"cluster.gpus_per_node={there.gpus_per_node}: allowed are whole numbers from 0 up, and a type with how many "
            "of it, such as a100:4"
        )
    if str(there.gpus_per_node).isdecimal():
        there.gpus_per_node = int(there.gpus_per_node)  # of a variable it comes as a text
    return int(given[1])


# Where, its max_restarts, its folder, its ranks' variables.
Submission = tuple[ClusterConfig, int, Path, dict[str, str]]
HERE = ("launcher", "nodes", "tasks_per_node")  # the keys of a cluster that has no queue


def check_here(config: Config) -> int | None:
    """Hold a cluster whose launcher starts ranks on this machine to what it uses; return the ranks asked for.

    Raises:
        UserError: a key that nobody would read, or two that contradict each other.
    """
    there = config.cluster
    assert there is not None
    check_values(config)
    for name, value, _ in walk(there):
        if name not in HERE and value != getattr(ClusterConfig(), name):
            raise UserError(
                f"{typed(f'cluster.{name}', value)}: {there.launcher} has no queue and does not use it; it uses "
                f"{', '.join(f'cluster.{key}' for key in HERE)}"
            )
    if config.nproc and (there.nodes > 1 or there.tasks_per_node not in (None, config.nproc)):
        raise UserError(f"nproc={config.nproc}: with cluster.nodes or cluster.tasks_per_node leave it out")
    return there.tasks_per_node or config.nproc


def adopt(recipe: Recipe) -> None:
    """In one of srun's tasks, have the launcher that `+cluster=` names say which rank this is, where it wants to.

    Raises:
        UserError: it cannot.
    """
    words = sys.argv[1:]
    if "RANK" in os.environ or not in_a_step_of_many(os.environ):
        return
    if not any(word.startswith("+cluster=") for word in words):
        return
    from lockstep.config.compose import compose

    found: list[Config] = []
    # What else is on the command line is rank 0's to compose, and to complain of.
    chosen = [word for word in words if word.startswith(("+cluster=", "--config-dir="))]
    before, sys.argv = sys.argv, [sys.argv[0], *chosen]
    try:
        compose(recipe, found.append)
    finally:
        sys.argv = before
    assert found[0].cluster is not None
    launcher = load_launcher(found[0].cluster.launcher, "cluster.launcher")
    if hasattr(launcher, "adopt"):
        launcher.adopt()


def submit(recipe: Recipe, configs: Sequence[Config]) -> int:
    """Freeze the runs, put them into the queue, follow them unless told not to; return the exit code.

    Raises:
        UserError: one of them is refused; none is in the queue, and nothing is left behind.
    """
    points = apart([settings_of(config) for config in configs])
    if any(config.cluster and config.cluster.dry_run for config in configs):
        return dry_run(recipe, configs, points)
    made: list[tuple[Path, Path | None]] = []  # run directories, and what to remove of each if it comes to nothing
    runs: list[Submission] = []
    jobs, outs = [], []
    try:
        for config, point in zip(configs, points, strict=True):
            assert config.cluster is not None
            new = first_missing(config, recipe)
            out = run_directory.freeze(replace(config, cluster=None), recipe.name)
            if out is None:
                print(run_directory.already_finished(config))
                outs.append(Path(str(config.out)))
                continue
            outs.append(out)
            made.append((out, new))
            runs.append((config.cluster, config.max_restarts, out, variables(out, point)))
        for there, max_restarts, wanted in arrays(runs):
            launcher = load_launcher(there.launcher, "cluster.launcher")
            found = launcher.submit(recipe.target, wanted, there, name=recipe.name, max_restarts=max_restarts)
            launcher.announce(found, there)
            jobs += found
    except UserError:
        if jobs:  # of another group, submitted a moment ago
            launcher.cancel(jobs)
        for out, new in made:
            if new is not None:
                shutil.rmtree(out, ignore_errors=True)
                remove_empty(out.parent, new)
        raise
    if not jobs or not runs[0][0].follow:
        return 0
    started, code = time.perf_counter(), launcher.follow(jobs)
    for job in jobs:
        if job.code:  # ranks that were killed, or never began, have left no word
            run_directory.note_failure(job.out, recipe.name, 0, time.perf_counter() - started)
    if len(configs) > 1 and all(job.code is not None for job in jobs):
        show_sweep(points, [read_record(out) for out in outs], metric_of(configs[0]))
    return int(code)


def dry_run(recipe: Recipe, configs: Sequence[Config], points: Sequence[str]) -> int:
    """Show what would be submitted, and what the cluster says of it; return the exit code.

    Raises:
        UserError: one of the runs is refused.
    """
    runs = []
    for config, point in zip(configs, points, strict=True):
        assert config.cluster is not None
        found = run_directory.found_in(config, recipe.name)
        out = found[0] if found else run_directory.wanted_directory(config.out, recipe.name)
        runs.append((config.cluster, config.max_restarts, out, variables(out, point)))
    for there, max_restarts, wanted in arrays(runs):
        launcher = load_launcher(there.launcher, "cluster.launcher")
        if not hasattr(launcher, "dry_run"):
            raise UserError(f"cluster.dry_run=true: {there.launcher} has no dry_run; allowed is false")
        launcher.dry_run(recipe.target, wanted, there, name=recipe.name, max_restarts=max_restarts)
    return 0


def variables(out: Path, point: str) -> dict[str, str]:
    """What the ranks of a submitted run find in their environment, besides torchrun's own."""
    return {environment.RUN_DIRECTORY: str(out)} | ({environment.POINT: point} if point else {})


def arrays(runs: Sequence[Submission]) -> Iterator[tuple[ClusterConfig, int, list[tuple[Path, dict[str, str]]]]]:
    """Runs that can be one array, whose jobs are all alike: points that differ in where they run are submitted apart."""
    for _, alike in groupby(runs, key=lambda run: (asdict(run[0]), run[1])):
        group = list(alike)
        yield group[0][0], group[0][1], [(out, environment) for _, _, out, environment in group]


def idle_nodes(env: Mapping[str, str]) -> str:
    """A word of warning where this machine is about to train alone in a job that has more; else nothing."""
    nodes = env.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" not in env or nodes == "1":
        return ""
    return f"note: this job has {nodes} nodes, and this trains on one of them; put srun in front to train on all"


def first_missing(config: Config, recipe: Recipe) -> Path | None:
    """The outermost folder that making the run directory will make; None where the run is there already."""
    if run_directory.found_in(config, recipe.name) is not None:
        return None
    wanted = Path(config.out).expanduser() if config.out else Path("outputs", recipe.name, "time")
    chain = [wanted.absolute(), *wanted.absolute().parents]
    missing = [path for path in chain if not path.exists()]
    return missing[-1] if missing else wanted.absolute()


def remove_empty(folder: Path, outermost: Path) -> None:
    """Remove an empty folder and its empty parents, up to `outermost`."""
    with contextlib.suppress(OSError):
        for path in [folder, *folder.parents]:
            if not path.is_relative_to(outermost):
                return
            path.rmdir()
