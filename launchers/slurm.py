"""Starts ranks on a SLURM cluster: submits a job with submitit, and follows it from here to its end.

It plays three parts. On the login node `submit` puts the job into the queue, and `follow` (slurm_queue.py) shows its
states and its log. On the job's first node submitit runs `Head` (slurm_head.py): it finds a free port, starts all ranks
with one srun, and puts the job back into the queue when they leave with exit code 75, which asks for that. As each of
srun's tasks, `python -m lockstep.launchers.slurm` (or what `cluster.ranks` names) gives the rank torchrun's environment
and becomes it.

Who does what with signals: Slurm announces the time limit, or a preemption, with SIGUSR1 to the ranks; theirs is
lockstep's one listener (lockstep.distributed.signals), and nobody else acts on a signal.
Source: https://slurm.schedmd.com/sbatch.html and https://github.com/facebookincubator/submitit
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lockstep.launchers.slurm_head import Head, Shape
from lockstep.launchers.slurm_queue import Job, ask, cancel, exit_code, follow, output

if TYPE_CHECKING:
    from lockstep.config.schema import ClusterConfig

__all__ = ["announce", "become_a_rank", "cancel", "dry_run", "exit_code", "follow", "submit"]

NOTICE = signal.SIGUSR1  # what Slurm sends some time before the end; it is not submitit's USR2, which has a handler
# Of the job's script: a line of cluster.setup that fails ends the job, which would train without what it was to load.
TRAP = "trap 'echo \"error: cluster.setup: a line failed with exit code $? (at: $BASH_COMMAND)\" >&2; exit 1' ERR"
KEYS = {  # what sbatch's refusals speak of: the key to change, and how to see what there is
    "account": ("account", "sacctmgr -n -P show associations user=$USER format=account"),
    "partition": ("partition", "sinfo -h -o %R"),
    "qos": ("qos", "sacctmgr -n -P show qos format=name"),
    "time limit": ("time_minutes", "sinfo -h -o '%R: %l'"),
    "feature": ("constraint", "sinfo -h -o %f"),
    "memory": ("mem_gb", "sinfo -h -o '%R: %m MB'"),
    "generic resource": ("gpus_per_node", "sinfo -h -e -o '%R: %D nodes with %G'"),
    "node configuration": ("gpus_per_node", "sinfo -h -e -o '%R: %D nodes with %c CPUs, %m MB, %G'"),
    "node count": ("nodes", "sinfo -h -o '%R: %D nodes'"),
    "cpu count": ("cpus_per_task", "sinfo -h -e -o '%R: %D nodes with %c CPUs'"),
    "node name": ("exclude", "sinfo -h -o %N"),
}


def check(cluster: ClusterConfig) -> None:
    """Hold a cluster's settings to what a script for sbatch can say.

    Raises:
        UserError: no such module for `ranks`, two names for one job, or a text of more than one line.
    """
    from lockstep.config.keys import walk
    from lockstep.errors import UserError
    from lockstep.launch.launcher import importable, is_module_name, launcher_module

    here = cluster.container is None and cluster.python is None  # the ranks' interpreter is this one
    if not is_module_name(cluster.ranks) or (here and not importable(launcher_module(cluster.ranks))):
        raise UserError(
            f"cluster.ranks={cluster.ranks}: no such module; allowed are slurm, lightning, or a module of your own"
        )
    theirs = cluster.sbatch.get("job-name", cluster.sbatch.get("job_name"))
    if cluster.name is not None and theirs is not None:
        raise UserError(
            f"cluster.name={cluster.name}: cluster.sbatch.job-name={theirs} names the job too; leave one out"
        )
    options = [(f"cluster.sbatch.{key}", value) for key, value in cluster.sbatch.items()]
    for key, value in [*((key, value) for key, value, _ in walk(cluster, "cluster.")), *options]:
        if re.search(r"[\n\r\0]", str(value)):
            raise UserError(f"{key}={str(value)!r}: allowed are texts of one line")


def submit(
    target: str, runs: Sequence[tuple[Path, Mapping[str, str]]], cluster: ClusterConfig, *, name: str, max_restarts: int
) -> list[Job]:
    """Put one job a run into the queue, as an array where there are several.

    Args:
        target: a module name, started as `python -m target`, or the path of a script.
        runs: of each the run directory and the variables for every rank, besides torchrun's own.
        cluster: where to run; tasks_per_node is filled in.
        name: the job's name.
        max_restarts: times that all ranks are started again, within the job, after one of them has failed.

    Raises:
        UserError: there is no Slurm here, or it refuses the job; nothing is in the queue.
    """
    from lockstep.errors import UserError

    folder = new_folder(folder_for(runs))
    import submitit

    heads = heads_of(target, runs, cluster, max_restarts)
    try:
        executor = submitit.SlurmExecutor(folder)
        said = io.StringIO()  # submitit repeats what sbatch said
        with outer_job_hidden(), contextlib.redirect_stderr(said):
            executor.update_parameters(**parameters(cluster, name))
            submitted = executor.submit_array(heads)
        for file in folder.glob("*.pkl"):
            file.chmod(0o600)
        print(said.getvalue(), end="", file=sys.stderr)
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError) as error:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        raise UserError(refusal(str(error), cluster)) from None
    return [
        Job(job.job_id, job.paths.stdout, out, head.point)
        for job, (out, _), head in zip(submitted, runs, heads, strict=True)
    ]


def dry_run(
    target: str, runs: Sequence[tuple[Path, Mapping[str, str]]], cluster: ClusterConfig, *, name: str, max_restarts: int
) -> None:
    """Show what `submit` would hand to sbatch, and what sbatch says of it; nothing is made, nothing is in the queue.

    Args, raises: as `submit`.
    """
    from lockstep.errors import UserError
    from lockstep.utils.text import short

    parent = folder_for(runs)
    import submitit

    executor = submitit.SlurmExecutor(next_folder(parent))
    with outer_job_hidden():
        executor.update_parameters(**parameters(cluster, name))
        if len(runs) > 1:
            executor.parameters["map_count"] = len(runs)
        script = executor._make_submission_file_text(executor._submitit_command_str, "")
        done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(refusal(done.stdout + done.stderr, cluster))
    print(script)
    for (out, _), head in zip(runs, heads_of(target, runs, cluster, max_restarts), strict=True):
        print(f"# run     {short(out)}{f' · {head.point}' if head.point else ''}")
    print(f"# ranks   {shlex.join(heads_of(target, runs, cluster, max_restarts)[0].srun([''] * cluster.nodes))}")
    print(f"# sbatch  {'; '.join(re.sub('^sbatch: ', '', line) for line in done.stderr.splitlines() if line)}")
    print("# cluster.dry_run=true: nothing was submitted", flush=True)


def folder_for(runs: Sequence[tuple[Path, Mapping[str, str]]]) -> Path:
    """The folder for what Slurm reads and writes of these runs: `slurm` in the run's, or in the sweep's.

    Raises:
        UserError: there is no Slurm here, or it would not find the folder.
    """
    from lockstep.errors import UserError

    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise UserError(
            "cluster: there is no sbatch on this machine; start this on the cluster's login node, or try it on a "
            f"cluster of your own: slurm/box -- {shlex.join(['python', *sys.orig_argv[1:]])}"
        )
    outs = [out for out, _ in runs]
    if any("%" in str(out) for out in outs):
        raise UserError(f"out={outs[0]}: Slurm reads % in the path of a log as a pattern; name a folder without %")
    return (outs[0] if len(outs) == 1 else Path(os.path.commonpath(outs))) / "slurm"


def heads_of(
    target: str, runs: Sequence[tuple[Path, Mapping[str, str]]], cluster: ClusterConfig, max_restarts: int
) -> list[Head]:
    """What starts the ranks of each run."""
    from lockstep.distributed.environment import POINT

    return [Head(target, dict(env), shape(cluster), max_restarts, env.get(POINT, "")) for _, env in runs]


def next_folder(parent: Path) -> Path:
    """`1`, `2`, ... in `parent`: the first that is not there yet. A folder a submission: job ids start again at 1 on a
    new cluster, and an old job's files would be taken for ours."""
    number = 1
    while os.path.lexists(parent / str(number)):
        number += 1
    return parent / str(number)


