"""The one-machine Slurm cluster, on real Slurm: what a test that uses it may rely on."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.harness import ROOT
from tests.helpers.processes import read, wait_until
from tests.helpers.slurm_box import BOX, Box

RANK = """
import os, socket, torch, torch.distributed as dist
dist.init_process_group("gloo", rank=int(os.environ["SLURM_PROCID"]), world_size=int(os.environ["SLURM_NTASKS"]))
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(socket.gethostname(), int(total))
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box(nodes=2, gpus=2) as box:
        yield box


def processes_with(mark: str) -> list[str]:
    """The command lines of all processes on this machine that have `mark` in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                found.append((environment.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def assert_nothing_is_left(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while left := [*processes_with(str(folder)), *folder.parent.glob(folder.name)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert str(folder) not in Path("/proc/mounts").read_text()


def test_srun_reaches_two_hosts(box: Box) -> None:
    done = box.run("srun", "--nodes=2", "hostname")
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["node1", "node2"]), done.stderr


def test_commands_keep_their_directory_and_environment(box: Box, tmp_path: Path) -> None:
    done = box.run("srun", "sh", "-c", "pwd; echo $MINE; exit 7", cwd=tmp_path, env={"MINE": "here"})
    assert (done.returncode, done.stdout.split()) == (7, [str(tmp_path), "here"])


def test_a_batch_job_runs_and_sacct_knows_how_it_ended(box: Box, tmp_path: Path) -> None:
    job = box.sbatch("--gpus-per-node=2", "--output=out", "--wrap=echo $CUDA_VISIBLE_DEVICES; exit 3", cwd=tmp_path)
    assert box.wait_for_state(job, "FAILED")["ExitCode"] == "3:0"
    assert (tmp_path / "out").read_text() == "0,1\n"
    known = box.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job).stdout.splitlines()
    assert known[0] == "JobID|State|NodeList"
    assert known[1].startswith(f"{job}|FAILED|node")
    assert box.queue()[job] == "FAILED"


def test_more_gpus_than_there_are_is_refused(box: Box) -> None:
    done = box.run("sbatch", "--gpus-per-node=3", "--wrap=true")
    assert done.returncode != 0
    assert "Requested node configuration is not available" in done.stderr


def test_a_node_is_reached_by_its_name_and_not_as_localhost(box: Box, tmp_path: Path) -> None:
    serve = "import socket; s = socket.create_server(('', 29500)); open('up', 'w'); s.accept(); s.accept()"
    server = box.popen("srun", "--nodelist=node1", sys.executable, "-c", serve, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for node, host, code in (("node1", "localhost", 0), ("node2", "localhost", 1), ("node2", "node1", 0)):
            connect = f"import socket; socket.create_connection(('{host}', 29500))"
            done = box.run("srun", "--overlap", f"--nodelist={node}", sys.executable, "-c", connect)
            assert done.returncode == code, f"{node} to {host}: {done.stderr}"
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_two_ranks_on_two_nodes_all_reduce(box: Box, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    master = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
    done = box.run("srun", "--nodes=2", sys.executable, "rank.py", cwd=tmp_path, env=master, timeout=120)
    assert sorted(done.stdout.splitlines()) == ["node1 3", "node2 3"], done.stderr


@pytest.mark.slow
def test_a_job_in_high_takes_the_place_of_one_in_low(box: Box, tmp_path: Path) -> None:
    lives = "echo life $SLURM_RESTART_COUNT; [ $SLURM_RESTART_COUNT ] || exec sleep 1000"
    low = box.sbatch("--nodes=2", "--exclusive", "--open-mode=append", "--output=out", f"--wrap={lives}", cwd=tmp_path)
    wait_until(lambda: "life" in read(tmp_path / "out"))
    box.run("scontrol", "update", "PartitionName=low", "GraceTime=0")  # a grace of 5 s makes it 13 s
    high = box.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    box.wait_for_state(high, "COMPLETED")
    box.run("scontrol", "update", "PartitionName=low", "GraceTime=5")
    box.start_again_now(low)
    assert box.wait_for_state(low, "COMPLETED", restarts=1)["Restarts"] == "1"
    assert [line for line in (tmp_path / "out").read_text().splitlines() if "life" in line] == ["life", "life 1"]


@pytest.mark.slow
def test_a_job_whose_node_goes_down_starts_again_on_another(box: Box) -> None:
    job = box.sbatch("--output=/dev/null", "--wrap=sleep 1000")
    first = box.wait_for_state(job, "RUNNING")["NodeList"]
    box.steer("node", "down", first)
    box.start_again_now(job)
    again = box.wait_for_state(job, "RUNNING", restarts=1)["NodeList"]
    box.steer("node", "mend", first)
    box.run("scancel", job)
    assert again != first


@pytest.mark.slow
def test_a_killed_node_loses_its_tasks_and_can_be_mended(box: Box) -> None:
    job = box.sbatch("--nodelist=node2", "--output=/dev/null", "--wrap=sleep 4321")
    box.wait_for_state(job, "RUNNING")
    box.steer("node", "kill", "node2")
    wait_until(lambda: box.run("pgrep", "--full", "sleep 4321").stdout == "")
    box.run("scancel", job)
    box.steer("node", "mend", "node2")
    assert box.run("srun", "--nodelist=node2", "hostname").stdout == "node2\n"


@pytest.mark.slow
def test_a_cut_node_runs_on_unheard(box: Box) -> None:
    connect = ("bash", "-c", "</dev/tcp/node2/6818")
    assert box.run(*connect).returncode == 0
    box.steer("node", "cut", "node2")
    assert box.run("timeout", "2", *connect).returncode != 0
    assert "slurmd -D -N node2" in box.run("ps", "-ef").stdout
    box.steer("node", "mend", "node2")
    assert box.run("srun", "--nodelist=node2", "hostname").stdout == "node2\n"


@pytest.mark.slow
def test_a_job_survives_the_restart_of_slurmctld(box: Box) -> None:
    job = box.sbatch("--output=/dev/null", "--wrap=sleep 1000")
    box.wait_for_state(job, "RUNNING")
    box.steer("ctl", "restart")
    assert box.wait_for_state(job, "RUNNING")["Restarts"] == "0"
    box.run("scancel", job)


@pytest.mark.slow
def test_two_boxes_at_once_do_not_meet_and_leave_nothing(box: Box) -> None:
    with Box(nodes=1) as other:
        job = other.sbatch("--output=/dev/null", "--wrap=sleep 1000")
        other.wait_for_state(job, "RUNNING")
        assert other.run("srun", "hostname").stdout == "node1\n"
        assert box.folder != other.folder
        assert len(box.run("sinfo", "--noheader", "--Node", "--partition=low").stdout.splitlines()) == 2
        other.wait_for_state("2", "COMPLETED")  # srun returns before its node has acknowledged
        assert other.queue() == {"1": "RUNNING", "2": "COMPLETED"}
        assert processes_with(str(other.folder))  # or the next line would prove nothing
    assert_nothing_is_left(other.folder)


@pytest.mark.parametrize("mode", [[], ["--loopback"]], ids=["namespaces", "loopback"])
def test_a_killed_box_leaves_nothing(mode: list[str]) -> None:
    # A task in a session of its own, which no process group and no parent would take along.
    job = 'srun --nodes=2 sh -c "setsid sleep 1000 & sleep 1; echo $LOCKSTEP_BOX; exec sleep 1000"'
    killed = subprocess.Popen([BOX, *mode, "--", "sh", "-c", job], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    folder = Path(killed.stdout.readline().strip())
    assert folder.exists()
    assert any("sleep 1000" in line for line in processes_with(str(folder)))
    killed.kill()
    killed.communicate()
    assert_nothing_is_left(folder)


def test_ctrl_c_is_the_commands(tmp_path: Path) -> None:
    command = 'trap "sinfo --noheader --format=%P; exit 5" INT; echo up; while :; do sleep 0.1; done'
    box = subprocess.Popen(
        [BOX, "--nodes=1", "--", "sh", "-c", command], stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert box.stdout is not None
    assert select.select([box.stdout], [], [], 60)[0]
    assert box.stdout.readline() == "up\n"
    os.killpg(box.pid, signal.SIGINT)  # as the terminal does
    out, _ = box.communicate(timeout=60)
    assert (box.returncode, out.split()) == (5, ["low*", "high"])


@pytest.mark.slow
def test_loopback_runs_jobs_and_knows_what_it_cannot() -> None:
    with Box(nodes=2, loopback=True) as box:
        done = box.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME")
        assert sorted(done.stdout.split()) == ["node1", "node2"], done.stderr
        job = box.sbatch("--nodelist=node2", "--output=/dev/null", "--wrap=sleep 1000")
        box.wait_for_state(job, "RUNNING")
        box.steer("node", "down", "node2")
        assert box.job(job)["JobState"] in ("PENDING", "NODE_FAIL", "COMPLETING")
        with pytest.raises(AssertionError, match="cannot be cut off"):
            box.steer("node", "cut", "node2")
    assert_nothing_is_left(box.folder)


@pytest.mark.parametrize(
    ("words", "path", "line"),
    [
        (["--", "true"], "", "slurm/box: Slurm is not installed: apt-get install slurm-wlm"),
        (["--nodes=0"], os.environ["PATH"], "slurm/box: --nodes 0: choose from 1 to 64"),
        (["srun", "hostname"], os.environ["PATH"], "slurm/box: unrecognized arguments: srun hostname"),
        ([f"--dir={ROOT}"], os.environ["PATH"], f"slurm/box: --dir {ROOT}: not empty"),
        (["node", "cut"], os.environ["PATH"], "slurm/box: `node cut` works on the login node of a box only"),
    ],
    ids=["no slurm", "no nodes", "no dashes", "full directory", "outside"],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], path: str, line: str) -> None:
    done = subprocess.run([sys.executable, BOX, *words], env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (2, line + "\n", "")


def test_a_directory_of_ones_own_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "box"
    done = subprocess.run([BOX, "--nodes=1", f"--dir={kept}", "--", "srun", "hostname"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "node1\n"), done.stderr
    assert "slurmctld version" in (kept / "log" / "slurmctld.log").read_text()
    assert processes_with(str(kept)) == []
