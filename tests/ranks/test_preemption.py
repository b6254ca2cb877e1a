"""Signals and restarts with real processes, as schedulers and people send them; what is lost is nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from launchers.local import Forwarded, attempts
from lockstep.distributed.signals import Listener
from recipes import ddp
from tests.helpers import harness
from tests.helpers.harness import clean_environment, command, lines, result, train
from tests.helpers.narrow_resnet import NARROW
from tests.helpers.processes import (
    TORCHRUN,
    as_a_shell,
    children,
    free_port,
    heed_signals,
    processes_in,
    read,
    wait_until,
)

RUN = [
    "data=synthetic",
    "data.size=96",
    "data.image_size=8",
    "global_batch_size=12",
    "log_every=1",
    "checkpoint.every=5",
]
WORDS = [*RUN, "epochs=4"]  # 32 steps: long enough to be hit
DDP = ["-m", "tests.helpers.quick", "recipes.ddp", *WORDS]
# A recipe of ours whose rank 1 takes its 9th step only when it has been asked to leave: else a short run might be over
# before the signal comes.
WAITING = f"""
{NARROW}
import time
from recipes import ddp

def waits(run):
    return not run.loop.checkpoints.resumed_from and not run.listener.received

WAIT = (
    "        while run.world.rank == 1 and run.step == 8 and waits(run):\\n"
    "            time.sleep(0.01)\\n"
)
source = open(ddp.__file__).read().replace("        scaler.step(", WAIT + "        scaler.step(")
exec(compile(source, __file__, "exec"))
"""
# A recipe of ours of which rank WHO dies once, at step 12, when the checkpoint of step 10 is there: it is written
# meanwhile. The file `mark` says that it has.
DYING = f"""
{NARROW}
import os
import time
from recipes import ddp

