"""A start of a run: forked ranks, what befalls them, and how they ended."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models import resnet

from lockstep.config import run_directory
from lockstep.config.run_directory import freeze
from lockstep.data import datasets
from lockstep.distributed import environment, signals
from lockstep.distributed.environment import Place
from lockstep.distributed.signals import PREEMPTED, SIGNALS, Listener
from lockstep.launch import worker
from lockstep.launch.validate import validate
from lockstep.recipe import Recipe
from tests.helpers import overflowing_scaler as overflow
from tests.helpers.fuzz.plans import COPIES, IMAGES, Fault, Setup
from tests.helpers.fuzz.strikes import strike_at_call
from tests.helpers.harness import compose_config, preload, renew_threads
from tests.helpers.narrow_resnet import NarrowResNet

START_SECONDS = 90  # a start that logs nothing for longer hangs; an undisturbed one takes one or two
UNDISTURBED = Fault()
LEAVE_SECONDS = 15  # so long a rank may go on after another one has died and it was told to stop


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


def start(setup: Setup, out: Path, fault: Fault = UNDISTURBED, typical_seconds: float = 1.0) -> Ended:
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
    stop, kill, told = math.inf, began + START_SECONDS, False
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
            stop, kill, told = math.inf, min(kill, now + LEAVE_SECONDS), True
        if running and now >= kill and not told:  # on a busy machine it may only be slow
            kill = now + max(0.0, START_SECONDS - seconds_since_a_step(out))
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


def seconds_since_a_step(out: Path) -> float:
    """How long ago the last step was logged; infinite where none was."""
    log = out / "metrics.jsonl"
    return time.time() - log.stat().st_mtime if log.exists() else math.inf


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
