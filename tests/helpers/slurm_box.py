"""A Slurm cluster for tests: a box (slurm/box) that stays up, and commands run on its login node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.harness import ROOT, clean_environment
from tests.helpers.processes import children

BOX = ROOT / "slurm" / "box"
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")


class Box:
    """`with Box(nodes=2) as box: box.run("srun", "hostname")`: a cluster of its own, gone at the end.

    It also goes when this process dies: the box's command reads from a pipe that closes then.
    """

    def __init__(
        self,
        nodes: int = 2,
        gpus: int = 2,
        cpus: int = 4,
        slurmd_timeout: int = 20,
        loopback: bool = False,
        gpu_type: str = "",
    ) -> None:
        sizes = {"nodes": nodes, "gpus": gpus, "cpus": cpus, "slurmd-timeout": slurmd_timeout}
        self.options = [f"--{name}={value}" for name, value in sizes.items()] + ["--loopback"] * loopback
        self.options += [f"--gpu-type={gpu_type}"] * bool(gpu_type)

    def __enter__(self) -> Box:
        # The command says where the box is, then does what `steer` sends until there is nobody to send any more.
        command = 'echo "$LOCKSTEP_BOX"; while read -r words; do box $words >&2; echo $?; done'
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(BOX), *self.options, "--", "sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=clean_environment(),
        )
        where = self._answer()
        if not where:
            self.process.wait()
            raise AssertionError(f"the box did not come up:\n{self._said()}")
        self.folder = Path(where)
        self.environment = clean_environment() | {"SLURM_CONF": f"{where}/slurm.conf", "LOCKSTEP_BOX": where}
        self.environment["PATH"] = f"{where}/bin:{self.environment['PATH']}:/usr/sbin:/sbin"
        first = _first_in_other_namespace(self.process.pid)
        self.loopback = first is None
        self.enter = [] if first is None else ["nsenter", f"--target={first}", "--mount", "--net", "--uts", "--pid"]
        if self.enter and os.getuid():
            self.enter += ["--user", "--preserve-credentials"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.communicate()  # closes the pipe, at which the box ends
        self.errors.close()

    def popen(self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None, **more: Any) -> Command:
        """Start a command on the login node; `env` is added to the environment, the rest is for Popen."""
        command = [*self.enter, "env", f"--chdir={cwd or ROOT}", *words]
        return Command(command, env=self.environment | (env or {}), **more)

    def run(
        self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node; stdout and stderr as text."""
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        with self.popen(*words, cwd=cwd, env=env, text=True, **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def sbatch(self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Submit a batch job; return its id."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def steer(self, *words: str) -> None:
        """`box node kill node2`, `box ctl restart` and the like."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        assert self._answer() == "0", f"box {' '.join(words)} failed:\n{self._said()}"

    def queue(self) -> dict[str, str]:
        """The state of every job there has been, by its id."""
        lines = self.run("squeue", "--noheader", "--states=all", "--format=%i %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def job(self, job_id: str) -> dict[str, str]:
        """What slurmctld knows of a job: JobState, Restarts, ExitCode, BatchHost, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job_id: str, state: str, seconds: float = 60, restarts: int = 0) -> dict[str, str]:
        """Wait until a job is in a state, in its `restarts`-th new life or a later one; return `job(job_id)`.

        Raises:
            AssertionError: the job ended in another state, or `seconds` went by.
        """
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            found = job.get("JobState", "unknown")
            if found == state and int(job["Restarts"]) >= restarts:
                return job
            if found in ENDED or time.monotonic() > deadline:
                log = (self.folder / "log" / "slurmctld.log").read_text(errors="replace").splitlines()[-15:]
                raise AssertionError(f"job {job_id} is {found}, not {state}: {job}\n" + "\n".join(log))
            time.sleep(0.1)

    def start_again_now(self, job_id: str) -> None:
        """Wait until a job is requeued, then spare it most of the 6 s that Slurm would let it wait."""
        deadline = time.monotonic() + 60
        while self.job(job_id)["Restarts"] == "0":
            assert time.monotonic() < deadline, f"job {job_id} was not requeued: {self.job(job_id)}"
            time.sleep(0.1)
        time.sleep(2)  # in the very second of the requeue a node takes the new start for the old one, and refuses it
        if self.job(job_id)["JobState"] == "PENDING":
            self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


class Command(subprocess.Popen[Any]):
    """A process on the login node. nsenter waits outside for the command inside, and passes no signal on: this does."""

    def send_signal(self, number: int) -> None:
        entered = isinstance(self.args, list) and self.args[0] == "nsenter"
        inside = children(self.pid) if entered and self.poll() is None else []
        if not inside:
            super().send_signal(number)
        for pid in inside:
            os.kill(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _first_in_other_namespace(pid: int) -> int | None:
    """The first descendant with processes of its own: the box's process 1. None where it has no namespaces."""
    for child in children(pid):
        if os.readlink(f"/proc/{child}/ns/pid") != os.readlink("/proc/self/ns/pid"):
            return child
        if found := _first_in_other_namespace(child):
            return found
    return None
