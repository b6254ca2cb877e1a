"""Starts ranks on a SLURM cluster: submits a job with submitit, and follows it from here to its end.

It plays three parts. On the login node `submit` and `follow` put the job into the queue and show its states and its
log. On the job's first node submitit runs `Head`: it finds a free port, starts all ranks with one srun, and puts the
job back into the queue when they leave with exit code 75, which asks for that. As each of srun's tasks, `python -m
lockstep.launchers.slurm` (or what `cluster.ranks` names) gives the rank torchrun's environment and becomes it.

Who does what with signals: Slurm announces the time limit, or a preemption, with SIGUSR1 to the ranks; theirs is
lockstep's one listener (lockstep.distributed.signals), and nobody else acts on a signal.
Source: https://slurm.schedmd.com/sbatch.html and https://github.com/facebookincubator/submitit
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lockstep.launchers.local import ASK_AGAIN, MISTAKE

if TYPE_CHECKING:
    from lockstep.config.schema import ClusterConfig

NOTICE = signal.SIGUSR1  # what Slurm sends some time before the end; it is not submitit's USR2, which has a handler
DETACHED = 128 + signal.SIGINT  # Ctrl-C while following: how the job will end is not known
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"}
MAYBE = {"NODE_FAIL", "PREEMPTED"}  # the end, or the moment before Slurm requeues the job
FORGOTTEN = "FORGOTTEN"  # no state of Slurm's: it knows the job no more
RUNNING = {"RUNNING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED"}
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # else each rank warns that its peers' addresses have no names
KEYS = {  # what sbatch's refusals speak of: the key to change, and how to see what there is
    "account": ("account", "sacctmgr -n -P show associations user=$USER format=account"),
    "partition": ("partition", "sinfo -h -o %R"),
    "qos": ("qos", "sacctmgr -n -P show qos format=name"),
    "time limit": ("time_minutes", "sinfo -h -o '%R: %l'"),
    "feature": ("constraint", "sinfo -h -o %f"),
    "memory": ("mem_gb", "sinfo -h -o '%R: %m MB'"),
    "node configuration": ("gpus_per_node", "sinfo -h -e -o '%R: %D nodes with %c CPUs, %m MB, %G'"),
    "node count": ("nodes", "sinfo -h -o '%R: %D nodes'"),
    "cpu count": ("cpus_per_task", "sinfo -h -e -o '%R: %D nodes with %c CPUs'"),
    "node name": ("exclude", "sinfo -h -o %N"),
}


# On the login node ------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A job in the queue, or one of an array.

    Attributes:
        id: what scancel and scontrol know it by.
        log: what the job's first process and rank 0 say; it may not exist yet.
        out: its run directory.
    """

    id: str
    log: Path
    out: Path
    offset: int = 0  # bytes of the log that were shown
    shown: str = ""  # the last state that was
    code: int | None = None
    since: float = field(default_factory=time.monotonic)  # of the last change


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

    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise UserError(
            "cluster: there is no sbatch on this machine; start this on the cluster's login node, or try it on a "
            f"cluster of your own: slurm/box -- {shlex.join(['python', *sys.orig_argv[1:]])}"
        )
    import submitit

    # A folder a submission: job ids start again at 1 on a new cluster, and an old job's files would be taken for ours.
    outs = [out for out, _ in runs]
    folder = new_folder((outs[0] if len(outs) == 1 else Path(os.path.commonpath(outs))) / "slurm")
    heads = [Head(target, dict(environment), shape(cluster), max_restarts) for _, environment in runs]
    try:
        executor = submitit.SlurmExecutor(folder)
        said = io.StringIO()  # submitit repeats what sbatch said
        with outer_job_hidden(), contextlib.redirect_stderr(said):
            executor.update_parameters(**parameters(cluster, name))
            submitted = executor.submit_array(heads)
        print(said.getvalue(), end="", file=sys.stderr)
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError) as error:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        raise UserError(refusal(str(error), cluster)) from None
    return [Job(job.job_id, job.paths.stdout, out) for job, out in zip(submitted, outs, strict=True)]


def new_folder(parent: Path) -> Path:
    """`1`, `2`, ... in `parent`: the first that is not there yet."""
    number = 1
    while True:
        with contextlib.suppress(FileExistsError):
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        number += 1


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
    wanted = {
        "job_name": name,
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
        "setup": list(cluster.setup) or None,
        "stderr_to_stdout": True,
        "use_srun": False,
    }
    more = {"export": "ALL", "requeue": True, "signal": f"{NOTICE.name[3:]}@{notice}"}
    chosen = {key: value for key, value in wanted.items() if value is not None}
    return chosen | {"wckey": None, "additional_parameters": more | cluster.sbatch}  # submitit's own wckey is not ours


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

    for job in jobs:
        partition = cluster.partition or ask(job.id).get("Partition", "the default one")
        shape = f"{count(cluster.nodes, 'node')}, {count((cluster.tasks_per_node or 1) * cluster.nodes, 'rank')}"
        print(f"job {job.id} submitted to partition {partition}: {shape}")
        print(f"  run     {short(job.out)}")
        print(f"  log     {short(job.log)}")
    whole = sorted({job.id.partition("_")[0] for job in jobs})
    print(f"  follow  tail -F {shlex.join(short(job.log) for job in jobs)}")
    print(f"  cancel  scancel {' '.join(whole)}", flush=True)