def new_folder(parent: Path) -> Path:
    """Make `next_folder`."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder = next_folder(parent)
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(0o700)  # what is unpickled from it must be ours
            return folder


def shape(cluster: ClusterConfig) -> Shape:
    """The part of a cluster's settings that matters inside the job."""
    from lockstep.launch.launcher import launcher_module

    # This interpreter's path means nothing inside a container.
    python = cluster.python or ("python" if cluster.container else sys.executable)
    before = shlex.split(cluster.container or "")
    tasks = cluster.tasks_per_node or 1
    return Shape(
        tasks,
        cluster.cpus_per_task,
        [*before, python],
        list(cluster.srun),
        launcher_module(cluster.ranks),
        cluster.max_requeues,
    )


def parameters(cluster: ClusterConfig, name: str) -> dict[str, object]:
    """What submitit is to ask sbatch for. It starts one process, without srun: Head, which starts the ranks."""
    # Slurm looks at time limits twice a minute, and may send the notice that much early: a short job must not get it
    # before it has begun.
    notice = min(cluster.signal_seconds, 20 * cluster.time_minutes)
    sbatch = dict(cluster.sbatch)
    wanted = {
        "job_name": str(sbatch.pop("job-name", sbatch.pop("job_name", cluster.name or name))),
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{int(1024 * cluster.mem_gb)}M" if cluster.mem_gb else None,
        "time": cluster.time_minutes,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "mail_user": cluster.mail_user,
        "mail_type": cluster.mail_type,
        "setup": [TRAP, *cluster.setup, "trap - ERR"] if cluster.setup else None,
        "stderr_to_stdout": True,
        "use_srun": False,
    }
    more = {"export": "ALL", "requeue": True, "signal": f"{NOTICE.name[3:]}@{notice}"}
    chosen = {key: value for key, value in wanted.items() if value is not None}
    return chosen | {"wckey": None, "additional_parameters": more | sbatch}  # submitit's own wckey is not ours


