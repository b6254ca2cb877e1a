"""What goes wrong on a real cluster (slurm/box): named once, and nothing lost but the steps since the last checkpoint."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.harness import ROOT, assert_equal
from tests.helpers.processes import wait_until
from tests.helpers.slurm_box import Box
from tests.helpers.slurm_jobs import (
    LONG,
    TINY,
    end,
    log_of,
    on_this_machine,
    start,
    submit,
    until,
    wait_for_steps,
    weights,
)


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
