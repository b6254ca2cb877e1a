"""Kills, signals and damages runs at random, starts them again, and compares them bit by bit with undisturbed ones.

    python -m tests.helpers.fuzz --runs 100 --seed 1             forked ranks on a narrow model, some seconds a run
    python -m tests.helpers.fuzz --runs 4 --seed 1 --launcher    `python -m recipes.ddp` as a user starts it

A seed decides everything that is drawn: the recipe, what it saves and how often, who is killed, and when. What a moment
of a clock then hits is up to the machine; a kill at the n-th file-system call of a save hits the same call each time.
"""

from __future__ import annotations

import argparse
import builtins
import faulthandler
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet

from lockstep.checkpoint.directory import UNFINISHED, list_checkpoints, manifest_digest
from lockstep.config import run_directory
from lockstep.config.run_directory import freeze
from lockstep.data import datasets
from lockstep.distributed import environment, signals
from lockstep.distributed.environment import Place
from lockstep.distributed.signals import PREEMPTED, SIGNALS, Listener
from lockstep.launch import worker
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from lockstep.verify.trace import difference
from tests.helpers import fuzz_tasks
from tests.helpers import overflowing_scaler as overflow
from tests.helpers.harness import compose_config, preload, renew_threads, tensors_of
from tests.helpers.narrow_resnet import NarrowResNet
from tests.helpers.processes import as_a_shell, children, processes_in

START_SECONDS = 90  # a start that takes longer hangs; an undisturbed one takes one or two
LEAVE_SECONDS = 15  # so long a rank may go on after another one has died and it was told to stop
ALONE = ("single", "data_parallel", "model_parallel")
RANKS = dict.fromkeys(ALONE, (1,)) | dict.fromkeys(
    ("ddp", "sync_batchnorm", "grad_accumulation", "transfer_learning", "zero1", "local_sgd"), (1, 2, 3)
)
RANKS |= {"pipeline_parallel": (2,), "deepspeed_zero": (2, 3), "fsdp": (2, 3, 4)}
RANKS |= dict.fromkeys(("lightning_fabric", "lightning_trainer"), (1, 2, 3))
KEEP_ALL = ("data_parallel",)  # what cannot compute activations again in backward
MESHES = {  # by ranks
    2: (("tensor=2",), ("tensor=1", "context=2")),
    3: (("tensor=1",),),
    4: (("tensor=2",), ("replicate=2",), ("context=2",), ("tensor=1", "context=2")),
}
RESIZED = ("fsdp",)  # started on another number of ranks each time: compared in fp64, and no longer bit by bit
COPIES = {("fsdp", 4): ("replicate=2",)}
OWN = {"grad_accumulation": ("accumulate=3",), "pipeline_parallel": ("stages=2", "micro_batches=4")}
OWN |= {"transfer_learning": ("weights=random", "unfreeze_epoch=2")}  # half of the steps before it, half after
# Four steps an epoch and an evaluation after each; a rank's share divides by 3 micro-batches on 1, 2 and 3 ranks.
IMAGES = 144, 36  # of the digits
SIZE = ("global_batch_size=36", "epochs=4", "log_every=1", "optim.warmup_steps=3", "threads=1", "timeout_seconds=120")
STEPS = 16
LOGGED = ("step", "loss", "lr", "loss_scale", "skipped_steps", "eval_loss", "eval_accuracy", "eval_f1")
LOGGED += ("eval_bits_per_token", "eval_token_accuracy", "eval_error")
TASKS = ("images", "FewSequences", "Ragged", "Weighted", "Read")  # the built-in one, and those of fuzz_tasks
OWN_RECIPE = "own_recipe"  # tests.helpers.own_recipe, in the place of the recipe whose wrap it has
WRAPS = {"single": "none", "ddp": "ddp", "fsdp": "fsdp"}

Tensors = dict[str, Tensor]


# What is drawn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A run: what decides its numbers, and what it saves, which must not."""

    recipe: str
    ranks: int
    words: tuple[str, ...]
    saving: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [word for word in self.words + self.saving if word not in SIZE and not word.startswith("task=")]
        shown = [f"task={self.task}", *(word.removeprefix("checkpoint.") for word in words)]
        return f"{self.recipe} × {self.ranks} {' '.join(shown)}"

    @property
    def target(self) -> Recipe:
        module = f"tests.helpers.{OWN_RECIPE}" if self.recipe == OWN_RECIPE else f"recipes.{self.recipe}"
        found: Recipe = importlib.import_module(module).train
        return found

    @property
    def task(self) -> str:
        return next((word.rpartition(":")[2] for word in self.words if word.startswith("task=")), TASKS[0])


