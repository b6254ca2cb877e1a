"""Who a process is by the variables of Slurm and torchrun, and what a job's end means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.slurm import check, exit_code, parameters, submit
from launchers.slurm_head import call
from lockstep.config.compose import compose
from lockstep.config.schema import ClusterConfig, Config
from lockstep.distributed.environment import discover, nodes_of_tasks
from lockstep.distributed.interfaces import interface_towards
from lockstep.errors import UserError
from lockstep.launch.cluster import gpus_on_each, idle_nodes
from lockstep.launch.run_records import apart, settings_of
from recipes import ddp
from tests.helpers.harness import ROOT

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}
STEP |= {"SLURM_STEP_NODELIST": "node1", "SLURM_STEP_TASKS_PER_NODE": "4"}


def test_a_task_of_srun_s_is_a_rank() -> None:
    place = discover(STEP)
    assert place is not None
    assert (place.rank, place.world_size, place.master_addr) == (3, 4, "node1")
    other = discover(STEP | {"SLURM_STEP_ID": "3", "SLURM_PROCID": "0"})
    assert other is not None
    assert other.master_port != place.master_port, "two steps of a job do not meet"


def test_a_process_of_mpirun_s_is_a_rank() -> None:
    size = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    places = [discover(size | {"OMPI_COMM_WORLD_RANK": str(rank)}) for rank in range(4)]
    assert [(place.rank, place.world_size, place.master_addr) for place in places if place] == [
        (rank, 4, "127.0.0.1") for rank in range(4)
    ]
    assert len({place.master_port for place in places if place}) == 1
    assert discover({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) is None
    # Inside a job, mpirun's daemons are srun's tasks, and their variables reach the ranks.
    there = discover(STEP | size | {"OMPI_COMM_WORLD_RANK": "1"})
    assert there is not None
    assert there.rank == 1
    # srun --mpi=pmi2 tells the same twice.
    same = discover(STEP | {"PMI_RANK": STEP["SLURM_PROCID"], "PMI_SIZE": STEP["SLURM_STEP_NUM_TASKS"]})
    assert same == discover(STEP)


@pytest.mark.parametrize(
    "missing",
    [
        {"SLURM_STEP_ID": ""},  # the script of a batch job, the shell of salloc: they know the job's tasks too
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_a_shell_inside_a_job_is_no_rank(missing: dict[str, str]) -> None:
    env = {name: value for name, value in (STEP | {"SLURM_NTASKS": "4"} | missing).items() if value}
    assert discover(env) is None


def test_torchrun_s_variables_win() -> None:
    theirs = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "9"}
    place = discover(STEP | theirs)
    assert place is not None
    assert (place.rank, place.world_size, place.master_addr, place.master_port) == (1, 2, "head", 9)


def test_a_world_that_is_not_srun_s_is_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE=8: srun started 4 tasks"):
        discover(STEP | {"WORLD_SIZE": "8"})


def test_a_job_of_many_nodes_says_so_when_one_trains_alone() -> None:
    assert "this job has 2 nodes" in idle_nodes({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"})
    assert idle_nodes({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}) == idle_nodes({}) == ""


@pytest.mark.parametrize(
    ("state", "told", "code"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "2:0", 2),
        ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", 1),
        ("FAILED", "", 1),
    ],
)
def test_only_a_completed_job_exits_0(state: str, told: str, code: int) -> None:
    assert exit_code(state, told) == code


def test_without_slurm_there_are_no_tasks() -> None:
    assert nodes_of_tasks({}) == ()


def test_the_interface_is_the_one_that_leads_there() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


def test_a_failing_line_of_setup_ends_the_job_before_the_ranks() -> None:
    def job(*setup: str) -> subprocess.CompletedProcess[str]:
        lines = parameters(ClusterConfig(setup=list(setup)), "ddp")["setup"]
        assert isinstance(lines, list)
        return subprocess.run(
            ["bash", "-c", "\n".join([*lines, "false", "echo trains"])], capture_output=True, text=True
        )

    assert job("true", "export A=1").stdout == "trains\n"
    done = job("true", "load() { return 3; }", "load cuda", "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: cluster.setup: a line failed with exit code 3 (at: return 3)\n"


def test_a_job_s_name_is_the_user_s() -> None:
    told = parameters(ClusterConfig(sbatch={"job-name": "mine", "reservation": "course"}), "ddp")
    assert told["job_name"] == "mine"
    more = told["additional_parameters"]
    assert isinstance(more, dict)
    assert "job-name" not in more
    assert more["reservation"] == "course"
    assert parameters(ClusterConfig(), "ddp")["job_name"] == "ddp"


def test_slurm_s_pattern_in_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"run%j: Slurm reads %"):
        submit("recipes.ddp", [(tmp_path / "run%j", {})], ClusterConfig(), name="ddp", max_restarts=0)


def test_a_job_has_one_name() -> None:
    assert parameters(ClusterConfig(name="mine"), "ddp")["job_name"] == "mine"
    with pytest.raises(UserError, match=r"cluster.name=mine: cluster.sbatch.job-name=theirs names the job too"):
        check(ClusterConfig(name="mine", sbatch={"job-name": "theirs"}))
    with pytest.raises(UserError, match=r"cluster.partition='a\\n#SBATCH': allowed are texts of one line"):
        check(ClusterConfig(partition="a\n#SBATCH"))
    check(ClusterConfig(name="mine", setup=["module load a\nmodule load b"]))


@pytest.mark.parametrize(
    ("asked", "number"), [(0, 0), (4, 4), ("8", 8), ("a100:4", 4), ("nvidia_a100_1g.5gb:2", 2), ("1g.5gb:2", 2)]
)
def test_gpus_may_have_a_type(asked: object, number: int) -> None:
    there = ClusterConfig(gpus_per_node=asked)
    assert gpus_on_each(there) == number
    assert parameters(there, "ddp").get("gpus_per_node") == (
        str(asked) if number and ":" in str(asked) else number or None
    )


@pytest.mark.parametrize(
    "asked",
    [-1, 1.5, True, None, "", "a100", "a100:", ":4", "a100:0", "a100:x", "4:4", "gpu:4", "gpu:a100:4", "a100:4 x"],
)
def test_gpus_that_are_no_number_are_refused(asked: object) -> None:
    with pytest.raises(
        UserError, match=r"cluster.gpus_per_node=.*: allowed are whole numbers from 0 up, and a type with"
    ):
        gpus_on_each(ClusterConfig(gpus_per_node=asked))


@pytest.mark.parametrize("code", [75, 1, 0])
def test_srun_s_words_on_ranks_that_left_are_said_only_if_something_else_failed(
    code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = "srun: error: node1: task 0: Exited with exit code 75\nsrun: launch/slurm: _step_signal: Terminating StepId=1.0\n"
    noise += "slurmstepd-node1: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-11-29T12:44:22 ***\n"
    real = "srun: error: node2: task 1: Exited with exit code 1\n"
    real += "slurmstepd: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-11-29T12:44:22 DUE TO TIME LIMIT ***\n"
    script = (
        f"import sys, time; e = sys.stderr; e.write('sr'); e.flush(); time.sleep(0.1); e.write({(noise + real)!r}[2:])"
    )
    script += f"; e.write('a rank\\rsays, \\n\\nand that'); sys.exit({code})"
    assert call([sys.executable, "-c", script], dict(os.environ)) == code
    said = capfd.readouterr().err
    assert said.startswith(real + "a rank\rsays, \n\nand that")
    assert (noise in said) == (code != 75)


def test_the_points_of_a_sweep_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str) -> list[str]:
        points: list[Config] = []
        monkeypatch.setattr(sys, "argv", ["ddp", "-m", *words])
        compose(ddp.train, points.append)
        return apart([settings_of(point) for point in points])

    assert said("optim.lr=0.1,0.2") == ["optim.lr=0.1", "optim.lr=0.2"]
    assert said("data=digits,synthetic", "seed=1,2")[1] == "data.name=digits seed=2"
    assert said("model=resnet18,resnet34") == ["model.name=resnet18", "model.name=resnet34"]
    assert said("seed=3") == [""]


@pytest.mark.parametrize("script", ["srun", "torchrun"])
def test_a_batch_script_starts_a_recipe_or_a_file_of_one_s_own(script: str, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o700)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": sys.executable}
    for word, ending in (
        ("ddp", "-m recipes.ddp out=outputs/ddp/job-7 epochs=3"),
        ("own/my_loop.py", "own/my_loop.py out=outputs/my_loop/job-7 epochs=3"),
    ):
        command = ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), word, "epochs=3"]
        said = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert said.strip().endswith(ending)
        assert ("-m recipes" in said) == (word == "ddp")
