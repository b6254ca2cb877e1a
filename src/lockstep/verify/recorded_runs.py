"""Two runs' folders that recipes.diff compares: held to what they must have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lockstep.callbacks.tensor_recorder import TENSORS_FOLDER
from lockstep.errors import UserError
from lockstep.utils.text import count, short
from lockstep.verify.recording import RecordedStep, recorded_steps

Pair = tuple[int, RecordedStep, RecordedStep]


def recorded_pairs(runs: tuple[str, str]) -> Iterator[Pair]:
    """The steps that two runs have recorded, one after the other.

    Raises:
        UserError: a folder is no run, or has no recording, or it cannot be compared with the other's.
    """
    a, b = (steps_of(run) for run in runs)
    both = sorted(a.keys() & b.keys())
    if not both:
        raise UserError(f"runs={','.join(runs)}: have recorded no step both; set record_tensors in each from its start")
    for step in both:
        mine, theirs = (load_step(run, step, paths) for run, paths in ((runs[0], a[step]), (runs[1], b[step])))
        check_alike(runs, mine, theirs)
        yield step, mine, theirs


def steps_of(run: str) -> dict[int, list[Path]]:
    """The files of each recorded step of a run; raises UserError where there are none."""
    out = Path(run).expanduser()
    if not (out / "config.yaml").is_file():
        what = "no run's folder" if out.exists() else "no such folder"
        raise UserError(f"{run}: {what}, and no recipe; allowed are two folders of runs, or two recipes")
    found = recorded_steps(out)
    if not found:
        raise UserError(f"{run}: its run has recorded no tensors; train it with record_tensors=2")
    return found


def load_step(run: str, step: int, paths: list[Path]) -> RecordedStep:
    """One step of a run; raises UserError where ranks' files are missing or damaged."""
    try:
        found = RecordedStep.load(paths)
        about = found.about
        wanted = about["shards"] * about["size"]
    except Exception as error:  # whatever torch meets in it
        raise UserError(
            f"{run}: step {step} in {TENSORS_FOLDER}/ cannot be read ({type(error).__name__}); record it again"
        ) from None
    if len(paths) < wanted:
        raise UserError(
            f"{run}: of step {step} the files of {count(wanted - len(paths), 'rank')} are missing in {TENSORS_FOLDER}/; copy them "
            "too, or record it again"
        )
    return found


def check_alike(runs: tuple[str, str], mine: RecordedStep, theirs: RecordedStep) -> None:
    """Hold two recordings to one global batch and one model; raises UserError."""
    a, b = mine.about, theirs.about
    for name in ("global_batch_size",):
        if a[name] != b[name]:
            raise UserError(f"{name}={a[name]} in {runs[0]}, {b[name]} in {runs[1]}: record both with the same")
    names = a["parameters"], b["parameters"]
    for run, own, other in ((runs[0], *names), (runs[1], *reversed(names))):
        if lonely := [name for name in own if name not in set(other)]:
            raise UserError(
                f"{run}: has {lonely[0].rpartition('.')[0] or lonely[0]}, and the other model has no such layer"
            )
    shapes = mine.named("weights"), theirs.named("weights")
    for name in names[0]:
        one, two = (list(each[name][0].shape) if name in each else None for each in shapes)
        if one and two and one != two:
            raise UserError(f"{name} is {one} in {runs[0]}, {two} in {runs[1]}: record both with the same model")


def described_run(run: str, step: RecordedStep) -> str:
    """A run in words: `outputs/a: ddp, 2 ranks, fp32, torch 2.15.0`."""
    about = step.about
    ranks = count(len(step.ranks), "rank")
    return f"{short(Path(run))}: {about['recipe']}, {ranks}, {about['precision']}, torch {about['torch']}"
