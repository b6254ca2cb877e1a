"""On a real cluster (slurm/box): the same run as on one machine, and whatever Slurm does to it, nothing lost."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.recipe import Recipe
from recipes import ddp
from tests.helpers.gpus import emulated
from tests.helpers.harness import ROOT, assert_equal, command, lines, train, verify_rows
from tests.helpers.processes import wait_until
from tests.helpers.slurm_box import Box, Command

DIGITS = ["global_batch_size=24", "max_steps=2", "log_every=1", "threads=1"]
TINY = ["global_batch_size=12", "data=synthetic", "data.size=48", "data.image_size=8", "epochs=100", "eval_every=0"]
TINY += ["log_every=1", "threads=1"]
SHORT = [*TINY, "max_steps=2"]
LONG = [*TINY, "max_steps=14"]  # with HOW=slow its first life is never over by itself
LATER = "+cluster.sbatch.begin=now+1hour"  # the job waits in the queue
HOOK = """
import os, time

def hook(run):
    how = os.environ.get("HOW", "")
    if how == "slow" and run.step >= 4 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(1)
        until = time.monotonic() + 60
        while run.step == 12 and not run.listener.received and time.monotonic() < until:
            time.sleep(0.1)
    if run.world.rank == 1 and run.step == 1:
        if how == "raise":
            raise KeyError("the cause")
        if how == "kill":
            os.kill(os.getpid(), 9)
        if how == "sleep":
            time.sleep(600)
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box(nodes=2, gpu_type="a100") as box:
        yield box


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds ddp.py: recipes.ddp itself, with a hook in its loop that does what the variable HOW says."""
    code, last = (ROOT / "recipes" / "ddp.py").read_text(), "        optimizer.zero_grad()\n"
    assert last in code
    (tmp_path / "ddp.py").write_text(code.replace(last, last + "        __import__('hook').hook(run)\n"))
    (tmp_path / "hook.py").write_text(HOOK)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two ranks of this machine make of LONG."""
    return train(ddp.train, tmp_path_factory.mktemp("reference") / "run", 2, *LONG)


def on_this_machine(tmp_path: Path, ranks: int, *words: str) -> dict[str, torch.Tensor]:
    return train(ddp.train, tmp_path / "reference", ranks, *words)


def start(box: Box, folder: Path, *words: str, how: str = "") -> Command:
    """Submit and follow, as a person would; what is said can be read from `stdout`."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return box.popen(sys.executable, *words, "+cluster=slurm", cwd=folder, env={"HOW": how}, **pipes)


def submit(box: Box, folder: Path, *words: str, how: str = "") -> str:
    """Submit, do not follow; return the job's id."""
    done = box.run(sys.executable, *words, "+cluster=slurm", "cluster.follow=false", cwd=folder, env={"HOW": how})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def end(process: Command, seconds: float = 200) -> tuple[int, str]:
    """(exit code, what was said) of a followed job."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def until(process: Command, words: str) -> str:
    """Read what is said up to a line with these words."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was never said:\n{said}")


def wait_for_steps(out: Path, steps: int, seconds: float = 120) -> None:
    deadline, path = time.monotonic() + seconds, out / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < steps:
        logs = "\n".join(log.read_text() for log in out.glob("slurm/*/*.out"))
        assert time.monotonic() < deadline, f"no step {steps} in {path}\n{logs}"
        time.sleep(0.1)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model.pt", weights_only=True)


def log_of(folder: Path, job: str) -> str:
    return next(folder.rglob(f"{job}_0_log.out")).read_text()


# One command, one result ------------------------------------------------------------------------------------------


