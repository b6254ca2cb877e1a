"""`@recipe`: turns a training function into a command that composes once, checks, freezes and launches, or is a rank.

The same file plays both parts. Started by a person it composes the config with Hydra, writes it into the run directory
and has a launcher start the ranks; started by a launcher (RANK is set) it is one of those ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch.distributed as dist

from lockstep import data, files, world
from lockstep.errors import UserError
from lockstep.models import SMALL_IMAGE
from lockstep.run import Run
from lockstep.schema import Config, check_values, from_yaml, to_yaml, walk

RUN_DIRECTORY = "LOCKSTEP_RUN_DIR"  # set by launchers that start ranks for a run that is already frozen
COMPOSE_SECONDS = 3600.0  # rank 0 may list a million images, or download them, before the others learn the config
LAUNCHER = "LOCKSTEP_LAUNCHER_PID"


@dataclass(frozen=True)
class Proof:
    """What a recipe must compute the same as recipes.single, and under which settings that can be exact.

    Attributes:
        settings: {dotted key: value}, for this recipe and for `single` alike.
        own: further settings for this recipe alone, those that bring its technique to bear.
        differs: settings under which it is another computation; by how much is measured.
        because: why, for the reader of the table.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)
    because: str = ""


@dataclass(frozen=True)
class Recipe:
    """A training function and how it wants to be started.

    Attributes:
        train: the function, given a Run.
        target: how to start it again: a module name, or the path of a script.
        ranks: the only number of ranks it runs on; None: any.
        next_command: what the final summary suggests.
        global_batchnorm: BatchNorm sees all ranks' images, so a share of one image is enough.
        check: called with (config, images in a rank's share of the batch) before anything is created; raises UserError.
        proof: what `recipes.verify` holds it to; None: nothing.
    """

    train: Callable[[Run], None]
    target: str
    ranks: int | None = None
    next_command: str = ""
    global_batchnorm: bool = False
    check: Callable[[Config, int], None] | None = None
    proof: Proof | None = None

    @property
    def name(self) -> str:
        return Path(self.target).stem if self.target.endswith(".py") else self.target.rpartition(".")[2]

    @property
    def doc(self) -> str:
        return sys.modules[self.train.__module__].__doc__ or ""

    def __call__(self, run: Run) -> None:
        self.train(run)
        run.finish()

    def main(self) -> NoReturn:
        """Be the command: exit with the run's exit code, 2 for a mistake of the user's."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # recipes/__init__.py had it end the process at once
        try:
            place = world.discover(os.environ)
            code = submit(self) if place is None else None
        except UserError as error:
            code = complain(error)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        if code is not None:
            sys.stdout.flush()
            sys.exit(code)
        assert place is not None
        be_a_rank(self, place)


def recipe(train: Callable[[Run], None] | None = None, **options: Any) -> Any:
    """Make a recipe of a training function: `@recipe` or `@recipe(ranks=1)`, then `train.main()` under `__main__`.

    The options are Recipe's attributes.
    """

    def make(function: Callable[[Run], None]) -> Recipe:
        spec = function.__globals__.get("__spec__")  # `python -m recipes.ddp` names the module here, not in __name__
        target = spec.name if spec else os.path.abspath(function.__globals__["__file__"])
        return Recipe(function, target, **options)

    return make(train) if train else make


def complain(error: UserError) -> int:
    """Show a user's mistake as the one line it is; return the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


# The submitting process -------------------------------------------------------------------------------------------


def submit(recipe: Recipe) -> int:
    """Compose, check, freeze and launch, once for every point of a sweep; return the exit code.

    Raises:
        UserError: nothing was created.
    """
    from lockstep.compose import compose  # Hydra: a submitting process needs it, a rank does not

    codes = [0]

    def launch(config: Config) -> None:
        device, backend = world.resolve_device(config.device, config.backend)
        nproc = config.nproc or recipe.ranks or world.default_nproc(device)
        world.check_nproc(nproc, device, backend)
        complete(config, recipe, nproc)
        launcher = load_launcher(config.launcher)
        out = freeze(config, recipe)
        started, code = time.perf_counter(), 1
        try:
            environment = {RUN_DIRECTORY: str(out), LAUNCHER: str(os.getpid())}
            code = launcher.launch(recipe.target, environment, nproc=nproc)
        finally:
            if code:
                note_failure(out, recipe.name, nproc, time.perf_counter() - started)
        codes.append(code)
        if code == 128 + signal.SIGINT:  # Ctrl-C ends a sweep, not just one point of it
            raise KeyboardInterrupt

    compose(recipe, launch)
    return max(codes)