def cancel(jobs: Sequence[Job]) -> None:
    """Take jobs out of the queue again."""
    subprocess.run(["scancel", *(job.id for job in jobs)])


def follow(jobs: Sequence[Job]) -> int:
    """Show the jobs' states and logs until all have ended; return the worst exit code.

    Ctrl-C leaves the jobs running and returns DETACHED.
    """
    asked = float("-inf")
    try:
        while any(job.code is None for job in jobs):
            now = time.monotonic()
            # slurmctld is everyone's: the longer nothing has changed, the less often it is asked, up to every 10 s.
            if now - asked >= min(10.0, 1.0 + (now - max(job.since for job in jobs)) / 30):
                asked = now
                for job in jobs:
                    if job.code is None:
                        look(job)
            for job in jobs:
                show_log(job, len(jobs) > 1)
            time.sleep(0.25)
        time.sleep(0.5)  # the log's last lines, where they come over a network
        for job in jobs:
            show_log(job, len(jobs) > 1)
            print(f"job {job.id}: {job.shown}", flush=True)
    except KeyboardInterrupt:
        from lockstep.utils.text import short

        ids = " ".join(job.id for job in jobs if job.code is None)
        logs = shlex.join(short(job.log) for job in jobs if job.code is None)
        print(f"\nno longer following; the job goes on. Follow again: tail -F {logs}; cancel: scancel {ids}")
        return DETACHED
    return max(job.code or 0 for job in jobs)


def look(job: Job) -> None:
    """Ask for a job's state and say it if it is new. Sets job.code when the job has ended."""
    facts = ask(job.id)
    state = facts.get("JobState", "")
    nodes, again = facts.get("NodeList", ""), int(facts.get("Restarts", "0"))
    life = f" (requeue {again})" if again else ""
    if state == FORGOTTEN:  # there is no accounting; but the run has written down how it ended
        finished = False
        with contextlib.suppress(OSError, ValueError):
            finished = json.loads((job.out / "result.json").read_text())["status"] == "finished"
        state = "COMPLETED" if finished else "FAILED"
    if state in ENDED or (state in MAYBE and job.shown == state and time.monotonic() - job.since > 30):
        job.code = exit_code(state, facts.get("ExitCode", ""))
        job.shown = ending(state, job.code) + life
        return
    if state == "PENDING":
        reason = facts.get("Reason", "")
        shown = "queued" + (f" ({reason})" if reason not in ("", "None") else "") + life
    elif state == "COMPLETING":
        shown = job.shown  # it ends, or comes back
    elif state in RUNNING:
        shown = f"running on {nodes}{life}"
    else:
        shown = state or job.shown  # no answer: slurmctld is away
    if shown != job.shown:
        job.shown, job.since = shown, time.monotonic()
        print(f"job {job.id}: {shown}", flush=True)


def ending(state: str, code: int) -> str:
    """How a job ended, in words."""
    if state == "COMPLETED":
        return "finished"
    words = {"CANCELLED": "cancelled", "TIMEOUT": "ended by its time limit", "FAILED": "failed"}
    return f"{words.get(state, state)}, exit code {code}"


def exit_code(state: str, told: str) -> int:
    """The job's exit code as a shell would have it; never 0 for a job that was not completed."""
    if state == "COMPLETED":
        return 0
    code, _, number = told.partition(":")
    if number not in ("", "0"):
        return 128 + int(number)
    return int(code or 0) or 1


def ask(job_id: str) -> dict[str, str]:
    """What Slurm knows of a job: JobState, Reason, NodeList, ExitCode, Restarts, …; nothing where it does not answer.

    slurmctld forgets a job some minutes after its end; then it is the accounting that knows, where there is one.
    """
    done = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, env=plain_environment()
    )
    if done.returncode == 0:
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    if "Invalid job id" not in done.stderr:
        return {}
    lines = output("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,ExitCode").splitlines()
    if not lines:
        return {"JobState": FORGOTTEN}
    state, _, code = lines[-1].partition("|")
    return {"JobState": state.split(" ")[0], "ExitCode": code}