def test_two_nodes_of_two_ranks_train_what_this_machine_trains(box: Box, tmp_path: Path) -> None:
    words = ["-m", "recipes.ddp", *DIGITS, "out=run", "cluster.nodes=2", "cluster.tasks_per_node=2"]
    words += ["cluster.setup=['echo set up on $(hostname)']"]
    words += ["cluster.container=env", f"cluster.python={sys.executable}"]  # `env` too runs the command after it
    code, said = end(start(box, tmp_path, *words))
    assert code == 0, said
    job = said.split()[1]
    for word in (f"job {job} submitted to partition low: 2 nodes, 4 ranks", "run/slurm/1/", f"scancel {job}"):
        assert word in said
    assert "set up on node1\n" in said
    order = [said.index(words) for words in (": running on node[1-2]", "ddp finished", ": finished")]
    assert order == sorted(order), said
    assert "cluster: null" in (tmp_path / "run" / "config.yaml").read_text(), "it can be continued anywhere"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["hosts"] == ["node1"] * 2 + ["node2"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "one run directory, and nothing beside it"
    assert_equal(weights(tmp_path / "run"), on_this_machine(tmp_path, 4, *DIGITS))


@pytest.mark.soak
@pytest.mark.parametrize("named", ["../project/tabular.py:Diabetes", "package.tabular:Diabetes"])
def test_an_own_task_is_found_from_another_folder(named: str, box: Box, tmp_path: Path) -> None:
    """A file by a relative path, and a module of a package in the current folder, on two nodes."""
    for folder in (tmp_path / "project", tmp_path / "here" / "package"):
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "examples" / "tabular.py", folder)
    words = ["global_batch_size=30", "task.hidden=8", "max_steps=3", "log_every=1", "threads=1"]
    job = ["-m", "recipes.ddp", f"task={named}", *words, "out=run", "cluster.nodes=2"]
    code, said = end(start(box, tmp_path / "here", *job))
    assert code == 0, said
    here = [f"task={ROOT / 'examples' / 'tabular.py'}:Diabetes", *words]
    assert_equal(weights(tmp_path / "here" / "run"), on_this_machine(tmp_path, 2, *here))
    assert lines(tmp_path / "here" / "run") == lines(tmp_path / "reference")


ENGINES: dict[str, list[str]] = {
    name: [] for name in ("deepspeed_zero", "fsdp", "lightning_fabric", "lightning_trainer")
}
ENGINES |= {"transfer_learning": ["weights=random"]}


@pytest.mark.slow
@pytest.mark.soak_for("deepspeed_zero", "lightning_fabric", "lightning_trainer", "transfer_learning")
@pytest.mark.parametrize("name", ENGINES)
def test_engines_on_the_cluster(name: str, box: Box, tmp_path: Path) -> None:
    """Each has a view of its own of what a Slurm job's variables mean; here it must not."""
    words = [*SHORT, *ENGINES[name]]
    code, said = end(start(box, tmp_path, "-m", f"recipes.{name}", *words, "out=run", "cluster.nodes=2"))
    assert code == 0, said
    reference: Recipe = importlib.import_module(f"recipes.{name}").train
    assert_equal(weights(tmp_path / "run"), train(reference, tmp_path / "reference", 2, *words))


