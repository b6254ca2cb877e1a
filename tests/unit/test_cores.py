"""With how many threads a rank computes: whose word counts, and what control groups say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lockstep.distributed.cores import (
    check_threads,
    control_groups,
    core_quota,
    threads_of_rank,
    torchrun_was_told,
    usable_cores,
)
from lockstep.errors import UserError
from tests.helpers.harness import ROOT, clean_environment
from tests.helpers.processes import TORCHRUN, free_port

SLURM = {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "3"}
OLD = {
    "proc/self/cgroup": "4:cpu,cpuacct:/slurm/job_7\n1:memory:/x\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "550000\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_period_us": "100000\n",
}
NEW = {
    "proc/self/cgroup": "0::/box/inner\n",
    "sys/fs/cgroup/box/inner/cpu.max": "max 100000\n",
    "sys/fs/cgroup/box/cpu.max": "550000 100000\n",
    "sys/fs/cgroup/cpu.max": "nonsense\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("ranks", "asked", "env", "found"),
    [
        (2, 5, {"OMP_NUM_THREADS": "3", **SLURM}, (5, "threads=5")),
        (2, None, {"OMP_NUM_THREADS": "7", **SLURM}, (7, "OMP_NUM_THREADS=7")),
        (2, None, {"OMP_NUM_THREADS": "6,2"}, (6, "OMP_NUM_THREADS=6,2")),
        (2, None, {"OMP_NUM_THREADS": "1"}, (1, "OMP_NUM_THREADS=1")),
        (2, None, {"OMP_NUM_THREADS": "", **SLURM}, (3, "SLURM_CPUS_PER_TASK=3")),
        (1, None, SLURM, (8, "8 cores")),
        (2, None, {"SLURM_CPUS_PER_TASK": "3"}, (4, "8 cores among 2 ranks")),  # the shell of an allocation
        (2, None, {**SLURM, "SLURM_CPUS_PER_TASK": "12"}, (8, "SLURM_CPUS_PER_TASK=12")),
        (20, None, {"OMP_NUM_THREADS": "many"}, (1, "8 cores among 20 ranks")),
    ],
)
def test_the_first_who_says_something_wins(
    ranks: int, asked: int | None, env: dict[str, str], found: tuple[int, str], tmp_path: Path
) -> None:
    assert threads_of_rank(ranks, asked, env, tmp_path) == found, "no control groups there"


@pytest.mark.parametrize("files", [OLD, NEW], ids=["version 1", "version 2"])
def test_the_quota_of_a_control_group_is_heeded(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, files)
    assert {version for _, version in control_groups("cpu", tmp_path)} == {1 if files is OLD else 2}
    assert core_quota(tmp_path) == 5.5
    assert usable_cores(tmp_path) == 5
    assert threads_of_rank(1, None, {}, tmp_path) == (5, "a control group's quota of 5.5 cores")
    assert threads_of_rank(2, None, {}, tmp_path) == (2, "a control group's quota of 5.5 cores among 2 ranks")
    assert threads_of_rank(2, None, SLURM, tmp_path)[0] == 2, "the smaller of Slurm's share and the quota"
    assert threads_of_rank(8, None, {}, tmp_path) == (1, "8 cores among 8 ranks"), "as few as without it"
    assert threads_of_rank(2, 4, {}, tmp_path) == (4, "threads=4")
    assert threads_of_rank(2, None, {"OMP_NUM_THREADS": "4"}, tmp_path) == (4, "OMP_NUM_THREADS=4")
    for file in tmp_path.rglob("cpu.*"):
        file.write_text(file.read_text().replace("550000", "1000000"))
    assert core_quota(tmp_path) == 10
    assert usable_cores(tmp_path) == 8, "no more than the cores"


@contextmanager
def quota_of(cores: float) -> Iterator[Path | None]:
    """A real control group with so much time, where this machine lets us make one."""
    for parent, version in control_groups("cpu"):
        group = parent / f"test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if version == 2:
                (group / "cpu.max").write_text(f"{int(cores * 1e5)} 100000")
            else:
                (group / "cpu.cfs_quota_us").write_text(str(int(cores * 1e5)))
        except OSError:  # its parent hands on no such limits
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


SAYS = "import os; from lockstep.distributed.cores import *; print('SAYS', threads_of_rank({}, None, os.environ))"


def test_a_real_control_group(tmp_path: Path) -> None:
    with quota_of(1.5) as group:
        enter = f"echo $$ > {group}/cgroup.procs && " if group else ""
        words = ["sh", "-c", f'{enter}exec "$0" "$@"', sys.executable, "-c", SAYS.format(1)]
        done = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True)
    here = os.cpu_count() or 1
    if group and here > 1:
        assert done.stdout == 'SAYS (1, "a control group\'s quota of 1.5 cores")\n'
    else:
        assert done.stdout.startswith("SAYS (")


@pytest.mark.slow_except("set by torchrun")
@pytest.mark.parametrize(
    ("omp", "found"),
    [({}, "'8 cores among 2 ranks'"), ({"OMP_NUM_THREADS": "1"}, "'OMP_NUM_THREADS=1'")],
    ids=["set by torchrun", "set by the user"],
)
def test_torchrun_s_own_1_is_nobody_s_wish(omp: dict[str, str], found: str, tmp_path: Path) -> None:
    file = tmp_path / "says.py"
    file.write_text(f"import os\nos.sched_getaffinity = lambda _: range(8)\n{SAYS.format(2)}")
    # A shell in between has torchrun's variable from the start.
    words = [*TORCHRUN, "--no-python", "--nproc-per-node=2", f"--master-port={free_port()}"]
    words += ["sh", "-c", '"$0" "$1"; true', sys.executable, str(file)]
    environment = {key: value for key, value in clean_environment().items() if key != "OMP_NUM_THREADS"} | omp
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("SAYS")]
    assert len(said) == 2, done.stderr
    assert all(found in line for line in said), said


def test_a_process_that_cannot_be_read_was_not_told() -> None:
    assert not torchrun_was_told(2**30)


@pytest.mark.parametrize("omp", ["many", "0", "-1", "1.5", "5000", "99999999999999999999"])
def test_what_is_no_number_of_threads_is_refused(omp: str) -> None:
    with pytest.raises(UserError, match=rf"OMP_NUM_THREADS={omp}: allowed are 1…4096; unset it, or set threads="):
        check_threads(None, {"OMP_NUM_THREADS": omp})
    check_threads(2, {"OMP_NUM_THREADS": omp})  # the key decides


@pytest.mark.parametrize("words", [{}, {"OMP_NUM_THREADS": ""}, {"OMP_NUM_THREADS": "4,2"}])
def test_what_is_a_number_of_threads_or_nothing_is_taken(words: dict[str, str]) -> None:
    check_threads(None, words)
