"""Whatever a rank waits for at the end, in a save or for data: a death, a signal or the time-out ends it, in a line."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torchvision.models import resnet

from launchers import torchrun
from lockstep.checkpoint import dcp, saver
from lockstep.checkpoint.manager import CheckpointManager
from lockstep.config.run_directory import freeze
from lockstep.data import batches
from lockstep.diagnose.watchdog import Watchdog
from lockstep.distributed import environment
from lockstep.distributed.process_group import leave_in_time
from lockstep.launch.validate import validate
from lockstep.launch.worker import preload
from lockstep.loop import training_loop
from lockstep.registry import get_recipe
from lockstep.training.evaluate import Evaluator
from lockstep.utils.files import read_json
from tests.helpers.harness import compose_config, renew_threads
from tests.helpers.narrow_resnet import narrow_resnet18
from tests.helpers.processes import children, read, wait_until

HERE = socket.gethostname()
LIMIT = 6
WORDS = ("max_steps=3", "global_batch_size=24", "model.image_size=8", "eval_batch_size=360", "checkpoint.every=1")
LOOP = training_loop.TrainingLoop
# Where in the last step, and after it, rank 1 is killed: in front of which function, and what the launcher calls it.
PLACES: dict[str, tuple[Any, str, str]] = {
    "evaluating": (Evaluator, "evaluate", "evaluating"),
    "writing": (saver, "dcp_save", "saving"),
    "waiting for the save": (LOOP, "finish", "saving"),
    "gathering the weights": (training_loop, "full_state_dict", "finishing"),
    "closing": (Watchdog, "close", "finishing"),
    "leaving": (dist, "destroy_process_group", "finishing"),
}


def in_front_of(owner: Any, name: str, rank: int, work: Callable[[], None], step: int = 3) -> None:
    """Have a rank, a copy of this process, do something at a call of a function, from so many steps on."""
    real = getattr(owner, name)

    def instead(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("RANK") == str(rank) and TAKEN[0] >= step:
            work()
        return real(*args, **kwargs)

    setattr(owner, name, instead)


TAKEN = [0]  # steps, of a rank


def count_steps() -> None:
    real = LOOP.after_step

    def after_step(self: Any) -> bool:
        TAKEN[0] = self.context.step + 1
        return real(self)

    LOOP.after_step = after_step  # type: ignore[method-assign]


def stand_still() -> None:
    Path(os.environ["STOOD"]).touch()
    time.sleep(600)


def stop_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGSTOP)
    Path(os.environ["STOOD"]).touch()


def stop_itself() -> None:
    if not Path(os.environ["STOOD"]).exists():
        Path(os.environ["STOOD"]).touch()
        os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang_in(name: str, owner: Any, step: int = 3) -> Callable[[], None]:
    return lambda: in_front_of(owner, name, 0, stand_still, step)


def no_save() -> None:
    """On every rank the last checkpoint's file does not come to be on disk."""
    real = dcp.HashedFile.sync

    def sync(file: Any) -> Any:
        if "step-00000003" in str(file._file.name):
            stand_still()
        return real(file)

    dcp.HashedFile.sync = sync  # type: ignore[assignment,method-assign]


def no_disk() -> None:
    """A disk that does not answer any more: first a checkpoint waits for it, then all else that would be on it."""
    no_save()
    real = os.fsync
    os.fsync = lambda file: stand_still() if Path(os.environ["STOOD"]).exists() else real(file)  # type: ignore[assignment]


WORKER = ("data.workers=1", "max_steps=30")
SHORT = f"timeout_seconds={LIMIT}"
# recipe, ranks, further words, what goes wrong; and whether the launcher is sent SIGTERM when it has.
CASES: dict[str, tuple[str, int, tuple[str, ...], Callable[[], None], bool]] = {
    place: ("fsdp", 2, (), lambda owner=owner, name=name: in_front_of(owner, name, 1, die), False)  # type: ignore[misc]
    for place, (owner, name, _) in PLACES.items()
}
CASES |= {
    "worker": ("single", 1, (*WORKER, SHORT), lambda: in_front_of(LOOP, "before_step", 0, stop_workers, 2), False),
    "worker, asked": (
        "single",
        1,
        (*WORKER, SHORT),
        lambda: in_front_of(LOOP, "before_step", 0, stop_workers, 2),
        True,
    ),
    "evaluation's worker": (
        "single",
        1,
        ("data.workers=1", "eval_batch_size=12", SHORT),
        lambda: in_front_of(batches.BatchSource, "prepare", 0, stop_workers),
        False,
    ),
    "save": ("single", 1, (SHORT,), no_disk, True),
    "all save": ("fsdp", 2, (SHORT,), no_save, True),
    "step": ("single", 1, (SHORT,), hang_in("after_step", LOOP, step=2), True),
    "finish": ("single", 1, (SHORT,), hang_in("wait", CheckpointManager), True),
    "stopped": ("single", 1, ("max_steps=30",), lambda: in_front_of(LOOP, "before_step", 0, stop_itself, 2), True),
}