LANGUAGE = ["task=language", "global_batch_size=8", "max_steps=2", "eval_every=0", "log_every=1", "threads=1"]
SHARED = {  # (tasks per node, further words): layers, sequences, experts and stages that two nodes share
    "tensor_parallel": (1, []),
    "context_parallel": (1, []),
    "expert_parallel": (1, ["task.experts=4"]),
    "parallel_mesh": (2, ["pipeline=2", "micro_batches=2"]),
    "zero1": (1, []),
    "comm_hooks": (1, []),
    "local_sgd": (1, ["period=2"]),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", SHARED)
def test_nodes_share_a_model(name: str, box: Box, tmp_path: Path) -> None:
    (per_node, own), words = SHARED[name], ["out=run", "cluster.nodes=2"]
    words += [f"cluster.tasks_per_node={per_node}", *LANGUAGE, *own]
    code, said = end(start(box, tmp_path, "-m", f"recipes.{name}", *words))
    assert code == 0, said
    reference: Recipe = importlib.import_module(f"recipes.{name}").train
    assert_equal(weights(tmp_path / "run"), train(reference, tmp_path / "reference", 2 * per_node, *LANGUAGE, *own))


@pytest.mark.slow
def test_torchrun_in_a_batch_job_trains_the_same(box: Box, tmp_path: Path) -> None:
    """Its variables win over Slurm's, which count one task a node."""
    script = str(ROOT / "slurm" / "torchrun.sbatch")
    job = box.sbatch(script, "ddp", *SHORT, cwd=tmp_path, env={"PYTHON": sys.executable})
    box.wait_for_state(job, "COMPLETED", 120)
    out = tmp_path / "outputs" / "ddp" / f"job-{job}"
    assert_equal(weights(out), on_this_machine(tmp_path, 4, *SHORT))


@pytest.mark.slow
def test_a_sweep_is_an_array(box: Box, tmp_path: Path) -> None:
    words = ["-m", "recipes.single", "-m", "optim.lr=0.01,0.02", *TINY, "max_steps=2", "out=sweep"]
    code, said = end(start(box, tmp_path, *words))
    assert code == 0, said
    for point, rate in (("0", "lr: 0.01"), ("1", "lr: 0.02")):
        assert rate in (tmp_path / "sweep" / point / "config.yaml").read_text()
        assert json.loads((tmp_path / "sweep" / point / "result.json").read_text())["steps"] == 2
        assert f"_{point}: finished · optim.{rate.replace(': ', '=')}\n" in said
        line = rf"(?m)^  (\d+_{point}) +optim.{rate.replace(': ', '=')}  sweep/{point}$"
        job = re.search(line, said)
        assert job, said
        log = log_of(tmp_path, job[1])
        assert f"job {job[1]} on node" in log
        assert f" · optim.{rate.replace(': ', '=')}\n" in log
    table = [" ".join(line.split()) for line in said[said.rindex("2 runs in sweep") :].splitlines()]
    losses = [json.loads((tmp_path / "sweep" / point / "result.json").read_text())["eval_loss"] for point in "01"]
    assert table[-2:] == [
        f"{point} optim.lr={rate} {loss:.4g} {accuracy}"
        for point, rate, loss in zip("01", (0.01, 0.02), losses, strict=True)
        for accuracy in [table[-2 + int(point)].split()[-1]]
    ]


@pytest.mark.soak
def test_last_continues_on_the_cluster_what_was_killed_here(box: Box, tmp_path: Path) -> None:
    """As it was typed, without `out`: the submitting process finds the run, and says so where it is not asked for."""
    words = ["-m", "recipes.ddp", *TINY, "max_steps=3", "checkpoint.every=1"]
    assert command(*words, "nproc=2", cwd=tmp_path).returncode == 0
    (out,) = (tmp_path / "outputs" / "ddp").iterdir()
    finished = weights(out)
    shutil.rmtree(out / "checkpoints" / "step-00000003")
    (out / "checkpoints" / "LATEST").write_text("step-00000002\n")
    for name in ("result.json", "model.pt"):
        (out / name).unlink()
    code, said = end(start(box, tmp_path, *words, "cluster.tasks_per_node=2", "cluster.dry_run=true"))
    assert code == 0, said
    assert "an unfinished run of these settings is at step 2 of 3: add resume=last\n" in said
    code, said = end(start(box, tmp_path, *words, "cluster.tasks_per_node=2", "resume=last"))
    assert code == 0, said
    assert f"resuming from outputs/ddp/{out.name}/checkpoints/step-00000002, at step 2 of 3" in said
    assert list((tmp_path / "outputs" / "ddp").iterdir()) == [out]
    assert_equal(weights(out), finished)


@pytest.mark.slow
def test_plain_srun_needs_no_launcher(box: Box, tmp_path: Path) -> None:
    words = ["srun", "--nodes=2", sys.executable, "-m", "recipes.ddp"]
    done = box.run(*words, *SHORT, "out=run", cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_equal(weights(tmp_path / "run"), on_this_machine(tmp_path, 2, *SHORT))


@pytest.mark.soak
def test_lightning_takes_over_what_srun_has_started(box: Box, tmp_path: Path) -> None:
    """Two steps of one job at once, one off its first node; it is called bash, which Lightning mistrusts."""
    run = f"{sys.executable} -m recipes.ddp +cluster=lightning {' '.join(SHORT)}"
    one, two = (f"srun --nodes=1 --nodelist={node} --ntasks=2 {run} out={node}" for node in ("node1", "node2"))
    words = ["--nodes=2", "--ntasks-per-node=4", "--job-name=bash", "--output=log", f"--wrap={one} & {two}; wait"]
    job = box.sbatch(*words, cwd=tmp_path)
    box.wait_for_state(job, "COMPLETED", 120)
    reference = on_this_machine(tmp_path, 2, *SHORT)
    for node in ("node1", "node2"):
        assert json.loads((tmp_path / node / "environment.json").read_text())["hosts"] == [node] * 2
        assert "cluster: null" in (tmp_path / node / "config.yaml").read_text()
        assert_equal(weights(tmp_path / node), reference)


@pytest.mark.soak
def test_in_lightning_s_job_signals_have_one_owner(
    box: Box, folder: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    words = [sys.executable, "ddp.py", *LONG, "out=run", "+cluster=lightning_slurm", "cluster.nodes=2"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = box.popen(*words, cwd=folder, env={"HOW": "slow"}, **pipes)
    job = until(process, "submitted").split()[1]
    wait_for_steps(folder / "run", 4)
    box.run("scancel", "--signal=USR1", job)
    box.start_again_now(job)
    code, said = end(process)
    assert code == 0, said
    assert box.job(job)["Restarts"] == "1", "nobody else has requeued it"
    assert "SIGUSR1: leaving" in said
    assert_equal(weights(folder / "run"), uninterrupted)


# Refused ----------------------------------------------------------------------------------------------------------


REFUSED = {
    "bacth_size=3": ["unknown key bacth_size", "did you mean global_batch_size?"],
    "global_batch_size=8,33 -m": ["global_batch_size=33", "2 ranks"],
    "cluster.partition=nowhere": ["cluster.partition=nowhere", "there is high, low"],
    "cluster.gpus_per_node=3 cluster.tasks_per_node=1 device=cpu": ["cluster.gpus_per_node=3", "gpu:a100:2"],
    "cluster.gpus_per_node=h100:2": ["cluster.gpus_per_node=h100:2: sbatch refuses the job", "gpu:a100:2"],
    "cluster.gpus_per_node=a100:3 cluster.dry_run=true": ["cluster.gpus_per_node=a100:3: sbatch refuses", "gpu:a100:2"],
    "+cluster.sbatch.nonsense=1": ["sbatch refuses the job", "--nonsense"],
}


@pytest.mark.slow
def test_what_is_wrong_never_reaches_the_queue(box: Box, tmp_path: Path) -> None:
    """One process for all of them: each forks from one that has imported everything."""
    script = """
import os, shlex, sys
from recipes import ddp
for words in sys.argv[1:]:
    if not os.fork():
        sys.argv = ["ddp", "+cluster=slurm", "cluster.nodes=2", "data=synthetic", *words.split()]
        ddp.train.main()
    print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
"""
    done = box.run(sys.executable, "-c", script, *REFUSED, cwd=tmp_path, timeout=180)
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["2"] * len(REFUSED), done.stderr
    for line, parts in zip(lines[::2], REFUSED.values(), strict=True):
        assert line.startswith("error: ")
        assert all(part in line for part in parts), line
    assert not {"PENDING", "RUNNING"} & set(box.queue().values())
    assert not list(tmp_path.rglob("ranks")), "no run directory is left behind"


@pytest.mark.slow
def test_a_dry_run_shows_what_would_be_submitted_and_makes_nothing(box: Box, tmp_path: Path) -> None:
    words = ["-m", "recipes.ddp", "+cluster=slurm", "cluster.nodes=2", *SHORT, "out=sweep/of", "cluster.dry_run=true"]
    words += ["cluster.name=mine", "-m", "optim.lr=0.01,0.02"]
    before = box.queue()
    done = box.run(sys.executable, *words, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr
    for line in ("#!/bin/bash", "#SBATCH --job-name=mine", "#SBATCH --nodes=2", "#SBATCH --array=0-1%2"):
        assert f"{line}\n" in done.stdout
    assert "# run     sweep/of/0 · optim.lr=0.01\n# run     sweep/of/1 · optim.lr=0.02\n" in done.stdout
    assert re.search(r"# ranks   srun --nodes=2 --ntasks=2 .* -m lockstep.launchers.slurm recipes.ddp\n", done.stdout)
    assert re.search(r"# sbatch  Job \d+ to start at \S+ using .* on nodes node\[1-2\] in partition low\n", done.stdout)
    assert (list(tmp_path.iterdir()), box.queue()) == ([], before)


@pytest.mark.slow
def test_without_slurm_it_says_where_to_find_one(tmp_path: Path) -> None:
    done = command("-m", "recipes.ddp", "+cluster=slurm", cwd=tmp_path, PATH="/nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no sbatch on this machine" in done.stderr
    assert "slurm/box" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Following --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_scancel_ends_the_following(box: Box, tmp_path: Path) -> None:
    one = start(box, tmp_path, "-m", "recipes.ddp", *TINY, "global_batch_size=8", "out=one", LATER)
    two = start(box, tmp_path, "-m", "recipes.ddp", *TINY, "global_batch_size=8", "out=two", LATER)
    job = until(one, "queued (BeginTime)").split()[1]
    one.send_signal(signal.SIGINT)
    code, said = end(one)
    assert (code, box.queue()[job]) == (130, "PENDING"), said
    assert f"scancel {job}" in said
    other = until(two, "queued (BeginTime)").split()[1]
    box.run("scancel", job, other)
    code, said = end(two)
    assert f"job {other}: cancelled, exit code 1" in said
    assert code == 1


# What breaks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_exception_ends_the_job_and_is_shown_once(box: Box, folder: Path) -> None:
    code, said = end(start(box, folder, "ddp.py", *LONG, "out=run", "cluster.nodes=2", how="raise"))
    assert code == 1, said
    assert "rank 1 failed on " in said
    assert said.count("Traceback") == said.count("KeyError: 'the cause'") == 1, said
    job = box.job(said.split()[1])
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_once(box: Box, folder: Path) -> None:
    """Srun's tasks share one console, and no agent stands between."""
    words = ["ddp.py", *LONG, "timeout_seconds=15", "out=run", "cluster.nodes=2"]
    code, said = end(start(box, folder, *words, how="sleep"))
    assert code == 1, said
    assert said.count("error: rank 1 (node2) has not reached all_reduce") == said.count("stack traces") == 1, said
    assert "  rank 1 (node2): step 2, training, time.sleep(600) (hook.py:" in said


@pytest.mark.slow
def test_a_lost_network_is_named_before_slurm_misses_the_node(folder: Path) -> None:
    with Box(nodes=2, slurmd_timeout=120) as box:
        words = ["ddp.py", *LONG, "timeout_seconds=8", "out=run", "cluster.nodes=2"]
        job = submit(box, folder, *words, how="slow")
        wait_for_steps(folder / "run", 6)
        box.steer("node", "cut", "node2")
        log = folder / "run" / "ranks" / "0.log"
        wait_until(lambda: "error: " in log.read_text(), 40)
        box.run("scancel", job)
    # Its interface has no link any more, which it says over the shared files.
    assert re.search(
        r"error: rank 1 \(node2\) lost the network in step \d+ \(\S+.*\): eth0 has no link", log.read_text()
    )


@pytest.mark.slow
@pytest.mark.soak_for("0")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_is_named_and_started_again_only_if_asked(box: Box, folder: Path, restarts: int) -> None:
    words = ["ddp.py", *LONG, "out=run", "cluster.nodes=2", f"max_restarts={restarts}"]
    code, said = end(start(box, folder, *words, how="kill"))
    assert code == 137, said
    assert said.count("node2: task 1: Killed") == restarts + 1, said
    assert said.count("restart 1 of max_restarts=1") == restarts
    job = box.job(said.split()[1])
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")


def test_a_rank_that_never_comes_is_named_with_its_node(box: Box, tmp_path: Path) -> None:
    rank = 'test $SLURM_PROCID = 1 && exec sleep 60; exec "$@"'
    words = [sys.executable, "-m", "recipes.ddp", *TINY, "timeout_seconds=3"]
    done = box.run("srun", "--nodes=2", "--kill-on-bad-exit=1", "sh", "-c", rank, "sh", *words, cwd=tmp_path)
    assert "error: rank 1 (node2) of 2 did not join within timeout_seconds=3" in done.stderr
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


# Nothing lost -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preempted_it_saves_and_comes_back(box: Box, folder: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    process = start(box, folder, "ddp.py", *LONG, "out=run", "cluster.nodes=2", how="slow")
    job = until(process, "submitted").split()[1]
    wait_for_steps(folder / "run", 4)
    box.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    box.start_again_now(job)
    code, said = end(process)
    assert code == 0, said
    for words in ("SIGUSR1: leaving", "requeue 1 of at most 20", "resuming from", f"job {job}: finished (requeue 1)"):
        assert words in said
    assert "srun" not in said, said
    assert "error" not in said, said
    assert_equal(weights(folder / "run"), uninterrupted)


@pytest.mark.slow
def test_a_lost_node_costs_only_the_steps_since_the_last_checkpoint(
    box: Box, folder: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    words = ["ddp.py", *LONG, "checkpoint.every=4", "out=run", "cluster.nodes=2"]
    job = submit(box, folder, *words, how="slow")
    wait_for_steps(folder / "run", 5)
    box.steer("node", "down", "node2")
    box.wait_for_state(job, "PENDING")
    box.steer("node", "mend", "node2")
    box.start_again_now(job)
    box.wait_for_state(job, "COMPLETED", 120, restarts=1)
    assert_equal(weights(folder / "run"), uninterrupted)
    assert "resuming from" in log_of(folder, job)


@pytest.mark.slow
def test_requeues_are_bounded(box: Box, folder: Path) -> None:
    words = ["ddp.py", *LONG, "out=run", "cluster.nodes=2", "cluster.max_requeues=0"]
    process = start(box, folder, *words, how="slow")
    job = until(process, "submitted").split()[1]
    wait_for_steps(folder / "run", 4)
    box.run("scancel", "--signal=USR1", job)
    code, said = end(process)
    assert code == 75, said
    assert "asked to leave, and saved; not requeued: cluster.max_requeues=0 is reached" in said
    assert box.job(job)["Restarts"] == "0"
    assert "saved at step" in said


@pytest.mark.soak
def test_a_batch_script_s_job_is_requeued_by_hand(
    box: Box, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    words = ["--ntasks-per-node=1", str(ROOT / "slurm" / "srun.sbatch"), "ddp", *LONG]
    job = box.sbatch(*words, cwd=tmp_path, env={"PYTHON": sys.executable})
    out = tmp_path / "outputs" / "ddp" / f"job-{job}"
    wait_for_steps(out, 2)
    box.run("scancel", "--signal=USR1", job)
    box.start_again_now(job)
    box.wait_for_state(job, "COMPLETED", 120, restarts=1)
    assert_equal(weights(out), uninterrupted)
    said = (tmp_path / f"lockstep-{job}.log").read_text()
    assert "saved: requeue 1 of at most 20" in said
    assert "srun" not in said, said


@pytest.mark.soak
@pytest.mark.parametrize("node", ["node1", "node2"])  # rank 0's, and another one's
def test_a_node_that_is_cut_off_is_left_behind(node: str, folder: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    with Box(nodes=3, slurmd_timeout=5) as box:
        assert not box.loopback, "a cut needs network namespaces"
        words = ["ddp.py", *LONG, "checkpoint.every=4", "timeout_seconds=20", "out=run", "cluster.nodes=2"]
        job = submit(box, folder, *words, how="slow")
        wait_for_steps(folder / "run", 6)
        box.steer("node", "cut", node)
        box.wait_for_state(job, "RUNNING", 120, restarts=1)
        assert node not in box.job(job)["NodeList"]
        box.wait_for_state(job, "COMPLETED", 120, restarts=1)
    assert_equal(weights(folder / "run"), uninterrupted)


@pytest.mark.soak
@pytest.mark.timeout(700)  # a busy machine takes fewer steps in each minute that the job is given
def test_before_its_time_limit_a_job_saves_and_comes_back(box: Box, folder: Path, tmp_path: Path) -> None:
    words = [*TINY, "max_steps=80"]
    code, said = end(
        start(box, folder, "ddp.py", *words, "out=run", "cluster.nodes=2", "cluster.time_minutes=1", how="slow"),
        seconds=500,
    )
    assert code == 0, said
    assert "SIGUSR1: leaving" in said
    assert "requeue 1 of at most 20" in said
    assert_equal(weights(folder / "run"), on_this_machine(tmp_path, 2, *words))


@pytest.mark.soak
def test_a_restart_of_slurmctld_goes_unnoticed(box: Box, folder: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    process = start(box, folder, "ddp.py", *LONG, "out=run", "cluster.nodes=2", how="slow")
    wait_for_steps(folder / "run", 4)
    box.steer("ctl", "restart")
    code, said = end(process)
    assert code == 0, said
    assert_equal(weights(folder / "run"), uninterrupted)


@pytest.mark.soak
def test_four_nodes_of_two_ranks(tmp_path: Path) -> None:
    words = [*SHORT, "global_batch_size=16"]
    with Box(nodes=4) as box:
        shape = ["cluster.nodes=4", "cluster.tasks_per_node=2"]
        code, said = end(start(box, tmp_path, "-m", "recipes.ddp", *words, "out=run", *shape))
    assert code == 0, said
    assert_equal(weights(tmp_path / "run"), on_this_machine(tmp_path, 8, *words))


@pytest.mark.soak
def test_the_tools_run_there_too(box: Box, tmp_path: Path) -> None:
    verify = ["-m", "recipes.verify", "recipes=[ddp]", "precision=fp64", "max_steps=2", "cluster.nodes=2"]
    code, said = end(start(box, tmp_path, *verify, "out=verify"))
    assert code == 0, said
    assert {row["verdict"] for row in verify_rows(tmp_path / "verify")} == {"equal"}
    code, said = end(start(box, tmp_path, *verify, "out=later", "against=verify/verify.json"))
    assert code == 0, said
    record = json.loads((tmp_path / "later" / "verify.json").read_text())
    assert sorted(record["hosts"]) == ["node1", "node2"]
    assert (record["against"]["facts"], record["against"]["rows"]) == ([], [])
    assert "the machine, its versions and what is trained are the same" in said
    code, said = end(
        start(box, tmp_path, "-m", "recipes.compare", "recipes=[single]", "rounds=1", *SHORT, "out=compare")
    )
    assert code == 0, said
    assert (tmp_path / "compare" / "compare.json").is_file()


def test_tasks_are_found_on_uneven_nodes(box: Box) -> None:
    script = (
        "import os; from lockstep.distributed.environment import nodes_of_tasks; print(*nodes_of_tasks(os.environ))"
    )
    env = {"SLURM_STEP_NODELIST": "gpu[1-2],big7", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    done = box.run(sys.executable, "-c", script, env=env)
    assert done.stdout.split() == ["gpu1", "gpu1", "gpu2", "gpu2", "big7"], done.stderr


@pytest.mark.slow
def test_a_node_s_gpus_are_its_ranks(box: Box, tmp_path: Path) -> None:
    """A rank per GPU that Slurm gives, over NCCL, and the CPU's training."""
    words = ["-m", "recipes.ddp", *DIGITS, "precision=fp64", "model.norm=group", "out=run", "+cluster=slurm"]
    asked = ["cluster.gpus_per_node=a100:2", "cluster.name=of two GPUs"]
    done = box.run(sys.executable, *words, *asked, cwd=tmp_path, env=emulated(2), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (found["device"], found["backend"], found["world_size"]) == ("cuda", "nccl", 2)
    script = next((tmp_path / "run").rglob("*_submission.sh")).read_text()
    assert "#SBATCH --gpus-per-node=a100:2\n" in script
    assert box.run("squeue", "--noheader", "--states=all", "--name=of two GPUs", "--format=%j").stdout
    expected = on_this_machine(tmp_path, 2, *DIGITS, "precision=fp64", "model.norm=group")
    assert_equal(torch.load(tmp_path / "run" / "model.pt"), expected)