def plain_environment() -> dict[str, str]:
    """English words and Slurm's own formats, whatever the user has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SINFO_"))}


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def show_log(job: Job, several: bool) -> None:
    """Print the whole lines that were added to a job's log."""
    try:
        with job.log.open("rb") as stream:
            stream.seek(job.offset)
            added = stream.read()
    except OSError:
        return  # it has not begun
    if job.code is None:
        added = added[: added.rfind(b"\n") + 1]
    job.offset += len(added)
    before = f"[{job.id}] " if several else ""
    for line in added.decode(errors="replace").splitlines():
        print(before + line, flush=True)


# On the job's first node ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How the ranks lie on the nodes, and how they are started. Plain values: the head need not import the library."""

    tasks_per_node: int
    cpus_per_task: int | None
    python: list[str]
    srun: list[str]
    ranks: str
    max_requeues: int


@dataclass(frozen=True)
class Head:
    """The job's first process: starts the ranks, waits for them, and decides whether the job comes back.

    submitit pickles it here and calls it there; its exit code is the job's.
    """

    target: str
    environment: dict[str, str]
    shape: Shape
    max_restarts: int

    def __call__(self) -> NoReturn:
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: None)  # they are the ranks' to act on; submitit has handlers of its own
        requeues, most = int(os.environ.get("SLURM_RESTART_COUNT", "0")), self.shape.max_requeues
        nodes = output("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        again = f" · requeue {requeues} of at most {most}" if requeues else ""
        print(f"job {os.environ['SLURM_JOB_ID']} on {', '.join(nodes)}{again}", flush=True)
        if requeues > most:
            sys.exit(fail(f"requeued more than cluster.max_requeues={most} times: it ends here", 1))
        code = 1
        for attempt in range(self.max_restarts + 1):
            if attempt:
                print(f"restart {attempt} of max_restarts={self.max_restarts}, from the newest checkpoint", flush=True)
            code = subprocess.call(
                self.srun(nodes), env=QUIET | os.environ | self.environment | meeting_point(nodes[0])
            )
            if code in (0, MISTAKE, ASK_AGAIN):
                break
        if code in (0, MISTAKE):
            sys.exit(code)
        why = "asked to leave, and saved" if code == ASK_AGAIN else self.lost(nodes)
        if why and ask(os.environ["SLURM_JOB_ID"]).get("JobState") not in RUNNING:
            sys.exit(code)  # scancel too asks the ranks to leave; a requeue would bring the job back
        if why and requeues >= most:
            sys.exit(fail(f"{why}; not requeued: cluster.max_requeues={most} is reached", code))
        if why:
            print(f"{why}: requeue {requeues + 1} of at most {most}", flush=True)
            subprocess.call(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
        sys.exit(code)

    def srun(self, nodes: Sequence[str]) -> list[str]:
        """The command that starts all ranks."""
        tasks = self.shape.tasks_per_node
        options = [
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes) * tasks}",
            f"--ntasks-per-node={tasks}",
            "--export=ALL",
            "--distribution=block",  # neighbouring ranks on one node, as everywhere
            "--kill-on-bad-exit=1",  # one rank's end is the end of all: the others would wait for it
        ]
        if self.shape.cpus_per_task:
            options.append(f"--cpus-per-task={self.shape.cpus_per_task}")  # since Slurm 22.05 not taken from the job
        return ["srun", *options, *self.shape.srun, *self.shape.python, "-m", self.shape.ranks, self.target]

    def lost(self, nodes: Sequence[str]) -> str:
        """Which nodes of the job no longer answer, in words; nothing if all do.

        Ranks see only that a peer has gone. Whether its program broke, which a new start would not mend, or its node,
        Slurm itself finds out minutes later, when this job would have ended as failed.
        """
        if len(nodes) == 1:
            return ""
        command = ["srun", "--overlap", f"--nodes={len(nodes)}", "--ntasks-per-node=1", f"--ntasks={len(nodes)}"]
        try:
            done = subprocess.run(
                [*command, "sh", "-c", "echo $SLURMD_NODENAME"], capture_output=True, text=True, timeout=30
            )
            answered = done.stdout.split()
        except subprocess.TimeoutExpired as error:
            answered = (error.stdout or b"").decode().split()
        silent = [node for node in nodes if node not in answered]
        return f"{', '.join(silent)} does not answer" if silent else ""


def fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def meeting_point(host: str) -> dict[str, str]:
    """Where the ranks meet: this host, which is rank 0's, and a port that is free on it.

    It is derived from the job's id, so that jobs which share a node do not race for one.
    """
    job = int(os.environ["SLURM_JOB_ID"])
    for attempt in range(1000):
        port = 15000 + (job * 7 + attempt * 101) % 15000  # below those that kernels hand out for outgoing connections
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            break
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


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