def load_launcher(name: str) -> ModuleType:
    """Import the module that a config names to start the ranks."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise  # the launcher is there, and something it needs is not
        raise UserError(f"launcher={name}: no such module; allowed are launchers.torchrun, or one of yours") from None


def complete(config: Config, recipe: Recipe, world_size: int) -> None:
    """Check all that can be checked before anything is created, and fill in what follows from the data set.

    Raises:
        UserError: a value is out of its range, does not fit another one, or is not supported yet.
    """
    check_values(config)
    refuse_what_is_not_there_yet(config)
    for name, value, rule in walk(config):
        if rule["only"] and recipe.name not in rule["only"] and value != rule["default"]:
            raise UserError(f"{name}={value}: recipes.{recipe.name} does not use it; {' and '.join(rule['only'])} do")
    if recipe.ranks not in (None, world_size):
        raise UserError(
            f"recipes.{recipe.name} runs on {recipe.ranks} rank, not {world_size}; "
            f"set nproc={recipe.ranks}, or --nproc-per-node={recipe.ranks}"
        )
    if config.nproc not in (None, world_size):
        raise UserError(
            f"nproc={config.nproc}: {world_size} ranks were started by hand; leave nproc out, or start as many"
        )
    check_batch(config, world_size)
    if len(config.data.mean) != 3 or len(config.data.std) != 3:
        raise UserError("data.mean and data.std: allowed are 3 numbers each, one a channel")
    classes, images = data.check(config.data)
    if config.batch_size > images:
        raise UserError(
            f"batch_size={config.batch_size}: the training set has only {images} images; allowed are 1…{images}"
        )
    if config.data.num_classes not in (None, classes):
        raise UserError(f"data.num_classes={config.data.num_classes}: {config.data.name} has {classes}; leave it out")
    config.data.num_classes = classes
    config.model.num_classes = config.model.num_classes or classes
    if config.model.num_classes < classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}: {config.data.name} has {classes} classes; "
            f"allowed are numbers from {classes} up"
        )
    config.model.image_size = config.model.image_size or config.data.image_size
    share = config.batch_size // (world_size // config.stages)
    if not recipe.global_batchnorm:
        check_batchnorm(config, share)
    if recipe.check:
        recipe.check(config, share)


def check_batch(config: Config, world_size: int) -> None:
    """Hold the global batch to the ranks, pipelines and micro-batches it is cut into.

    Raises:
        UserError: it does not divide, or a share is smaller than its number of micro-batches.
    """
    if world_size % config.stages:
        raise UserError(
            f"stages={config.stages}: a pipeline takes a rank for each stage, and {world_size} ranks do not divide "
            f"into such pipelines; set nproc to a multiple of stages"
        )
    shards = world_size // config.stages
    pieces = shards * config.micro_batches
    if config.batch_size % pieces:
        below = config.batch_size // pieces * pieces
        nearest = ", ".join(str(size) for size in (below, below + pieces) if size)
        what = f"{shards} ranks" if config.stages == 1 else f"{shards} pipelines"
        if config.micro_batches > 1:
            what += f" × micro_batches={config.micro_batches}"
        raise UserError(
            f"batch_size={config.batch_size}: the global batch must divide by {what}; nearest that do: {nearest}"
        )
    share = config.batch_size // shards
    if config.accumulate > share:
        raise UserError(f"accumulate={config.accumulate}: a rank's share is only {share} images; allowed are 1…{share}")


def check_batchnorm(config: Config, share: int) -> None:
    """BatchNorm has nothing to average over one image once that is down to one pixel; say so before it does."""
    size = config.model.image_size or 0
    pixels = math.ceil(size / (8 if size <= SMALL_IMAGE else 32))
    largest = math.ceil(share / max(config.accumulate, config.micro_batches))
    smallest = share % largest or largest  # chunk's last piece is the ragged one
    if config.model.norm == "batch" and pixels == 1 and smallest == 1:
        raise UserError(
            f"batch_size={config.batch_size}: leaves a forward with a single image, whose last layers are one pixel: "
            "BatchNorm has nothing to average; set a larger batch_size, fewer micro-batches, or model.norm=group"
        )


def refuse_what_is_not_there_yet(config: Config) -> None:
    """Refuse keys whose part of the suite has not landed, rather than ignore them."""
    if config.precision == "fp16":
        raise UserError("precision=fp16: not yet, it needs loss scaling; allowed now are fp32, bf16, fp64")
    if config.checkpoint.every is not None:
        raise UserError(f"checkpoint.every={config.checkpoint.every}: not yet; allowed now is null")
    if config.resume not in ("auto", "never"):
        raise UserError(f"resume={config.resume}: not yet; allowed now are auto and never")
    if config.monitor.name == "wandb":
        raise UserError("monitor=wandb: not yet; allowed now are csv and tensorboard")
    if config.cluster is not None:
        raise UserError("cluster: not yet; leave out +cluster=… to run on this machine")


def freeze(config: Config, recipe: Recipe) -> Path:
    """Make the run directory and put the config into it; return its absolute path."""
    out = files.make_run_directory(config.out, recipe.name)
    try:
        files.write_atomically(out / "config.yaml", to_yaml(config))
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise UserError(f"out={out}: cannot be written to ({error.strerror}); name another folder") from None
    return out


def note_failure(out: Path, recipe: str, world_size: int, wall_seconds: float) -> None:
    """Leave a result.json behind for a run whose ranks could not."""
    result = {"recipe": recipe, "status": "failed", "world_size": world_size, "wall_seconds": wall_seconds}
    with contextlib.suppress(OSError):  # a full disk may be what it failed of
        if not (out / "result.json").exists():
            files.write_json(out / "result.json", result)


# A rank -----------------------------------------------------------------------------------------------------------


def be_a_rank(recipe: Recipe, place: world.Place) -> NoReturn:
    """Join the others, train, and leave with the exit code.

    A rank's last line is os._exit: gloo's threads can abort the interpreter's own exit after all has gone well
    (pytorch issue 190489).
    """
    # Ctrl-C must end a rank that waits in a collective, where Python's handler would only run after it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    started, code, out = time.perf_counter(), 0, None
    console = os.dup(2)
    try:
        end_with_launcher()
        try:
            config, out, store, hosts = frozen_config(recipe, place)
        except SystemExit:  # --help and the like have printed what they were asked for
            sys.stdout.flush()
            os._exit(0)
        if place.rank:
            redirect_output(out / "ranks" / f"{place.rank}.log")
        train(recipe, config, out, store, place, hosts)
        dist.destroy_process_group()
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        tell(error, place, out, console)
        if out is not None and place.rank == 0:
            note_failure(out, recipe.name, place.world_size, time.perf_counter() - started)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_launcher() -> None:
    """Have the kernel end this rank when its launcher is killed, which no handler of the launcher's could do."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    PR_SET_PDEATHSIG = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(launcher):
        os._exit(1)  # it was killed while this rank was still importing