DIE = (
    "        if run.world.rank == int(os.environ['WHO']) and run.step == 12 and not os.path.exists('mark'):\\n"
    "            while not (run.out / 'checkpoints' / 'step-00000010').exists():\\n"
    "                time.sleep(0.01)\\n"
    "            open('mark', 'w').close()\\n"
    "            os.kill(os.getpid(), 9)\\n"
)
source = open(ddp.__file__).read().replace("        scaler.step(", DIE + "        scaler.step(")
exec(compile(source, __file__, "exec"))
"""


@pytest.fixture(scope="module")
def whole(narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks compute that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(ddp.train, out, 2, *WORDS)
    return out


def assert_equal(out: Path, whole: Path) -> None:
    assert lines(out) == lines(whole)
    mine, theirs = (torch.load(run / "model.pt", weights_only=True) for run in (out, whole))
    harness.assert_equal(mine, theirs)


def reached(out: Path, step: int) -> bool:
    return f'"step": {step},' in read(out / "metrics.jsonl")


@pytest.mark.slow
def test_ctrl_c_saves_and_the_printed_command_goes_on(whole: Path, tmp_path: Path) -> None:
    """With DataLoader workers, which a signal to the whole session reaches too."""
    out = tmp_path / "run"
    (tmp_path / "ddp.py").write_text(WAITING)
    process = as_a_shell([sys.executable, "ddp.py", *WORDS, "out=run", "data.workers=1"], tmp_path)
    wait_until(lambda: reached(out, 7), 60)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert (result(out)["status"], result(out)["resumed_from"]) == ("preempted", None)
    assert f"saved at step {result(out)['steps']}" in said
    assert 7 <= result(out)["steps"] < 32
    again = said.partition("to resume: python ")[2].splitlines()[0].split()
    done = command(*again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(out)["resumed_from"] == f"checkpoints/step-{result_step(done.stdout):08d}"
    assert_equal(out, whole)
    assert command(*again, cwd=tmp_path).stdout.startswith(
        "out=run: this run has finished, by epochs=4; to train on, start another from it: resume=run out=NEW, with optim"
    )


@pytest.mark.soak
def test_the_printed_command_resumes_a_sweep(tmp_path: Path) -> None:
    """What has finished is not trained again; and what a finished run is told to do trains on."""
    (tmp_path / "ddp.py").write_text(WAITING)
    words = ["-m", "epochs=1,2,1", *RUN]  # the second waits in its step 9
    process = as_a_shell([sys.executable, "ddp.py", *words], tmp_path)
    wait_until(lambda: any(reached(out, 7) for out in tmp_path.glob("outputs/*/*/1")), 90)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    (sweep,) = tmp_path.glob("outputs/*/*")
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1"]
    rows = [line.split() for line in said[said.rindex("3 runs in ") :].splitlines()[3:]]
    ends = {row[0]: " ".join(row[2:]) for row in rows if row and row[0] in "012"}
    assert re.search("finished$", ends["0"])
    assert re.search(r"stopped at step \d+$", ends["1"])
    assert ends["2"] == "not started"
    first = (sweep / "0" / "result.json").read_bytes()
    again = said.partition("to resume: python ")[2].splitlines()[0].split()
    assert again[-1] == f"out={sweep.relative_to(tmp_path)}"
    done = command(*again, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"{sweep.name}/0: this run has finished, by epochs=1; to train on, start another from it" in done.stdout
    assert (sweep / "0" / "result.json").read_bytes() == first
    assert [result(sweep / point)["status"] for point in "01"] == ["finished"] * 2
    assert result(sweep / "2")["status"] == "finished"
    assert str(result(sweep / "1")["resumed_from"]).startswith("checkpoints/")
    source, told = f"outputs/{sweep.parent.name}/{sweep.name}/0", ("ddp.py", *RUN)
    done = command(*told, f"resume={source}", "out=NEW", "optim.schedule=constant", "epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "NEW")["epochs"] == 2


def result_step(said: str) -> int:
    return int(said.partition(", at step ")[2].partition(" ")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "target"),
    [(signal.SIGHUP, "rank 1"), (signal.SIGTERM, "launcher")],
)
def test_a_scheduler_s_signal_to_one_process_preempts_all(sign: int, target: str, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "ddp.py").write_text(WAITING)
    process = as_a_shell([sys.executable, "ddp.py", *WORDS, "out=run"], tmp_path)
    wait_until(lambda: reached(out, 3), 60)
    os.kill(process.pid if target == "launcher" else children(process.pid)[1], sign)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    assert f"preempted by {signal.Signals(sign).name}" in said
    assert result(out)["status"] == "preempted"
    assert command(*DDP, "out=run", cwd=tmp_path).returncode == 0
    assert_equal(out, whole)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_that_hangs(tmp_path: Path) -> None:
    """Rank 1 stands still, so no step boundary comes at which the ranks could agree."""
    out = tmp_path / "run"
    process = as_a_shell([sys.executable, *DDP, "out=run", "epochs=1000"], tmp_path)
    wait_until(lambda: reached(out, 3), 60)
    stopped, over = children(process.pid)[1], threading.Event()

    def keep_stopped() -> None:  # the launcher wakes it up, for it to heed the signal
        with contextlib.suppress(ProcessLookupError):
            while not over.wait(0.001):
                os.kill(stopped, signal.SIGSTOP)

    threading.Thread(target=keep_stopped).start()
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert any("leaving after this step" in line for line in iter(process.stdout.readline, ""))  # the first has come
    time.sleep(2)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=20)
    finally:
        over.set()
    assert process.returncode == 130
    wait_until(lambda: not processes_in(tmp_path), 10)


def heed(number: int, launched: bool, said: str) -> None:
    """A rank that a signal reaches twice."""
    heed_signals()
    listener = Listener(lambda words: Path(said).write_text(words), launched)
    listener.training = True
    os.kill(os.getpid(), number)
    wait_until(lambda: listener.received)
    time.sleep(0.5)
    os.kill(os.getpid(), number)
    time.sleep(0.5 if launched or number != signal.SIGINT else 20)
    os._exit(7)


@pytest.mark.parametrize(
    ("number", "launched", "code"),
    [
        (signal.SIGINT, True, 7),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 7),
        (signal.SIGHUP, False, 7),  # the terminal of a rank that was started by hand is closed
    ],
)
def test_one_ctrl_c_that_comes_twice_is_one(number: int, launched: bool, code: int, tmp_path: Path) -> None:
    """From the terminal, and from the launcher half a second later. Of other signals nothing is said at once."""
    said = tmp_path / "said"
    rank = multiprocessing.get_context("fork").Process(target=heed, args=(number, launched, str(said)))
    rank.start()
    rank.join(20)
    assert rank.exitcode == code
    assert read(said).startswith("SIGINT: leaving after this step" if number == signal.SIGINT else "")
    assert said.exists() == (number == signal.SIGINT)


def test_nohup_stays_nohup() -> None:
    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        listener = Listener(lambda words: None)
        os.kill(os.getpid(), signal.SIGHUP)  # before there is a step to wait for, others end the rank at once
        time.sleep(0.3)
        listener.close()
        os._exit(7 if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else 1)

    rank = multiprocessing.get_context("fork").Process(target=begin)
    rank.start()
    rank.join(20)
    assert rank.exitcode == 7


@pytest.mark.parametrize(("launched", "code"), [(False, 128 + signal.SIGTERM), (True, 75)])
def test_a_signal_after_the_ranks_end_leaves_them_their_exit_code(launched: bool, code: int) -> None:
    def run() -> int:
        Forwarded.launched = launched
        os.kill(os.getpid(), signal.SIGTERM)
        return 75

    assert attempts(run, 0, list) == code


def test_a_rank_that_dies_is_started_again_from_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "ddp.py").write_text(DYING)
    done = command("ddp.py", *WORDS, "out=run", "max_restarts=2", cwd=tmp_path, WHO="1")
    assert done.returncode == 0, done.stderr
    assert "rank 1 was killed by SIGKILL" in done.stderr
    assert "restart 1 of max_restarts=2" in done.stderr
    assert result(tmp_path / "run")["resumed_from"] == "checkpoints/step-00000010"
    assert_equal(tmp_path / "run", whole)


@pytest.mark.soak
def test_torchrun_restarts_in_the_same_directory(whole: Path, tmp_path: Path) -> None:
    """Without out=, whose default name is the time: the restarted ranks must find the first ones' folder."""
    (tmp_path / "ddp.py").write_text(DYING)
    words = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", "--max-restarts=1", "ddp.py", *WORDS]
    done = subprocess.run(
        words, cwd=tmp_path, env=clean_environment() | {"WHO": "0"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "outputs" / "ddp").iterdir()
    assert result(out)["resumed_from"] == "checkpoints/step-00000010"
    assert_equal(out, whole)


@pytest.mark.slow
def test_torchrun_does_not_restart_ranks_that_were_asked_to_leave(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    by = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", "--max-restarts=3"]
    process = as_a_shell([*by, *DDP, "out=run"], tmp_path)
    wait_until(lambda: reached(out, 3), 60)
    os.kill(children(process.pid)[0], signal.SIGUSR2)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert result(out)["status"] == "preempted"
    assert command(*DDP, "out=run", cwd=tmp_path).returncode == 0
    assert_equal(out, whole)


@pytest.mark.soak  # agents take their time to notice each other
def test_elastic_agents_grow_and_shrink(narrow: None, tmp_path: Path) -> None:
    """One node, then two, then one again, with local BatchNorm-free fp64: the losses of one process."""
    # Killed while the ranks make a group, nobody but the time limit tells the other one.
    words = [*RUN, "epochs=8", "precision=fp64", "model.norm=group", "timeout_seconds=40", "out=run"]
    train(ddp.train, tmp_path / "whole", 1, *words[:-1])
    agent = [
        *TORCHRUN,
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=grow",
        "--max-restarts=9",
    ]
    agent += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    agent += ["--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3", *DDP[:3]]
    environment = clean_environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    out = tmp_path / "run"
    log = (tmp_path / "log").open("w")

    def join() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*agent, *words], cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def worlds() -> list[str]:
        return [line.split()[2] for line in read(out / "ranks" / "0.log").splitlines() if " on 1 host" in line]

    first = join()
    wait_until(lambda: reached(out, 3), 60)
    second = join()
    wait_until(lambda: worlds()[-1:] == ["2"] or first.poll() is not None, 90)
    grown = len(lines(out))
    wait_until(lambda: len(lines(out)) > grown + 3 or first.poll() is not None, 90)
    for pid in (second.pid, *children(second.pid)):  # a node that loses power takes the agent and its rank
        os.kill(pid, signal.SIGKILL)
    assert first.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-3000:]
    assert worlds()[0] == "1"
    assert "2" in worlds()
    assert worlds()[-1] == "1"
    mine, theirs = ([line["loss"] for line in lines(run) if "loss" in line] for run in (out, tmp_path / "whole"))
    assert len(mine) == len(theirs) == 64
    assert mine == pytest.approx(theirs, rel=1e-6)
