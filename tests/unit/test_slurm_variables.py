"""Who a process is by the variables of Slurm and torchrun, and what a job's end means."""

from __future__ import annotations

import pytest

from launchers.slurm import exit_code
from lockstep.distributed.environment import discover, nodes_of_tasks
from lockstep.distributed.interfaces import interface_towards
from lockstep.errors import UserError
from lockstep.launch.cluster import idle_nodes

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