def train(recipe: Recipe, config: Config, out: Path, store: dist.Store, place: world.Place, hosts: list[str]) -> None:
    """Join the process group and run the recipe's function."""
    local_rank = os.environ.get("LOCAL_RANK")
    here = world.join(
        store,
        place.rank,
        place.world_size,
        device=config.device,
        backend=config.backend,
        timeout_seconds=config.timeout_seconds,
        threads=config.threads,
        tf32=config.tf32,
        local_rank=int(local_rank) if local_rank is not None else None,
        hosts=hosts,
    )
    if here.rank == 0:
        files.write_json(out / "environment.json", files.environment(here.hosts, str(here.device), here.backend))
    recipe(Run(recipe.name, config, here, out, recipe.next_command))


def frozen_config(recipe: Recipe, place: world.Place) -> tuple[Config, Path, dist.Store, list[str]]:
    """The run's config and directory, the store where the ranks meet, and the host of each.

    A launcher of ours has put both on disk. Where the ranks were started by hand there is nothing yet: rank 0 composes,
    checks and makes the directory, and tells the others over the store.
    """
    if RUN_DIRECTORY in os.environ:
        out = Path(os.environ[RUN_DIRECTORY])
        config = from_yaml((out / "config.yaml").read_text())
        _, store, hosts = meet(place, config.timeout_seconds)
        return config, out, store, hosts
    asked = [arg.partition("=")[2] for arg in sys.argv if arg.startswith("timeout_seconds=")]
    seconds = float(asked[-1]) if asked and asked[-1].isdecimal() else float(Config().timeout_seconds)
    shared, store, hosts = meet(place, seconds)  # first of all: where a rank is missing, nothing is created
    if place.rank == 0 and not shared.check(["run"]):  # restarted ranks go on in the directory of the first attempt
        try:
            told = compose_by_hand(recipe, place.world_size)
        except BaseException as error:
            told = {"error": f"rank 0 failed: {error}"}
            raise
        finally:
            shared.set("run", json.dumps(told))
    elif not world.wait_for(shared, ["run"], COMPOSE_SECONDS):
        raise UserError("rank 0 ended before it had sent a config; its own words say why")
    told = json.loads(shared.get("run"))
    if "config" in told:
        return from_yaml(told["config"]), Path(told["out"]), store, hosts
    world.farewell(store, place.rank, place.world_size)
    if "error" not in told:
        raise SystemExit(0)
    # Rank 0 says it; the others too where torchrun shows one rank's words and picks the rank itself.
    raise UserError(told["error"] if place.rank == 0 or place.agent_store else "rank 0 refused the config")


