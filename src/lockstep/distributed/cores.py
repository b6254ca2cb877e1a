"""How many threads a rank computes with, and who says so: the user, the environment, or what this machine leaves it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lockstep.config.schema import MOST_THREADS
from lockstep.distributed.environment import LAUNCHER
from lockstep.errors import UserError
from lockstep.utils.system import stat_fields
from lockstep.utils.text import count

OMP = "OMP_NUM_THREADS"


def control_groups(controller: str, machine: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control groups for memory, cpu or pids, the innermost first; each with its version.

    Source: cgroups(7). `machine` is where `proc` and `sys` are; nothing comes from a kernel without control groups.
    """
    try:
        lines = (machine / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = machine / "sys/fs/cgroup" / controllers
        folder = root / path.lstrip("/")
        if not folder.is_dir():  # inside a container its own group is the root
            folder = root
        for group in [folder, *folder.parents]:
            yield group, 1 if controllers else 2
            if group == root:
                break


def core_quota(machine: Path = Path("/")) -> float | None:
    """The cores' worth of time that this process's control groups allow: a container's limit; None: no limit."""
    limits: list[float] = []
    for folder, version in control_groups("cpu", machine):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
                )
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def usable_cores(machine: Path = Path("/")) -> int:
    """Cores that this process may keep busy: those it is bound to, or fewer where a control group gives it less time."""
    bound = len(os.sched_getaffinity(0))
    quota = core_quota(machine)
    return bound if quota is None else max(1, min(bound, int(quota)))


def threads_of_rank(
    ranks_here: int, asked: int | None, env: Mapping[str, str], machine: Path = Path("/")
) -> tuple[int, str]:
    """(threads with which a rank computes, who says so).

    The first of these that says something: the key `threads`; OMP_NUM_THREADS, as OpenMP heeds it; the least of the cores
    that this process is bound to, its control groups' quota and Slurm's share of a task. Cores and quota are divided
    among the host's ranks; what Slurm gives each task is its own already.

    Args:
        ranks_here: ranks on this host.
        asked: the key `threads`.
        env: this rank's environment.
    """
    if asked:
        return asked, f"threads={asked}"
    if wish := wished_threads(env):
        return wish, f"{OMP}={env[OMP]}"
    bound, quota = len(os.sched_getaffinity(0)), core_quota(machine)
    among = f" among {count(ranks_here, 'rank')}" if ranks_here > 1 else ""
    by_slurm = env.get("SLURM_CPUS_PER_TASK", "") if "SLURM_STEP_ID" in env and ranks_here > 1 else ""
    if by_slurm.isdecimal() and int(by_slurm) > 0:
        share = min(int(by_slurm), bound), f"SLURM_CPUS_PER_TASK={by_slurm}"
    else:
        share = max(1, bound // ranks_here), f"{count(bound, 'core')}{among}"
    if quota is not None and (least := max(1, int(quota / ranks_here))) < share[0]:
        return least, f"a control group's quota of {quota:g} cores{among}"
    return share


def wished_threads(env: Mapping[str, str]) -> int | None:
    """What OMP_NUM_THREADS says, where it is somebody's wish; None: nothing that counts.

    torchrun sets it to 1 in its children where nobody has set it and there are several: that stands for "nobody has said",
    and with it a rank would leave all other cores idle. So a 1 in torchrun's child counts only where torchrun itself was
    started with it, which the kernel tells. Launchers of ours set nothing: what their ranks have is the user's.

    Source: torch/distributed/run.py, config_from_args; https://www.openmp.org/spec-html/5.0/openmpse50.html (a list of
    numbers is one a level of nesting). A value that is no number is nobody's wish, as OpenMP takes it.
    """
    wish = openmp_threads(env)
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and LAUNCHER not in env and env.get("LOCAL_WORLD_SIZE") != "1"
    return None if wish == 1 and by_torchrun and not torchrun_was_told() else wish


def openmp_threads(env: Mapping[str, str]) -> int | None:
    """The number that OMP_NUM_THREADS begins with; None: it is not set, or no number of threads."""
    first = env.get(OMP, "").split(",")[0].strip()
    return int(first) if first.isdecimal() and 0 < int(first) <= MOST_THREADS else None


def torchrun_was_told(process: int | None = None) -> bool:
    """Whether the nearest process above this one that is no child of torchrun's, torchrun itself, was started with
    OMP_NUM_THREADS. What it sets later is not in what /proc shows of it."""
    process = process or os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while process > 1:
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            if not any(each.startswith(b"TORCHELASTIC_RUN_ID=") for each in variables):
                return any(each.startswith(OMP.encode() + b"=") for each in variables)
            process = int(stat_fields(process)[1])
    return False


def check_threads(threads: int | None, env: Mapping[str, str]) -> None:
    """Hold OMP_NUM_THREADS, where the key `threads` leaves it to that, to what can be started.

    Raises:
        UserError: it is no number of threads.
    """
    if threads is None and env.get(OMP, "").split(",")[0].strip() and openmp_threads(env) is None:
        raise UserError(f"{OMP}={env[OMP]}: allowed are 1…{MOST_THREADS}; unset it, or set threads=…")
