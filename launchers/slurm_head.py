"""On a Slurm job's first node: starts all ranks with one srun, and has the job come back where they ask for it.

submitit unpickles a `Head` there and calls it. It need not import the library, which takes its time.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from lockstep.launchers.local import ASK_AGAIN, MISTAKE
from lockstep.launchers.slurm_queue import RUNNING, ask, output
from lockstep.utils.standard_streams import protect

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # else each rank warns that its peers' addresses have no names
# srun's words on ranks that were told to leave and did: errors to it, to the user the run's own line says it.
LEFT = re.compile(
    rb"(srun: (error: \S+: tasks? \S+: Exited with exit code %d|.*Terminating StepId=\S+|Job step aborted: .*)"
    rb"|slurmstepd\S*: error: \*\*\* STEP \S+ ON \S+ CANCELLED AT \S+( DUE TO PREEMPTION)? \*\*\*)\s*" % ASK_AGAIN
)


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
    point: str = ""

    def __call__(self) -> NoReturn:
        protect()  # its log may be on a disk that is full
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: None)  # they are the ranks' to act on; submitit has handlers of its own
        requeues, most = int(os.environ.get("SLURM_RESTART_COUNT", "0")), self.shape.max_requeues
        nodes = output("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        again = f" · requeue {requeues} of at most {most}" if requeues else ""
        point = f" · {self.point}" if self.point else ""
        print(f"job {job_name()} on {', '.join(nodes)}{point}{again}", flush=True)
        if requeues > most:
            sys.exit(fail(f"requeued more than cluster.max_requeues={most} times: it ends here", 1))
        code = 1
        for attempt in range(self.max_restarts + 1):
            if attempt:
                print(f"restart {attempt} of max_restarts={self.max_restarts}, from the newest checkpoint", flush=True)
            code = call(self.srun(nodes), QUIET | os.environ | self.environment | meeting_point(nodes[0]))
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


def call(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run srun and return its exit code; its words on ranks that were asked to leave are said only if that is not all.

    Lines of anybody else, and parts of lines, go through as they come.
    """
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    held, rest = [], b""
    while added := os.read(process.stderr.fileno(), 65536):
        *whole, rest = (rest + added).splitlines(keepends=True) or [b""]
        if rest.endswith(b"\n"):
            whole, rest = [*whole, rest], b""
        for line in whole:
            if LEFT.fullmatch(line):
                held.append(line)
            else:
                say(line)
        if rest and not any(b.startswith(rest[: len(b)]) for b in (b"srun: ", b"slurmstepd")):
            say(rest)
            rest = b""
    code = process.wait()
    for line in [*([] if code == ASK_AGAIN else held), rest]:
        say(line)
    return code


def say(text: bytes) -> None:
    """Put this on stderr, which may be a disk that is full."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]


def job_name() -> str:
    """What the user knows this job by: of an array, its number in it."""
    env = os.environ
    return (
        f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        if "SLURM_ARRAY_JOB_ID" in env
        else env["SLURM_JOB_ID"]
    )


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