def meet(place: world.Place, timeout_seconds: float) -> tuple[dist.Store, dist.Store, list[str]]:
    """(the store, this attempt's part of it, every rank's host), when all ranks have come."""
    shared = world.open_store(place, timeout_seconds)
    # An agent keeps its store over restarts: a new attempt must not read the old one's keys.
    store = dist.PrefixStore(f"attempt{place.attempt}", shared)
    return shared, store, world.check_in(store, place.rank, place.world_size, timeout_seconds)


def compose_by_hand(recipe: Recipe, world_size: int) -> dict[str, str]:
    """Compose, check and freeze, on rank 0 of ranks that were started by hand; return what the others need.

    Returns:
        `config` and `out`, or `error`, or nothing where Hydra has only printed something (--help, --cfg).
    """
    from lockstep.compose import compose

    told: dict[str, str] = {}

    def keep(config: Config) -> None:
        complete(config, recipe, world_size)
        world.resolve_device(config.device, config.backend)
        told.update(config=to_yaml(config), out=str(freeze(config, recipe)))

    try:
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            raise UserError("--multirun: a sweep starts its own ranks; run it with python, not inside torchrun")
        compose(recipe, keep)
    except UserError as error:
        return {"error": str(error)}
    except SystemExit:
        return {}
    return told


def redirect_output(log: Path) -> None:
    """Send all this process prints, C++ included, to its log: of many ranks only rank 0 speaks on the console."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def tell(error: BaseException, place: world.Place, out: Path | None, console: int) -> None:
    """Put an error into the rank's log, and before the user exactly once.

    Args:
        console: a descriptor of the stderr this process was started with.
    """
    mistake = isinstance(error, UserError)
    text = f"error: {error}\n" if mistake else "".join(traceback.format_exception(error))
    if out is not None:
        with (out / "ranks" / f"{place.rank}.log").open("a") as log:
            log.write(text)
    secondary = place.world_size > 1 and lost_a_peer(error)
    if secondary:
        time.sleep(2)  # another rank broke first; it, or the launcher that sees it dead, is to be heard first
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # An agent started this rank and reads this file; our launcher, or torchrun's summary, shows the first failing
        # rank's. The format is torch.distributed.elastic's (multiprocessing/errors/error_handler.py).
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
        return
    if secondary:
        text = f"rank {place.rank} stopped because another rank did: {str(error).splitlines()[0]}\n"
    elif not mistake:
        text = f"rank {place.rank} failed\n{text}"
    os.write(console, text.encode())


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception only says that another rank has gone."""
    signs = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "NCCL error")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
