"""The keys `cluster.*`: where a run happens, never what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockstep.config.keys import key


@dataclass
class ClusterConfig:
    launcher: str = key("slurm", "what starts the ranks: slurm, lightning, or a module of yours")
    name: str | None = key(None, "the job's name (null: the recipe's)")
    nodes: int = key(1, "nodes", minimum=1)
    gpus_per_node: Any = key(0, "GPUs on each node: 4, or a100:4 with their type")
    tasks_per_node: int | None = key(None, "ranks on each node (null: one a GPU, 1 without GPUs)", minimum=1)
    cpus_per_task: int | None = key(None, "CPUs for each rank (null: the cluster's default)", minimum=1)
    mem_gb: float | None = key(None, "memory on each node in GB (null: the cluster's default)", minimum=0)
    partition: str | None = key(None, "partition to submit to")
    account: str | None = key(None, "account to charge")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that the nodes must have")
    exclude: str | None = key(None, "nodes to avoid")
    time_minutes: int = key(60, "time limit in minutes", minimum=1)
    signal_seconds: int = key(120, "seconds before the time limit at which it saves (a third of it at most)", minimum=1)
    max_requeues: int = key(20, "times that the job comes back after preemptions, time limits, lost nodes", minimum=0)
    mail_user: str | None = key(None, "address for Slurm's mails")
    mail_type: str | None = key(None, "what it writes about, such as END,FAIL,REQUEUE")
    setup: list[str] = key((), "shell lines before the ranks start, such as [module load cuda]")
    container: str | None = key(None, "command in front of each rank, such as apptainer exec --nv image.sif")
    python: str | None = key(None, "the ranks' interpreter (null: this one; in a container: python)")
    ranks: str = key("slurm", "what makes a rank of each of srun's tasks: slurm, lightning, or a module of yours")
    sbatch: dict[str, Any] = key({}, "further options of sbatch, such as {reservation: course}", open=True)
    srun: list[str] = key((), "further options of the srun that starts the ranks")
    follow: bool = key(True, "follow the job's log until it ends; false: return at once")
    dry_run: bool = key(False, "show the job's script and what sbatch says of it; start and make nothing")
