"""Has Lightning start the ranks of any recipe, or take those over that srun has started.

Lightning's own launcher and cluster environments say who each rank is; here their answers become the variables that
every launcher gives a rank, and with them the recipe's command is the same program as ever. So there is one training
loop, one run directory, and one owner of signals: SLURMEnvironment's requeueing handlers belong to Lightning's Trainer,
and are turned off.

Of Lightning's two launchers it is the one on torch.multiprocessing (`ddp_spawn`, `ddp_fork`). The other one (`ddp`)
makes the process that was typed rank 0 and starts the others by typing its command again: under Hydra's `-m` each
would run the whole sweep; a killed rank takes the others with it after up to 5 s, by SIGKILL and without a word.
`start=spawn` starts an interpreter a rank. `start=fork`, which CPU ranks have unless told otherwise, copies this
process, which has loaded everything already: the ranks are there at once, but no GPU can be used in a copy.

    python -m recipes.ddp +cluster=lightning                         two ranks on this machine, or one per GPU
    NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 python -m recipes.ddp +cluster=lightning cluster.nodes=2
    srun --ntasks=4 python -m recipes.ddp +cluster=lightning         inside a job: srun has started the ranks
    python -m recipes.ddp +cluster=lightning_slurm cluster.nodes=2   on the login node

Source: https://lightning.ai/docs/fabric/stable/fundamentals/launch.html
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lockstep.launchers.local import MISTAKE, SIGNALS, attempts
from lockstep.utils.temporary import own_folder

if TYPE_CHECKING:
    from lockstep.config.schema import ClusterConfig

STARTS = ("spawn", "fork")  # what config.start may say
SEVERAL = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a person says on each of several machines


def launch(
    target: str,
    environment: Mapping[str, str],
    *,
    nproc: int,
    max_restarts: int = 0,
    cluster: ClusterConfig | None = None,
    start: str = "spawn",
) -> int:
    """Run `nproc` ranks of `target` here to their end; return 0, the failing rank's exit code, or 128 + a signal.

    Args:
        target: a module name, or the path of a script.
        environment: variables for every rank, besides torchrun's own.
        nproc: ranks to start, on each machine where there are several.
        max_restarts: times that all ranks are started again after one of them has failed.
        cluster: its `nodes` count; None: one.
        start: spawn, or fork.
    """
    nodes = cluster.nodes if cluster else 1
    from lockstep.launchers import lightning_start
    from lockstep.launchers.children import ranks

    before = dict(os.environ)
    os.environ.update(environment)
    try:
        # Kept through all attempts: ranks started by hand note their run directory in it.
        with own_folder() as folder:
            return attempts(lambda: lightning_start.start(target, nproc, nodes, start, folder), max_restarts, ranks)
    finally:
        os.environ.clear()
        os.environ.update(before)


def check(cluster: ClusterConfig | None) -> None:
    """Refuse what `launch` could not start, before anything is created.

    Raises:
        UserError: Lightning is not installed, or this machine is one of several and does not know which.
    """
    from lockstep.config.packages import require
    from lockstep.errors import UserError

    require("lightning", "the launcher lightning")
    nodes = cluster.nodes if cluster else 1
    missing = [name for name in SEVERAL if name not in os.environ]
    if nodes > 1 and missing:
        raise UserError(
            f"cluster.nodes={nodes}: {', '.join(missing)} not set; start the same command on each machine with "
            f"NODE_RANK=0 to {nodes - 1} in front, and MASTER_ADDR and MASTER_PORT of the first; or let Slurm: "
            "+cluster=lightning_slurm"
        )
    number = os.environ.get("NODE_RANK", "0")
    if nodes > 1 and not (number.isdecimal() and int(number) < nodes):
        raise UserError(f"NODE_RANK={number}: allowed are 0…{nodes - 1} (cluster.nodes={nodes})")


def adopt() -> None:
    """Make this task of srun's a rank: torchrun's variables, from what Lightning's SLURMEnvironment says.

    Where it would guess wrong, it is told. It takes the job's first node for rank 0's, though a step may run on others;
    it has one port for all steps of a job; and it wants as many tasks on each node as sbatch was asked for, or that
    srun was told --ntasks-per-node.

    Raises:
        UserError: Lightning is not installed, or WORLD_SIZE is set to something else.
    """
    from lockstep.distributed.environment import from_srun, nodes_of_tasks

    check(None)
    variables = os.environ
    where = from_srun(variables)
    variables.update({name: where[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in where})
    placed = nodes_of_tasks(variables)
    counts = [placed.count(node) for node in dict.fromkeys(placed)] or [int(where["WORLD_SIZE"])]
    variables["SLURM_NTASKS_PER_NODE"] = str(max(counts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a job called bash or interactive it doubts that srun was used
        from lockstep.launchers.lightning_start import under_slurm

        variables.update(under_slurm(max(counts)))
    if placed:  # Lightning knows of no nodes with unequal numbers of tasks
        variables["LOCAL_WORLD_SIZE"] = str(placed.count(placed[int(variables["RANK"])]))
    again = variables.get("SLURM_RESTART_COUNT", "0")
    variables["TORCHELASTIC_RUN_ID"] = f"{variables['SLURM_JOB_ID']}.{variables['SLURM_STEP_ID']}-{again}"


def become_a_rank(target: str) -> None:
    """Be the rank that this task of srun's is."""
    # A signal that comes while the rank is still importing waits until its listener is there to hear it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    from lockstep.errors import UserError

    try:
        adopt()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    from lockstep.launchers.children import run

    run(target)


if __name__ == "__main__":
    become_a_rank(sys.argv[1])