@dataclass(frozen=True)
class Fault:
    """What befalls one start.

    Attributes:
        sign: number of the signal; 0: nothing happens.
        rank: who gets it; −1: all ranks.
        share: when, as a share of the time that an undisturbed run takes; None: at `call`.
        call: number of the file-system call below checkpoints/ at which the rank sends itself the signal.
        at: count only calls of which this is a part: `rename .writing-step-00000008`.
        after: behind that call, not before it; in the middle of a file that is being written.
        patient: the ranks ask each other about signals as seldom as in real runs, not after every step.
    """

    sign: int = 0
    rank: int = 0
    share: float | None = None
    call: int = 0
    at: str = ""
    after: bool = False
    patient: bool = False

    def __str__(self) -> str:
        if not self.sign:
            return "undisturbed"
        who = "all ranks" if self.rank < 0 else f"rank {self.rank}"
        return f"{signal.Signals(self.sign).name} to {who}"


@dataclass(frozen=True)
class Damage:
    """What befalls the files between two starts; `file` and `place` are shares of what is there to choose from."""

    kind: str
    file: float = 0.0
    place: float = 0.0


DAMAGES = ("truncate", "flip", "delete", "no LATEST", "garbled LATEST", "stale folder")


@dataclass(frozen=True)
class Plan:
    """All that is drawn for one seed. A last, undisturbed start follows the faults.

    Attributes:
        sizes: on how many ranks each start is; empty: all on the setup's.
    """

    setup: Setup
    faults: tuple[Fault, ...]
    damages: tuple[Damage | None, ...]
    sizes: tuple[int, ...] = ()


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    dice = random.Random(f"lockstep {seed}")
    recipe = dice.choice(sorted(RANKS))
    ranks = dice.choice(RANKS[recipe])
    words = [*SIZE, *OWN.get(recipe, ()), f"optim={dice.choice(('sgd', 'adamw'))}"]
    if recipe == "grad_accumulation":
        words.append(f"accumulate_by={dice.choice(('chunk', 'unbind'))}")
    if recipe == "deepspeed_zero":
        words.append(f"stage={dice.randrange(4)}")
    if dice.random() < 0.15:
        words.append("patience=1")  # most of these small runs have become worse, and end, before the last epoch
    every, keep = dice.randint(1, 5), dice.randint(1, 3)
    saving = [f"checkpoint.every={every}", f"checkpoint.keep={keep}"]
    saving.append(f"checkpoint.asynchronous={dice.choice(('true', 'false'))}")
    if dice.random() < 0.4:
        saving.append("checkpoint.best=true")
    faults, damages, count, sizes = [], [], dice.randint(1, 4), ()
    if recipe in RESIZED and dice.random() < 0.5:
        words += ["precision=fp64", "model.norm=group"]
        sizes = (ranks, *(dice.choice(RANKS[recipe]) for _ in range(count)))
    if not sizes and random.Random(f"lockstep fp16 {seed}").random() < 0.15:  # drawn apart: seeds keep their plans
        words += overflow.WORDS
    if recipe not in KEEP_ALL and random.Random(f"lockstep checkpointed {seed}").random() < 0.15:
        words.append("checkpoint_activations=2")
    for number in range(count):
        faults.append(draw_fault(dice, sizes[number] if sizes else ranks, saves=STEPS // every))
        harm = dice.random() < 0.4
        damages.append(Damage(dice.choice(DAMAGES), dice.random(), dice.random()) if harm else None)
    recipe, words = draw_task(random.Random(f"lockstep task {seed}"), recipe, words, resized=bool(sizes))
    if (
        recipe in ("ddp", "zero1", "lightning_fabric")
        and ranks == 2
        and any(word.endswith(":FewSequences") for word in words)
    ):
        part = random.Random(f"lockstep tensor {seed}").choice(
            (None, "sequence_parallel=true", "sequence_parallel=false")
        )
        way = random.Random(f"lockstep context {seed}").choice(("by=ring", "by=ulysses"))
        recipe, words = ("tensor_parallel", [*words, part]) if part else ("context_parallel", [*words, way])
        if random.Random(f"lockstep experts {seed}").random() < 0.5:  # drawn apart: other seeds keep their plans
            recipe, words = "expert_parallel", [*words[:-1], "task.experts=2", "task.experts_per_token=1"]
    if recipe == "transfer_learning" and random.Random(f"lockstep lora {seed}").random() < 0.5:
        recipe, words = "lora", [word for word in words if not word.startswith("unfreeze_epoch")]
    hooks = random.Random(f"lockstep compressed {seed}")
    if recipe == "ddp" and "precision=fp16" not in words and hooks.random() < 0.4:
        recipe, words = "comm_hooks", [*words, hooks.choice(("r=1", "compress=bf16", "compress=fp16"))]
    mesh = random.Random(f"lockstep mesh {seed}")
    if recipe == "fsdp" and not sizes and mesh.random() < 0.6:
        words = [word for word in words if not word.startswith(("task", "model.", "data.", "optim.lr"))]
        words += [f"task={fuzz_tasks.__file__}:FewSequences", "optim.lr=0.003", *mesh.choice(MESHES[ranks])]
        recipe = "parallel_mesh"
    return Plan(Setup(recipe, ranks, tuple(words), tuple(saving)), tuple(faults), tuple(damages), sizes)


def draw_task(dice: random.Random, recipe: str, words: list[str], resized: bool) -> tuple[str, list[str]]:
    """What is trained, and by whom: (recipe, words), each as it was or another one in its place.

    Args:
        resized: the starts are on different numbers of ranks.
    """
    able = ("images", "Weighted") if recipe == "sync_batchnorm" else TASKS  # whose model has BatchNorm
    task = dice.choice(able)
    if task != "images":
        words = [word for word in words if not word.startswith("model.")]
        words += [f"task={fuzz_tasks.__file__}:{task}", "optim.lr=0.003", f"data.workers={dice.choice((0, 0, 0, 1))}"]
    if resized:  # other ranks draw other dropout, and see other batches
        words += {
            "FewSequences": ["task.dropout=0"],
            "Ragged": ["task.dropout=0"],
            "Weighted": ["task.norm=layer"],
        }.get(task, [])
    if task == "Read":
        # A stream that is each rank's own part resumes on as many ranks as it was saved by.
        kinds = ("task.addressed=true", "task.addressed=false", "task.per_rank=true")
        words.append(dice.choice(kinds[:2] if resized else kinds))
    if recipe in WRAPS and dice.random() < 0.4:
        words.append(f"wrap={WRAPS[recipe]}")
        recipe = OWN_RECIPE
    return recipe, words


def draw_fault(dice: random.Random, ranks: int, saves: int) -> Fault:
    who = dice.randrange(ranks)
    kind = dice.choice(("kill", "kill all", "kill in save", "kill in save", "kill in save", "signal", "signal in save"))
    sign = signal.SIGKILL if kind.startswith("kill") else dice.choice(SIGNALS)
    if kind.endswith("in save"):
        calls = 25 if who == 0 else 6  # about so many a save: rank 0 also commits and prunes
        call = dice.randint(1, calls * max(1, saves))
        return Fault(sign, who, call=call, after=dice.random() < 0.5, patient=dice.random() < 0.3)
    return Fault(sign, -1 if kind == "kill all" else who, dice.uniform(0.0, 1.1), patient=dice.random() < 0.3)


# A start: ranks as processes --------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How one start ended.

    Attributes:
        codes: exit codes by rank, −9 for SIGKILL.
        hit: the file-system call at which the fault struck, or `moment`; empty: the start was over before.
        was_training: whether the rank that got a signal had a step boundary to wait for.
        hung: what was still running, and where it stood; empty: nothing.
        said: all that the ranks printed.
    """

    codes: list[int]
    hit: str = ""
    was_training: bool = False
    hung: str = ""
    said: str = ""
    seconds: float = 0.0


@contextmanager
def warm() -> Iterator[None]:
    """Make the model small and the digits few, and load here what forked ranks would otherwise each load."""
    before = datasets.digits, resnet.resnet18, torch.get_num_threads()
    few = [datasets.InMemoryImages(part.images[:size], part.labels[:size], 10, 1, False) for part, size in digits()]
    torch.set_num_threads(1)  # a fork must not inherit a running pool
    datasets.digits, resnet.resnet18 = lambda: (few[0], few[1]), shallow_resnet
    try:
        with overflow.overflowing():
            yield
    finally:
        datasets.digits, resnet.resnet18 = before[:2]
        torch.set_num_threads(before[2])


def shallow_resnet(num_classes: int, norm_layer: Any, **options: Any) -> nn.Module:
    """One block a layer: what a start takes is for the most part the number of tensors it saves."""
    model = NarrowResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes, norm_layer=norm_layer, **options)
    model.fc = nn.Linear(32, num_classes)
    return model


def digits() -> list[tuple[datasets.InMemoryImages, int]]:
    return [
        (part, size)
        for part, size in zip(datasets.digits(), IMAGES, strict=True)
        if isinstance(part, datasets.InMemoryImages)
    ]


def start(setup: Setup, out: Path, fault: Fault = Fault(), typical_seconds: float = 1.0) -> Ended:
    """Start the ranks of a run, let the fault befall them, and wait for their end as torchrun's agent would.

    When a rank has died the others are told to stop. One that was asked to leave is no reason to: the others must come
    to know of it by themselves.
    """
    preload(setup.target)
    copies = COPIES.get((setup.recipe, setup.ranks), ())
    config = compose_config(setup.target, f"out={out}", *setup.words, *setup.saving, *copies)
    validate(config, setup.target, setup.ranks)
    folder = freeze(config, setup.recipe)
    assert folder is not None, "the run has finished"
    with tempfile.TemporaryDirectory() as scratch:
        return start_ranks(setup.target, setup.ranks, folder, Path(scratch), fault, typical_seconds)


def start_ranks(recipe: Recipe, ranks: int, out: Path, scratch: Path, fault: Fault, typical_seconds: float) -> Ended:
    context = multiprocessing.get_context("fork")
    hit: Any = context.RawArray("c", 512)  # no locks: a killed rank would keep them
    training: Any = context.RawArray("b", ranks)
    console = scratch / "console"
    console.touch()
    processes = [
        context.Process(target=_rank, args=(recipe, number, ranks, out, scratch, fault, hit, training))
        for number in range(ranks)
    ]
    began = time.monotonic()
    for process in processes:
        process.start()
    ended = Ended([0] * ranks)
    strike = began + fault.share * typical_seconds if fault.sign and fault.share is not None else math.inf
    stop, kill = math.inf, began + START_SECONDS
    running = dict(enumerate(processes))
    while running:
        pause = min(strike, stop, kill) - time.monotonic()
        wait([process.sentinel for process in running.values()], timeout=max(0.0, pause))
        now = time.monotonic()
        for number, process in list(running.items()):
            if process.exitcode is None:
                continue
            ended.codes[number] = process.exitcode
            del running[number]
            # A rank that left before there was a step to end is the agent's affair, like one that died.
            if process.exitcode not in (0, PREEMPTED) or (process.exitcode == PREEMPTED and not all(training)):
                stop = min(stop, now + 0.1)
        if running and now >= strike:
            ended.was_training, strike = all(training), math.inf
            for process in running.values() if fault.rank < 0 else filter(None, [running.get(fault.rank)]):
                ended.hit = "a moment"
                os.kill(process.pid, fault.sign)
        if running and now >= stop:
            for process in running.values():
                os.kill(process.pid, signal.SIGTERM)
            stop, kill = math.inf, min(kill, now + LEAVE_SECONDS)
        if running and now >= kill:
            ended.hung = end(running, console)
            running = {}
    ended.seconds = time.monotonic() - began
    ended.hit = ended.hit or hit.value.decode()
    ended.was_training = ended.was_training or (bool(hit.value) and all(training))
    for process in processes:
        process.join()
        process.close()
    ended.said = console.read_text(errors="replace")
    return ended


def end(running: dict[int, Any], console: Path) -> str:
    """Kill what hangs, when it has written where it stands."""
    for process in running.values():
        os.kill(process.pid, signal.SIGQUIT)
    time.sleep(1)
    for process in running.values():
        process.kill()
        process.join()
    return f"ranks {sorted(running)} hung\n{console.read_text(errors='replace')}"


def _rank(
    recipe: Recipe, number: int, ranks: int, out: Path, scratch: Path, fault: Fault, hit: Any, training: Any
) -> NoReturn:
    """Be a rank as lockstep.launch.worker has it, except that the store is a file and the config is there already."""
    renew_threads()
    signals.end_with_parent()
    for sign in SIGNALS:
        signal.signal(sign, signal.SIG_DFL)
    console = os.open(scratch / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.register(signal.SIGQUIT, os.fdopen(console, "w", closefd=False), all_threads=True)
    os.environ[environment.RUN_DIRECTORY] = str(out)
    worker.open_store = lambda *_: dist.FileStore(str(scratch / "store"), ranks)  # type: ignore[assignment]

    class Noted(Listener):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "training" and value:
                training[number] = 1

    worker.Listener = Noted  # type: ignore[misc]
    if not fault.patient:
        signals.AGREE_SECONDS = 0.0
    if fault.sign and fault.share is None and fault.rank == number:
        strike_at_call(fault, out / run_directory.CHECKPOINTS, hit)
    worker.work(recipe, Place(number, ranks, "", 0, agent_store=False, attempt=0))


def strike_at_call(fault: Fault, below: Path, hit: Any) -> None:
    """Have this process send itself the signal at its n-th file-system call that changes something below a folder."""
    numbers = itertools.count(1)

    def strike(what: str) -> None:
        hit.value = what.encode()[:511]
        os.kill(os.getpid(), fault.sign)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = where(args[0], options.get("dir_fd"))
            reads = name == "open" and not set("wax") & set(args[1] if len(args) > 1 else options.get("mode", "r"))
            if reads or not path.is_relative_to(below):
                return function(*args, **options)
            what = f"{name} {path.relative_to(below)}"
            if fault.at not in what or next(numbers) != fault.call:
                return function(*args, **options)
            what = f"{'after' if fault.after else 'before'} {what}"
            if not fault.after:
                strike(what)
            try:
                result = function(*args, **options)
            except FileNotFoundError:  # what was to be removed is not there
                if fault.after:
                    strike(what)
                raise
            if fault.after and name == "open":
                return Torn(result, lambda: strike(f"within {path.relative_to(below)}"))
            if fault.after:
                strike(what)
            return result

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(name, getattr(os, name)))
    # What Path.open calls, and what own_files does: two names of one function.
    io.open = builtins.open = watched("open", io.open)  # type: ignore[assignment]


def where(target: Any, folder: int | None) -> Path:
    """The path that a call is about: given as one, as a descriptor, or as a name within an open folder."""
    if isinstance(target, int):
        return Path(os.readlink(f"/proc/self/fd/{target}"))
    if folder is not None:
        return Path(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(target))
    return Path(os.path.abspath(target))


class Torn:
    """A file of which half of the first thing that is written reaches the disk."""

    def __init__(self, stream: Any, strike: Callable[[], None]) -> None:
        self.stream, self.strike = stream, strike

    def write(self, content: Any) -> int:
        strike, self.strike = self.strike, lambda: None
        half = len(content) // 2
        self.stream.write(content[:half])
        self.stream.flush()
        strike()
        self.stream.write(content[half:])  # the signal was one that can be survived
        return len(content)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# Damage -----------------------------------------------------------------------------------------------------------


def inflict(damage: Damage, folder: Path) -> tuple[str, str]:
    """Damage the newest checkpoint, or what lies around it.

    Returns:
        What was done, and the name of the checkpoint that is not intact any more; both may be empty.
    """
    listed = list_checkpoints(folder)
    if not listed:
        return "", ""
    newest = listed[0]
    if damage.kind == "no LATEST":
        (folder / "LATEST").unlink(missing_ok=True)
        return damage.kind, ""
    if damage.kind == "garbled LATEST":
        (folder / "LATEST").write_bytes(random.Random(damage.place).randbytes(1 + int(600 * damage.file)))
        return damage.kind, ""
    if damage.kind == "stale folder":
        stale = folder / f"{UNFINISHED}step-{int(STEPS * damage.place):08d}"
        shutil.copytree(newest, stale, dirs_exist_ok=True)
        return damage.kind, ""
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    file = files[int(damage.file * len(files))]
    before = file.read_bytes()
    at = int(damage.place * len(before))
    what = f"{damage.kind} {newest.name}/{file.name}"
    if damage.kind == "delete":
        file.unlink()
        return what, newest.name
    after = before[:at] if damage.kind == "truncate" else flipped(before, at, bit=at % 8)
    file.write_bytes(after)
    harmless = file.name == "manifest.json" and same_manifest(before, after)  # 1e-5 and 1E-5 are the same number
    return what, "" if harmless else newest.name


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def same_manifest(before: bytes, after: bytes) -> bool:
    try:
        old, new = json.loads(before), json.loads(after)
        return bool(manifest_digest(old) == manifest_digest(new) and old["seal"] == new["seal"])
    except (ValueError, KeyError):
        return False


def state_of(folder: Path, damaged: set[str]) -> dict[Path, tuple[int, int, int]]:
    """What would show that a file of an intact checkpoint was written again."""
    intact = [path for path in list_checkpoints(folder) if path.name not in damaged]
    found = {}
    for path in intact:
        for file in filter(Path.is_file, path.rglob("*")):
            facts = file.stat()
            found[file] = facts.st_ino, facts.st_size, facts.st_mtime_ns
    return found


def folders_of(folder: Path, names: set[str]) -> dict[str, int]:
    """Inodes of those checkpoints that are there: one that is saved again is another folder under the same name."""
    return {name: (folder / name).stat().st_ino for name in names if (folder / name).exists()}


# Playing a plan ---------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        counts: kills, kills in a save, preemptions, damages, resumes.
        events: what happened, in order.
        wrong: the first thing that was not as it should be; empty: the run ended as the undisturbed one did.
    """

    counts: Counter[str] = field(default_factory=Counter)
    events: list[str] = field(default_factory=list)
    wrong: str = ""


@dataclass(frozen=True)
class Result:
    """What a finished run left: all of it must be equal."""

    weights: Tensors
    best: Tensors
    log: list[tuple[Any, ...]]
    state: Tensors
    seconds: float


def result_of(out: Path, seconds: float = 0.0) -> Result:
    def weights(name: str) -> Tensors:
        return torch.load(out / name, weights_only=True) if (out / name).exists() else {}

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    log = [tuple(line.get(name) for name in LOGGED) for line in lines]
    listed = list_checkpoints(out / run_directory.CHECKPOINTS)
    return Result(weights("model.pt"), weights("best.pt"), log, tensors_of(listed[0]) if listed else {}, seconds)


def first_difference(mine: Tensors, theirs: Tensors) -> str:
    """The first tensor that is not the same to the last bit; empty: there is none."""
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            return f"{name} is {'missing' if name in theirs else 'more than there should be'}"
        a, b = mine[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        unequal = bits(a) != bits(b)
        if unequal.any():
            largest = (a.double() - b.double()).abs().max().item()
            return f"{name} differs in {int(unequal.sum())} of {unequal.numel()} bytes, by {largest:.3g} at most"
    return ""


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare(found: Result, expected: Result, best: bool) -> str:
    """The first thing in which a run is not the undisturbed one; empty: it is."""
    for number, (mine, theirs) in enumerate(itertools.zip_longest(found.log, expected.log)):
        if mine != theirs:
            return f"metrics.jsonl line {number + 1}: {mine}, not {theirs}; of {', '.join(LOGGED)}"
    # The undisturbed run keeps its best: only then does a checkpoint have what would be exported beside the weights.
    state = {name: tensor for name, tensor in expected.state.items() if best or not name.startswith("whole.")}
    pairs = {"model.pt": (found.weights, expected.weights), "checkpoint": (found.state, state)}
    if best:
        pairs["best.pt"] = found.best, expected.best
    for name, (mine, theirs) in pairs.items():
        if not theirs:
            return f"{name}: the undisturbed run has none"
        if said := first_difference(mine, theirs):
            return f"{name}: {said}"
    return ""


def compare_in_fp64(found: Result, expected: Result, best: bool, tolerance: float = 1e-8) -> str:
    """As `compare`, but for the order in which ranks sum up, and for generators, of which each rank has its own."""
    logs = [
        [value if value is not None else -1 for line in result.log for value in line] for result in (found, expected)
    ]
    if len(logs[0]) != len(logs[1]) or not np.allclose(logs[0], logs[1], rtol=tolerance):
        return f"metrics.jsonl: {found.log}, not {expected.log}; of {', '.join(LOGGED)}"
    states = [{n: t for n, t in result.state.items() if not n.startswith("rng.")} for result in (found, expected)]
    pairs = {"model.pt": (found.weights, expected.weights), "checkpoint": (states[0], states[1])}
    if best:
        pairs["best.pt"] = found.best, expected.best
    off = {name: difference(mine, theirs) for name, (mine, theirs) in pairs.items()}
    return "".join(f"{name} differs by {by:.0e} " for name, by in off.items() if not by <= tolerance)


@cache
def reference(setup: Setup) -> Result:
    """What an undisturbed run of these numbers leaves; each is run once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        saving = ("checkpoint.every=1000", "checkpoint.best=true", "checkpoint.asynchronous=false")
        ended = start(Setup(setup.recipe, setup.ranks, setup.words, saving), out)
        assert ended.codes == [0] * setup.ranks, ended.said or ended.hung
        return result_of(out, ended.seconds)


def play(plan: Plan, folder: Path) -> Outcome:
    """Run a plan in an empty folder, and judge each start as well as the end."""
    setup, outcome = plan.setup, Outcome()
    expected = reference(Setup(setup.recipe, setup.ranks, setup.words))
    out, damaged = folder / "out", set[str]()
    sizes = plan.sizes or (setup.ranks,) * (len(plan.faults) + 1)
    for fault, damage, ranks in zip((*plan.faults, Fault()), (*plan.damages, None), sizes, strict=True):
        before = state_of(out / run_directory.CHECKPOINTS, damaged)
        broken_ones = folders_of(out / run_directory.CHECKPOINTS, damaged)
        wanted = next(
            (path for path in list_checkpoints(out / run_directory.CHECKPOINTS) if path.name not in damaged), None
        )
        newer = {
            path.name
            for path in list_checkpoints(out / run_directory.CHECKPOINTS)
            if not wanted or path.name > wanted.name
        }
        log = out / "ranks" / "0.log"
        read = log.stat().st_size if log.exists() else 0
        ended = start(replace(setup, ranks=ranks), out, fault, expected.seconds)
        words = log.read_bytes()[read:].decode(errors="replace") if log.exists() else ""
        words = "\n".join(re.findall(r"^\d\d:\d\d:\d\d .*", words, re.MULTILINE))  # DeepSpeed talks there too
        resumed = re.search(r"resuming from \S*(step-\d+), at step", words)
        tell(outcome, fault, ended, resumed)
        outcome.wrong = (
            judge(fault, ended, out)
            or judge_resume(wanted, newer, resumed, words)
            or judge_files(before, state_of(out / run_directory.CHECKPOINTS, set()))
        )
        left = folders_of(out / run_directory.CHECKPOINTS, damaged)
        damaged = {name for name, inode in left.items() if broken_ones.get(name) == inode}  # others are saved anew
        if outcome.wrong or run_directory.read_result(out).get("status") == "finished":
            break
        if damage:
            what, broken = inflict(damage, out / run_directory.CHECKPOINTS)
            damaged |= {broken} - {""}
            if what:
                outcome.counts["damages"] += 1
                outcome.events.append(what)
    else:
        outcome.wrong = "the last start was undisturbed, and yet the run has not finished"
    best = "checkpoint.best=true" in setup.saving
    if plan.sizes:
        outcome.wrong = outcome.wrong or compare_in_fp64(result_of(out), expected, best)
    else:
        outcome.wrong = outcome.wrong or compare(result_of(out), expected, best)
    return outcome


def tell(outcome: Outcome, fault: Fault, ended: Ended, resumed: re.Match[str] | None) -> None:
    """Count and describe what happened in a start."""
    if resumed:
        outcome.counts["resumes"] += 1
        outcome.events.append(f"from {resumed[1]}")
    if not ended.hit:
        outcome.events.append("undisturbed")
    elif fault.sign == signal.SIGKILL:
        outcome.counts["kills"] += 1
        outcome.counts["kills in a save"] += fault.share is None
        outcome.events.append(f"{fault} at {ended.hit}")
    else:
        outcome.counts["preemptions"] += set(ended.codes) == {PREEMPTED}
        outcome.events.append(f"{fault} at {ended.hit}, left with {', '.join(map(str, ended.codes))}")


def judge(fault: Fault, ended: Ended, out: Path) -> str:
    """What is wrong with how a start ended; empty: nothing."""
    if ended.hung:
        return ended.hung
    codes, numbered = set(ended.codes), list(enumerate(ended.codes))
    if not ended.hit:
        return "" if codes == {0} else f"undisturbed, and yet exit codes {ended.codes}\n{ended.said}"
    if 2 in codes:
        return f"a mistake of the user's, where there was none\n{ended.said}"
    if fault.sign == signal.SIGKILL:
        blamed = [f"rank {number} failed\n" in ended.said and code != -signal.SIGKILL for number, code in numbered]
        return f"rank {blamed.index(True)} blames itself for a kill\n{ended.said}" if any(blamed) else ""
    if ended.was_training:
        if codes not in ({0}, {PREEMPTED}):
            return f"{fault} while training: exit codes {ended.codes}\n{ended.said}"
        if codes == {PREEMPTED}:
            return judge_preempted(out)
    return ""


def judge_preempted(out: Path) -> str:
    """A run that was asked to leave has lost no step."""
    result = run_directory.read_result(out)
    if result.get("status") != "preempted":
        return f"preempted, and result.json says {result.get('status')}"
    saved = [path.name for path in list_checkpoints(out / run_directory.CHECKPOINTS)] or ["step-0"]
    if int(saved[0].removeprefix("step-")) != result["steps"]:
        return f"preempted after step {result['steps']}, and the newest checkpoint is {saved[0]}"
    return ""


def judge_resume(wanted: Path | None, newer: set[str], resumed: re.Match[str] | None, words: str) -> str:
    """Whether a start went on from the newest intact checkpoint, and named what it passed over.

    Args:
        wanted: that checkpoint.
        newer: the broken ones before it.
        words: what rank 0 logged in this start.
    """
    if resumed and (wanted is None or resumed[1] != wanted.name):
        return f"resumed from {resumed[1]}, not from {wanted and wanted.name}\n{words}"
    if wanted and not resumed and "  batch  " in words:
        return f"started anew, where {wanted.name} is intact\n{words}"
    named = set(re.findall(r"skipped (step-\d+): ", words))
    if (resumed or "  batch  " in words) and named != newer:
        return f"said to have skipped {sorted(named)}, not {sorted(newer)}\n{words}"
    return ""


def judge_files(before: dict[Path, tuple[int, int, int]], after: dict[Path, tuple[int, int, int]]) -> str:
    changed = [str(path) for path, facts in before.items() if path in after and after[path] != facts]
    return f"{changed[0]} was written again" if changed else ""


# The real launcher ------------------------------------------------------------------------------------------------

LAUNCHED = [sys.executable, "-m", "recipes.ddp"]
LAUNCHED += [
    "global_batch_size=32",
    "max_steps=16",
    "log_every=1",
    "optim.warmup_steps=3",
    "checkpoint.every=4",
    "threads=1",
]


@dataclass(frozen=True)
class Blow:
    """A signal to `python -m recipes.ddp`, or to one of its ranks.

    Attributes:
        rank: which of its ranks; −1: the launcher.
        steps: logged steps to wait for; −1: not even for the first one, but for `seconds`.
    """

    sign: int
    rank: int
    steps: int
    seconds: float


def draw_blows(seed: int) -> tuple[Blow, ...]:
    dice = random.Random(f"lockstep launcher {seed}")
    found = []
    for _ in range(dice.randint(1, 2)):
        sign = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        who = dice.randrange(-1, 2) if sign == signal.SIGKILL else -1
        steps = dice.randint(1, 14) if dice.random() < 0.8 else -1
        found.append(Blow(sign, who, steps, dice.uniform(0.0, 5.0)))
    return tuple(found)


def strike_launched(process: subprocess.Popen[str], out: Path, blow: Blow, logged: int) -> str:
    """Send the signal when its time has come; return what was hit, or nothing where the run was over before.

    Args:
        logged: lines in metrics.jsonl before this start.
    """
    began, metrics = time.monotonic(), out / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def due() -> bool:
        seconds = time.monotonic() - began
        return steps() >= blow.steps > 0 and steps() != logged if blow.steps > 0 else seconds > blow.seconds

    while not due():
        if process.poll() is not None or time.monotonic() - began > START_SECONDS:
            return ""
        time.sleep(0.02)
    target = process.pid
    if blow.rank >= 0:
        ranks = children(process.pid)
        if len(ranks) <= blow.rank:
            return ""
        target = ranks[blow.rank]
    with suppress(ProcessLookupError):
        os.kill(target, blow.sign)
        return f"{signal.Signals(blow.sign).name} to {'the launcher' if blow.rank < 0 else f'rank {blow.rank}'}"
    return ""


@cache
def launched_reference() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        process = as_a_shell([*LAUNCHED, f"out={out}"], out.parent)
        said = process.communicate(timeout=START_SECONDS)[0]
        assert process.returncode == 0, said
        return result_of(out)


def play_launched(blows: tuple[Blow, ...], folder: Path) -> Outcome:
    """As `play`, with the command that a user types; it may start dead ranks again by itself."""
    expected, outcome, out = launched_reference(), Outcome(), folder / "out"
    for blow in (*blows, None):
        logged = len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0
        process = as_a_shell([*LAUNCHED, f"out={out}", "max_restarts=1"], out.parent)
        hit = strike_launched(process, out, blow, logged) if blow else ""
        try:
            said = process.communicate(timeout=START_SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outcome.wrong = f"{hit or 'undisturbed'}: hung\n{process.communicate()[0]}"
            return outcome
        outcome.events.append(f"{hit or 'undisturbed'}, exit code {process.returncode}")
        outcome.counts["resumes"] += said.count("resuming from ")
        if hit and blow:
            outcome.counts["kills" if blow.sign == signal.SIGKILL else "signals"] += 1
            outcome.counts["preemptions"] += process.returncode == PREEMPTED
        deadline = time.monotonic() + 10
        while processes_in(out.parent) and time.monotonic() < deadline:
            time.sleep(0.05)
        outcome.wrong = judge_launched(hit, blow, process.returncode, said, processes_in(out.parent))
        if outcome.wrong:
            return outcome
        if run_directory.read_result(out).get("status") == "finished":
            break
    outcome.wrong = compare(result_of(out), expected, best=False)
    return outcome


def judge_launched(hit: str, blow: Blow | None, code: int, said: str, left: list[int]) -> str:
    if left:
        return f"{hit}: processes {left} are still there\n{said}"
    if blow is None or not hit:
        allowed = {0}
    elif blow.rank >= 0:
        allowed = {0}  # max_restarts=1
    elif blow.sign == signal.SIGKILL:
        allowed = {-signal.SIGKILL, 0}
    else:  # before there are ranks it ends as any process does
        allowed = {0, PREEMPTED, 128 + blow.sign, -blow.sign}
    if code not in allowed:
        return f"{hit or 'undisturbed'}: exit code {code}, not one of {sorted(allowed)}\n{said}"
    if blow and hit and blow.rank < 0 and "Traceback" in said:
        return f"{hit}: a traceback\n{said}"
    return ""


# The command ------------------------------------------------------------------------------------------------------


def fuzz(runs: int, seed: int, launcher: bool = False, say: Callable[[str], None] = print) -> Counter[str]:
    """Play the plans of `runs` seeds from `seed` on; a run that went wrong is told in full, and its folder kept."""
    counts = Counter(dict.fromkeys(("runs", "lost"), 0))
    with warm():
        for number in range(seed, seed + runs):
            folder = Path(tempfile.mkdtemp(prefix=f"lockstep-fuzz-{number}-"))
            began = time.monotonic()
            if launcher:
                what, outcome = "recipes.ddp, launched", play_launched(draw_blows(number), folder)
            else:
                plan = draw(number)
                sizes = f" then × {', '.join(map(str, plan.sizes[1:]))}" if plan.sizes else ""
                what, outcome = f"{plan.setup}{sizes}", play(plan, folder)
            counts.update(outcome.counts)
            counts["runs"] += 1
            end = "DIFFERS" if outcome.wrong else "equal"
            say(f"seed {number}: {what}: {'; '.join(outcome.events)}: {end}, {time.monotonic() - began:.1f} s")
            if outcome.wrong:
                counts["lost"] += 1
                say(f"seed {number}: {outcome.wrong}\nseed {number}: its files are in {folder}")
            else:
                shutil.rmtree(folder)
    say(", ".join(f"{count} {name}" for name, count in counts.items()))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=20, help="seeds to play")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--launcher", action="store_true", help="start `python -m recipes.ddp`, ten times as slow")
    asked = parser.parse_args()
    return 1 if fuzz(asked.runs, asked.seed, asked.launcher, lambda line: print(line, flush=True))["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
