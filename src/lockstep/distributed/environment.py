"""Which rank this process is, as its launcher says.

Every launcher gives every rank torchrun's environment (https://docs.pytorch.org/docs/stable/elastic/run.html):
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Nothing else is needed to join. A bare `srun` or `mpirun` gives
its own variables instead, from which these follow.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.errors import UserError

RUN_DIRECTORY = "LOCKSTEP_RUN_DIR"  # set by launchers that start ranks for a run that is already frozen
LAUNCHER = "LOCKSTEP_LAUNCHER_PID"
POINT = "LOCKSTEP_POINT"  # of a sweep, what is this run's own, as `optim.lr=0.1`
TRIAL = "LOCKSTEP_TRIAL"  # set for ranks that only try whether a batch fits


@dataclass(frozen=True)
class Place:
    """What a launcher says about this process."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    agent_store: bool  # torchrun's agent holds the store at master_port, so rank 0 must not
    attempt: int  # how often the agent has restarted the ranks
    nodes: tuple[str, ...] = ()  # where the launcher has put each rank, if it says


def discover(env: Mapping[str, str]) -> Place | None:
    """Read this process's place from its environment; None where no launcher started it.

    Raises:
        UserError: the variables are incomplete or contradict each other.
    """
    if "RANK" not in env:
        if mpi := mpi_of(env):
            env = {**env, **from_mpi(env, mpi)}
        elif in_a_step_of_many(env):
            env = {**env, **from_srun(env)}
        elif env.get("PET_NNODES", "1") not in ("1", "1:1"):
            raise UserError(
                f"PET_NNODES={env['PET_NNODES']}: these are torchrun's variables, as Kubeflow sets them; start torchrun -m "
                "recipes.NAME in each container, or unset them"
            )
        elif "WORLD_SIZE" in env:
            raise UserError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set but RANK is not: set RANK to 0…WORLD_SIZE−1 in each process, "
                "or unset WORLD_SIZE"
            )
        else:
            return None
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise UserError(
            f"RANK={env['RANK']} is set but not {', '.join(missing)}: a rank needs all four, or none of them"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not env.get(name, "0").isdecimal():
            raise UserError(f"{name}={env[name]}: allowed are whole numbers from 0 up")
        numbers[name] = int(env.get(name, "0"))
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(
            f"RANK={env['RANK']}: allowed are 0…{numbers['WORLD_SIZE'] - 1} (WORLD_SIZE={env['WORLD_SIZE']})"
        )
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']}: allowed are 1…65535")
    return Place(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        master_addr=env["MASTER_ADDR"],
        master_port=numbers["MASTER_PORT"],
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        nodes=nodes_of_tasks(env) if in_a_step_of_many(env) else (),
    )


@dataclass(frozen=True)
class Mpi:
    """The variables by which a launcher of MPI programs tells a process its number, how many there are, and how many of
    them on its host."""

    name: str
    rank: str
    size: str
    local_size: str


MPI = (
    Mpi("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Mpi("mpirun (MVAPICH)", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    Mpi("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_SIZE"),
    Mpi("mpiexec (PALS)", "PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_SIZE"),
    Mpi("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_SIZE"),
    Mpi("mpiexec (MPICH, Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
)


def mpi_of(env: Mapping[str, str]) -> Mpi | None:
    """The launcher of MPI programs that started this process as one of several; None: none did, or srun did."""
    for mpi in MPI:
        size = env.get(mpi.size, "1")
        if mpi.rank in env and size.isdecimal() and int(size) > 1:
            by_srun = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (env[mpi.rank], size)
            return None if by_srun else mpi
    return None


def from_mpi(env: Mapping[str, str], mpi: Mpi) -> dict[str, str]:
    """torchrun's variables from those of an MPI launcher.

    Raises:
        UserError: nothing says where rank 0 is.
    """
    rank, size = env[mpi.rank], env[mpi.size]
    found = {"RANK": rank, "WORLD_SIZE": size}
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return found
    if env.get(mpi.local_size) != size:
        raise UserError(
            f"{mpi.name} started rank {rank} of {size}, and nothing says where rank 0 is: set MASTER_ADDR to the first "
            "host and MASTER_PORT to a free port for all ranks (mpirun -x MASTER_ADDR=host0 -x MASTER_PORT=29500)"
        )
    # All on this host, children of one mpirun: the same port for all of them without a word between them.
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(15000 + os.getppid() % 15000)} | found


def in_a_step_of_many(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several that one `srun` started.

    Not so the shell of an allocation or the script of a batch job: they know the job's tasks, and are none of them. A
    step of a single task is taken for a shell too (`srun --pty bash`). The job's name says nothing.
    """
    return "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def from_srun(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of a step; rank 0 is on the step's first node.

    Raises:
        UserError: WORLD_SIZE is set too, to something else.
    """
    tasks = env["SLURM_STEP_NUM_TASKS"]
    if env.get("WORLD_SIZE", tasks) != tasks:
        raise UserError(
            f"WORLD_SIZE={env['WORLD_SIZE']}: srun started {tasks} tasks, and each is a rank; unset WORLD_SIZE, or "
            f"start {env['WORLD_SIZE']} with srun --ntasks={env['WORLD_SIZE']}"
        )
    found = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": tasks}
    if "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = expand(env["SLURM_STEP_NODELIST"])[0]
    if "MASTER_PORT" not in env:  # the same on all ranks without a word between them, another one in each step
        found["MASTER_PORT"] = str(15000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % 15000)
    return found


def expand(nodes: str) -> list[str]:
    """The names in a list of Slurm's, such as `gpu[01-03],big7`."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    return done.stdout.split() or [nodes]


def nodes_of_tasks(env: Mapping[str, str]) -> tuple[str, ...]:
    """The node of each task of a step, as srun spreads them by default: the first tasks on the first node."""
    counts: list[int] = []  # a node
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    nodes = expand(env.get("SLURM_STEP_NODELIST", ""))
    return tuple(node for node, count in zip(nodes, counts, strict=False) for _ in range(count))
