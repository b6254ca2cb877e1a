"""A Slurm job: whether its shape and settings fit the run."""

from __future__ import annotations

import os
import re
import subprocess
import time
from datetime import datetime

from lockstep.diagnose.findings import Facts, Findings
from lockstep.diagnose.probes.ranks import ranks_by_host
from lockstep.utils.text import count

VARIABLES = """JOB_ID JOB_NUM_NODES STEP_NUM_TASKS STEP_ID NTASKS CPUS_PER_TASK CPUS_ON_NODE GPUS_ON_NODE JOB_GPUS
    RESTART_COUNT PROCID JOB_PARTITION""".split()
SHORT_MINUTES = 10


def probe_slurm(rank: int) -> Facts:
    """What Slurm says of this task, and on rank 0 of its job; nothing outside of a job."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    found: Facts = {name: os.environ[f"SLURM_{name}"] for name in VARIABLES if f"SLURM_{name}" in os.environ}
    if rank == 0:
        said = output_of("scontrol", "--oneliner", "show", "job", found["JOB_ID"])
        found["job"] = dict(re.findall(r"\b(EndTime|Requeue|TimeLimit|Partition)=(\S*)", said)) if said else None
        found["now"] = time.strftime("%Y-%m-%dT%H:%M:%S")  # in the time zone of the job's own times
        found["notice"] = signal_option(output_of("scontrol", "write", "batch_script", found["JOB_ID"], "-") or "")
    return found


def signal_option(script: str) -> str:
    """What a batch script's --signal says, such as USR1@120; empty: nothing."""
    found = re.findall(r"^#SBATCH\s(?:.*\s)?(?:--signal[= ]|-s\s?)['\"]?([\w:@]+)", script, re.MULTILINE)
    return found[-1] if found else ""


def output_of(*command: str) -> str | None:
    """What a command prints; None where it cannot be run, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def judge_slurm(ranks: list[Facts]) -> Findings:
    found, about = Findings("slurm"), ranks[0]["slurm"]
    if not about:
        return found
    job = f"job {about['JOB_ID']}"
    nodes, hosts = int(about.get("JOB_NUM_NODES", "1")), ranks_by_host(ranks)
    if nodes > len(hosts):
        found.warning(f"{job} has {nodes} nodes, and ranks on {len(hosts)}", f"start them with srun --nodes={nodes}")
    for host, some in hosts.items():
        one = some[0]["slurm"]
        gpus, cpus = int(one.get("GPUS_ON_NODE") or 0), int(one.get("CPUS_ON_NODE") or 0)
        used = {each["device"].get("uuid") for each in some if each["device"].get("type") == "cuda"}
        if gpus > len(used):
            figure = f"{job} holds {count(gpus, 'GPU')} of {host}, and its {count(len(some), 'task')} use {len(used)}"
            found.warning(figure, "ask for as many tasks per node as GPUs, and let device=auto find them")
        free = len({core for each in some for core in each["cores"].get("allowed", [])})
        if free and free < min(cpus, some[0]["cores"].get("present", cpus)):
            figure = f"{job} holds {cpus} CPUs of {host}, and its tasks may use {free}"
            found.warning(figure, "set cluster.cpus_per_task, or srun --cpus-per-task")
    judge_job(about, job, found)
    if all(each.verdict == "ok" for each in found):
        again = int(about.get("RESTART_COUNT", "0"))
        figure = f"{job}: {count(len(ranks), 'rank')} on {count(len(hosts), 'node')}"
        found.ok(figure + (f", requeued {count(again, 'time')} so far" if again else ""))
    return found


def judge_job(about: Facts, job: str, found: Findings) -> None:
    """Add the time left, requeueing, and the notice before the end."""
    known = about.get("job")
    if not known:
        found.warning(f"{job}: scontrol does not answer there", "look with: scontrol show job")
        return
    minutes, signal = minutes_between(about["now"], known.get("EndTime", "")), about["notice"]
    if minutes is not None and minutes < SHORT_MINUTES:
        found.warning(f"{job} ends in {minutes:.0f} minutes", "ask for more: cluster.time_minutes, or sbatch --time")
    if known.get("Requeue") == "0":
        found.warning(f"{job} is not requeued after a preemption or a lost node", "submit it with --requeue")
    if signal.startswith("B:"):
        figure = f"{job}: --signal={signal} reaches the batch script's shell, and no rank"
        found.warning(figure, f"write --signal={signal[2:]}")
    elif not signal:
        figure = f"{job}: no --signal in its script; the time limit then comes as SIGTERM, with KillWait left to save"
        found.warning(figure, "submit it with --signal=USR1@120")
    elif minutes is not None:
        found.ok(f"{job}: {minutes:.0f} minutes left, requeued when asked, notice {signal}")


def minutes_between(now: str, end: str) -> float | None:
    """Minutes between two of Slurm's times; None where there is no end."""
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(now)).total_seconds() / 60
    except ValueError:  # Unknown
        return None