class Case:
    """One run, started in a process of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.said = folder, name, ""
        recipe_name, self.ranks, words, self.go_wrong, self.asks = CASES[name]
        recipe = get_recipe(recipe_name)
        config = compose_config(recipe, f"out={folder / 'run'}", *WORDS, *words)
        validate(config, recipe, self.ranks)
        out = freeze(config, recipe.name)
        assert out is not None
        self.out, self.target = out, recipe.target
        self.process = multiprocessing.get_context("fork").Process(target=self.launch)
        self.process.start()

    def launch(self) -> None:
        renew_threads()
        os.setsid()
        for number, name in ((1, "printed"), (2, "said")):
            os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ |= {environment.RUN_DIRECTORY: str(self.out), "STOOD": str(self.folder / "stood")}
        resnet.resnet18 = narrow_resnet18
        count_steps()
        self.go_wrong()
        variables = {environment.RUN_DIRECTORY: str(self.out), environment.LAUNCHER: str(os.getpid())}
        code = torchrun.launch(self.target, variables, nproc=self.ranks, start="fork")
        sys.stderr.flush()
        os._exit(code)

    def ask(self) -> None:
        """Send the launcher SIGTERM when the run stands still."""
        launcher = Path(f"/proc/{self.process.pid}/cmdline")
        wait_until(lambda: (self.folder / "stood").exists() or not read(launcher))  # a zombie has no command line
        if self.asks and self.process.pid:
            if self.name == "stopped":
                (rank,) = children(self.process.pid)
                wait_until(lambda: "State:\tT" in read(Path(f"/proc/{rank}/status")))
            os.kill(self.process.pid, signal.SIGTERM)

    def end(self) -> None:
        self.process.join(120)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.said = read(self.folder / "said")
        assert self.process.exitcode is not None, f"still running: {self.said}"
        self.code = self.process.exitcode
        # c10d's own log, and what a rank says that has too little of the machine.
        self.said = re.sub(r"^(\[rank\d\]:\[W|rank \d is in one phase).*\n", "", self.said, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Of all cases, side by side: most of the time each only waits."""
    preload()
    running, asking = {}, []
    for name in CASES:
        case = running[name] = Case(tmp_path_factory.mktemp(name.partition(",")[0].replace(" ", "-")), name)
        if case.asks:  # at once: what stands still ends by itself before long; and no thread, for more copies follow
            asking.append(multiprocessing.get_context("fork").Process(target=case.ask))
            asking[-1].start()
    for process in asking:
        process.join()
    for case in running.values():
        case.end()
    return running


def messages(said: str) -> int:
    return len(re.findall(r"^(?:error: |rank \d+ failed|rank \d+ was killed|rank \d+ ended)", said, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_killed_at_the_end_ends_all_with_one_message(place: str, outcomes: dict[str, Case]) -> None:
    found, phase = outcomes[place], PLACES[place][2]
    assert found.code == 137, found.said
    line = f"rank 1 was killed by SIGKILL on {HERE} in step 3 ({phase}); its last words are in ranks/1.log\n"
    assert line in found.said
    assert messages(found.said) == 1, found.said
    assert "Traceback" not in found.said


@pytest.mark.slow
@pytest.mark.parametrize("case", ["worker", "worker, asked", "evaluation's worker"])
def test_a_worker_that_sends_nothing_ends_the_run_with_a_line(case: str, outcomes: dict[str, Case]) -> None:
    found = outcomes[case]
    line = (
        f"error: rank 0 ({HERE}): its DataLoader workers (data.workers=1) have sent no batch for timeout_seconds={LIMIT}: "
        "they are stopped, or what they read from does not answer; look there, raise timeout_seconds, or set "
        "data.workers=0\n"
    )
    asked = "stopped by SIGTERM: all ranks have ended\n" if found.asks else ""
    assert found.said == line + asked
    assert messages(found.said) == 1, found.said
    assert found.code == (128 + signal.SIGTERM if found.asks else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kept", "where"),
    [
        ("save", "saved at step [12], and not what came after it", "writing a checkpoint at time.sleep(600)"),
        ("all save", "saved at step [12], and not what came after it", "writing a checkpoint at time.sleep(600)"),
        ("step", "saved at step [12], and not what came after it", "step 3, training"),
        ("finish", "saved at step 3, and not what came after it", "step 3, finishing"),
    ],
)
def test_a_signal_ends_a_run_that_stands_still(case: str, kept: str, where: str, outcomes: dict[str, Case]) -> None:
    found = outcomes[case]
    line = rf"error: SIGTERM came, and the run has stood still since, for timeout_seconds={LIMIT}: it leaves; {kept}\n"
    assert re.search(line, found.said), found.said
    assert where in found.said
    assert messages(found.said) == 1, found.said
    assert found.code == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_woken_to_heed_a_signal(outcomes: dict[str, Case]) -> None:
    found = outcomes["stopped"]
    assert found.code == os.EX_TEMPFAIL, found.said
    assert "preempted by SIGTERM after step " in read(found.folder / "printed") + found.said
    assert read_json(found.out / "result.json")["status"] == "preempted"


def test_a_backend_that_does_not_let_go_costs_no_end() -> None:
    def rank() -> None:
        leave_in_time(0.1)
        time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join(60)
    assert process.exitcode == 0
