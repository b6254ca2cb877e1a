"""On a real cluster (slurm/box): the same run as on one machine, and what is wrong is refused before it is submitted."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.recipe import Recipe
from tests.helpers.gpus import emulated
from tests.helpers.harness import ROOT, assert_equal, command, lines, train, verify_rows
from tests.helpers.slurm_box import Box
from tests.helpers.slurm_jobs import (
    DIGITS,
    LATER,
    LONG,
    SHORT,
    TINY,
    end,
    log_of,
    on_this_machine,
    start,
    until,
    wait_for_steps,
    weights,
)

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
