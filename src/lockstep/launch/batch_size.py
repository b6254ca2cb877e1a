"""`global_batch_size=auto`: the largest global batch with which all ranks can take training steps, found by taking them.

A trial is the run itself, cut short: the recipe on all its ranks, two steps, one round of evaluation, in a folder that
is thrown away. So all that it does with memory is in it, its sharding, its stages, its buffers. The fullest rank
decides, and all ranks get the one number that stands in the frozen config. Nothing is caught inside a rank, where the
others would wait for it in a collective: a rank without memory ends its trial, and the launcher ends the rest.

On a GPU a rank may take `memory_fraction` of what is free on it. On the CPU, whose memory belongs to everyone, the
ranks share that fraction of what the host, or the process's control group, has left; a limit on their data keeps a
trial that is too large from waking the kernel's OOM killer.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.config import run_directory
from lockstep.config.check import check_values
from lockstep.config.copies import with_values
from lockstep.config.schema import Config, LoggerConfig, shared_part
from lockstep.config.tasks import IMAGES, unit_of
from lockstep.diagnose import out_of_memory
from lockstep.distributed import environment
from lockstep.distributed.devices import resolve_device
from lockstep.errors import CheckFailed, UserError
from lockstep.launch import worker
from lockstep.launch.validate import check_batch, check_batchnorm, count_samples, validate
from lockstep.memory.usage import group_bytes, host_bytes, process_bytes
from lockstep.utils.temporary import own_folder
from lockstep.utils.text import count, mebibytes

if TYPE_CHECKING:
    from lockstep.recipe import Recipe


TRIAL_SECONDS = 1800.0  # by then it hangs, or is too slow to be of use
FIRST_SHARE = 16  # samples per rank in the first trial
SLACK = 2**29  # what a rank may map and not touch, beyond what this process does
CLOSE = 16  # the answer is within 1 / CLOSE of the largest that fits
SHORT: dict[str, Any] = {  # what makes a trial of a config
    "max_steps": 2,  # the second one has the optimizer's state from its beginning
    "epochs": 2,
    "eval_every": 0,
    "log_every": 1,
    "patience": None,
    "checkpoint.every": None,
    "checkpoint.minutes": 0,
    "checkpoint.best": False,
    "memory": None,
    "logger": LoggerConfig(),
}

Start = Callable[[Path, dict[str, str]], int]  # (run directory, variables) → exit code, as a launcher's `launch`


@dataclass(frozen=True)
class Trial:
    """How one went: whether the batch fits, the fullest rank's peak and what a rank may have, in bytes."""

    fits: bool
    peak: int | None
    room: int