@contextlib.contextmanager
def outer_job_hidden() -> Iterator[None]:
    """While it is entered, this process is in no job: a job submitted from within one would inherit its shape.

    (submitit's own clean_env also hides SLURM_CONF, without which some clusters are not found.)
    """
    before = dict(os.environ)
    if "SLURM_JOB_ID" in before:
        for variable in before:
            if variable.startswith("SLURM_") and variable != "SLURM_CONF":
                del os.environ[variable]
    os.environ["SUBMITIT_LOG_LEVEL"] = "CRITICAL"  # in the job: its log is for what the ranks say
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def refusal(said: str, cluster: ClusterConfig) -> str:
    """sbatch's words in one line, with the key that they are about and what is there to choose from."""
    lines = [re.sub(r"^(sbatch: |error: |Batch job submission failed: )*", "", line) for line in said.splitlines()]
    reason = "; ".join(line for line in lines if line.strip() and not line.startswith(("Try ", "Unspecified error")))
    for sign, (key, command) in KEYS.items():
        if sign in reason.lower():
            there = sorted(set(output("sh", "-c", command).split("\n")) - {""})
            hint = f"; there is {', '.join(there)}" if there else ""
            return f"cluster.{key}={getattr(cluster, key)}: sbatch refuses the job: {reason}{hint}"
    return f"cluster: sbatch refuses the job: {reason}; see its keys in conf/cluster/slurm.yaml"


def announce(jobs: Sequence[Job], cluster: ClusterConfig) -> None:
    """Say where the jobs are and what can be done with them."""
    from lockstep.utils.text import (  # here: a job's head loads this file too, and need not load the library
        count,
        short,
    )

    partition = cluster.partition or ask(jobs[0].id).get("Partition", "the default one")
    shape = f"{count(cluster.nodes, 'node')}, {count((cluster.tasks_per_node or 1) * cluster.nodes, 'rank')}"
    if len(jobs) == 1:
        print(f"job {jobs[0].id} submitted to partition {partition}: {shape}")
        print(f"  run     {short(jobs[0].out)}")
        print(f"  log     {short(jobs[0].log)}")
    else:
        print(f"jobs {jobs[0].id} … {jobs[-1].id} submitted to partition {partition}: {shape} each")
        width = max(6, *(len(job.id) for job in jobs))
        for job in jobs:
            print(f"  {job.id:{width}}  {f'{job.point}  ' if job.point else ''}{short(job.out)}")
    whole = sorted({job.id.partition("_")[0] for job in jobs})
    print(f"  follow  tail -F {shlex.join(short(job.log) for job in jobs)}")
    print(f"  cancel  scancel {' '.join(whole)}", flush=True)


# As a rank --------------------------------------------------------------------------------------------------------


def become_a_rank(target: str) -> NoReturn:
    """Turn this task of srun's into a rank: torchrun's variables, then the program in this process's place."""
    slurm = os.environ
    tasks = int(slurm["SLURM_NTASKS"])
    os.environ.update(
        RANK=slurm["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=slurm["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks // int(slurm["SLURM_NNODES"])),
        GROUP_RANK=slurm["SLURM_NODEID"],
        TORCHELASTIC_RUN_ID=f"{slurm['SLURM_JOB_ID']}-{slurm.get('SLURM_RESTART_COUNT', '0')}",
    )
    # A signal that comes while the rank is still importing waits until its listener is there to hear it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    command = [target] if target.endswith(".py") else ["-m", target]
    os.execv(sys.executable, [sys.executable, "-u", *command])


if __name__ == "__main__":
    become_a_rank(sys.argv[1])