def find_batch_size(config: Config, recipe: Recipe, ranks: int, start: Start) -> int:
    """The largest global batch that fits, said in one line.

    Args:
        recipe: what is to be trained, or a tool that looks at it.
        start: starts `ranks` ranks of it for a run directory, and returns their exit code.

    Raises:
        UserError: something else is wrong with the config.
        CheckFailed: not even the smallest batch fits, or a trial failed of something else.
    """
    if there := known(config, recipe):
        return there
    if not recipe.single_training:
        raise UserError(f"global_batch_size=auto: recipes.{recipe.name} is no single training; set a number")
    check_values(config)
    each, shards = recipe.subject(config), max(1, ranks // config.model_parallel_size)
    unit = shards * config.pipeline_micro_batches  # a batch is a whole number of these
    short, smallest, samples = first_allowed(config, recipe, ranks, unit)
    most = round_to_eight(samples // unit)
    device = resolve_device(config.device, config.backend)[0]
    room = int(config.memory_fraction * min([host_bytes(), *(size for size, _ in group_bytes())]) / ranks)
    trials: dict[int, Trial] = {}
    # A signal that would end this process at once ends the trial first, and takes its folder away.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with own_folder() as folder:

        def fits(units: int) -> bool:
            trial = attempt(short, each, units * unit, room if device == "cpu" else None, start, Path(folder))
            trials[units] = trial
            how = f"peak {mebibytes(trial.peak)} MiB" if trial.peak else "out of memory"
            print(f"global_batch_size=auto: {units * unit:,} tried: {how}", file=sys.stderr, flush=True)
            return trial.fits

        found = search(fits, trials, smallest, max(smallest, most), -(-FIRST_SHARE // config.pipeline_micro_batches))
    signal.signal(signal.SIGTERM, before)
    if found is None:
        raise CheckFailed(
            f"global_batch_size=auto: not even global_batch_size={smallest * unit} fits {allowance(trials[smallest], config)}; "
            "python -m recipes.doctor memory counts by layer"
        )
    if found == most:
        why = (
            f"the training set has {samples:,} {unit_of(config)}, {count(samples // (found * unit), 'step')} per epoch"
        )
    else:
        above = min((units for units, trial in trials.items() if not trial.fits), default=found)
        why = f"{above * unit:,} is too much for {allowance(trials[found], config)}"
    print(
        f"global_batch_size=auto: {found * unit}, {found * config.pipeline_micro_batches} {unit_of(config)} "
        f"on each of {shards}: {why}"
    )
    return found * unit


def allowance(trial: Trial, config: Config) -> str:
    size = f"the {mebibytes(trial.room)} MiB" if trial.room else "what"  # a GPU's rank took it with it
    return f"{size} that memory_fraction={config.memory_fraction} leaves a rank"


def known(config: Config, recipe: Recipe) -> int | None:
    """The batch of the run that this one continues: it was found then, and the order of the data hangs on it."""
    if config.out is None or config.resume == "never":
        return None
    try:
        text = (Path(config.out).expanduser() / "config.yaml").read_text(encoding="utf-8")
        return int(shared_part(text).global_batch_size) if run_directory.frozen_recipe(text) == recipe.name else None
    except OSError:
        return None


def first_allowed(config: Config, recipe: Recipe, ranks: int, unit: int) -> tuple[Config, int, int]:
    """(the config of a trial, the smallest batch in units that breaks no rule, samples in the training set).

    Raises:
        UserError: none does.
    """
    _, samples = count_samples(config)
    for units in range(1, max(1, samples // unit) + 1):
        whole = with_values(config, {"global_batch_size": units * unit})
        try:
            check_share(with_values(whole, {}), recipe.subject(config), ranks)
            break
        except UserError as error:
            wrong = error
            if not str(error).startswith(("global_batch_size=", "accumulate=")):
                raise
    else:
        raise wrong
    validate(whole, recipe, ranks)
    return cut_short(whole, recipe.subject(config)), units, samples


def cut_short(config: Config, recipe: Recipe) -> Config:
    """The config of a trial: its batch, model and shards, and nothing of its length, checkpoints and curves."""
    # A run that is resumed holds no more memory than one that begins; a backbone is part of the model.
    return with_values(config, SHORT if recipe.backbone else SHORT | {"resume": "never"})


def check_share(config: Config, recipe: Recipe, ranks: int) -> None:
    """What `complete` holds a batch to, without looking at the data."""
    check_batch(config, ranks)
    share = config.global_batch_size // (ranks // config.model_parallel_size)
    if config.task.name == IMAGES:
        config.model.image_size = config.model.image_size or config.data.image_size
        config.model.num_classes = config.model.num_classes or config.data.num_classes or 1
        if not recipe.has_global_batchnorm(config):
            check_batchnorm(config, share)
    if recipe.check:
        recipe.check(config, share)


def round_to_eight(count: int) -> int:
    """From 16 up a multiple of 8, which is what a GPU's matrix units like best."""
    return count - count % 8 if count >= 16 else count


def search(fits: Callable[[int], bool], trials: dict[int, Trial], smallest: int, most: int, first: int) -> int | None:
    """The largest count from `smallest` to `most` that fits, within 1 / CLOSE; None where none does.

    It goes up in leaps while nothing is known, then along the line through the last two peaks, which memory follows
    since a step's activations are proportional to its samples; between a size that fits and one that does not it halves.
    """
    good, bad = 0, most + 1
    count = round_to_eight(min(max(first, smallest), most))
    while True:
        if fits(count):
            good = count
        else:
            bad = count
        if good == most or (good and bad - good <= max(1, good // CLOSE)) or bad <= smallest:
            return good or None
        count = guess(trials, good, bad) if good else smallest
        count = round_to_eight(min(max(count, good + 1), bad - 1))
        if count <= good:  # what is left between the two is not a multiple of 8
            return good


def guess(trials: dict[int, Trial], good: int, bad: int) -> int:
    """Where to try next between a size that fits and one that does not."""
    peaks = sorted((count, trial.peak) for count, trial in trials.items() if trial.peak)
    if len(peaks) < 2:
        return min(8 * good, (good + bad) // 2 if bad in trials else bad - 1)
    (less, low), (more, high) = peaks[-2:]
    slope = (high - low) / (more - less)
    aim = int(more + 0.97 * (trials[good].room - high) / slope) if slope > 0 else 8 * good
    if bad in trials:  # the line ends where it would leave the interval
        return aim if good < aim < bad else (good + bad) // 2
    return min(aim, 8 * good)


# One trial --------------------------------------------------------------------------------------------------------


def attempt(config: Config, recipe: Recipe, size: int, room: int | None, start: Start, folder: Path) -> Trial:
    """Train two steps with a batch of `size`, in a child of this process.

    Args:
        room: bytes that a rank may have; None: it knows by itself, from its GPU.

    Raises:
        CheckFailed: it failed, and not for want of memory.
    """
    out = run_directory.freeze(
        with_values(config, {"global_batch_size": size, "out": str(folder / str(size))}), recipe.name
    )
    assert out is not None
    log = folder / f"{size}.log"
    code = in_a_child(lambda: start(out, {environment.TRIAL: "1"}), log, room)
    result = run_directory.read_result(out)
    short_of_memory = (out / out_of_memory.OUT_OF_MEMORY_FILE).exists() or code in (137, -9)
    shutil.rmtree(out, ignore_errors=True)
    if code and not short_of_memory:
        words = [line for line in log.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()]
        raise CheckFailed(
            f"global_batch_size=auto: a trial with global_batch_size={size} failed: {words[-1] if words else code}"
        )
    if code:
        return Trial(False, None, room or 0)
    peak = max(result["peak_memory_bytes_by_rank"])
    allowed = room if room is not None else int(result["trial_room_bytes"])
    return Trial(peak <= allowed, peak, allowed)


def in_a_child(work: Callable[[], int], log: Path, room: int | None) -> int:
    """Call something in a copy of this process, which prints into `log`; its exit code, 137 if it was killed."""
    me = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()  # Ctrl-C is the parent's to hear
            worker.redirect_output(log)
            tempfile.tempdir = os.environ["TMPDIR"] = str(
                log.parent
            )  # what a killed launcher leaves goes with the rest
            os.environ[environment.LAUNCHER] = str(me)
            worker.end_with_launcher()
            if room is not None:
                most = resource.getrlimit(resource.RLIMIT_DATA)[1]
                wanted = room + SLACK + max(0, process_bytes("VmData") - process_bytes("VmRSS"))
                least = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
                resource.setrlimit(resource.RLIMIT_DATA, (least, most))
            code = work()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    deadline = time.monotonic() + TRIAL_SECONDS
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
    except BaseException:
        end(child)
        raise
    end(child)
    raise CheckFailed(f"global_batch_size=auto: a trial was still running after {TRIAL_SECONDS:g} s; set a number")


def end(child: int) -> None:
    """Kill a trial's launcher; its ranks die with it."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
