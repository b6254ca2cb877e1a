"""recipes.doctor: what it says of made-up machines, what real ranks find, and its exit code where a run would fail."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep import Run
from lockstep.diagnose import bandwidth
from lockstep.diagnose.bandwidth import bandwidth_plot, measure_bandwidth, pair_rounds
from lockstep.diagnose.findings import Facts, failed_checks, summarized
from lockstep.diagnose.preflight import Needs, judge_ranks
from lockstep.diagnose.probes import determinism, machine, network, versions
from lockstep.diagnose.probes import files as file_system
from lockstep.diagnose.probes.ranks import first_rank_of_hosts
from lockstep.diagnose.probes.slurm import minutes_between, signal_option
from lockstep.diagnose.probes.versions import unmet_requirements
from lockstep.distributed.cores import control_groups, core_quota
from lockstep.distributed.process_group import World
from lockstep.utils import files
from recipes import ddp, doctor
from tests.helpers.harness import command, execute, run_ranks
from tests.helpers.slurm_box import Box

NEEDS = Needs(checkpoint_bytes=100 * 2**20, keep=2, gradient_bytes=50 * 2**20)


# Made up ------------------------------------------------------------------------------------------------------------


def machines(*hosts: str, gpu: bool = False) -> list[Facts]:
    """Facts of sound ranks, one for each host name given."""
    found: list[Facts] = []
    for rank, host in enumerate(hosts):
        local = hosts[:rank].count(host)
        ranks_here, first = hosts.count(host), rank in first_rank_of_hosts(list(hosts))
        device: Facts = {"type": "cpu", "name": "EPYC", "gpus_visible": 0, "gpus_present": 0}
        if gpu:
            device = {
                "type": "cuda",
                "name": "H200",
                "uuid": f"{host}-{local}",
                "gpus_visible": ranks_here,
                "gpus_present": 8,
            }
            device |= {"driver": "580.1", "used_bytes": 2**29, "total_bytes": 2**37}
        found.append(
            {
                "rank": rank,
                "host": host,
                "versions": {
                    "python": "3.12.1",
                    "packages": {"torch": "2.15.0", "torchvision": "0.29.2", "lockstep": "0.1.0"},
                    "imported torch": "2.15.0+cu130",
                    "cuda": "13.0",
                    "nccl": "2.30.7",
                    "git_commit": "abc",
                    "unmet": [],
                },
                "device": device,
                "cores": {"allowed": list(range(8)), "present": 8, "quota": None, "threads": 8 // ranks_here}
                | {"workers": 0, "load": 0.5},
                "resources": {"workers": 2, "batch_bytes": [2**20, 2**20], "shared_bytes": 2**26, "temporary": "/tmp"}
                | {"files": [1024, 50], "processes": [1000, "ulimit -u"]},
                "network": {"backend": "nccl" if gpu else "gloo", "master": [hosts[0], "15007"], "agent": True}
                | {"kernel_ports": [32768, 60999], "variables": {}, "infiniband": [], "interface": "eth0", "mtu": 1500},
                "reach": {name: {"addresses": [f"10.0.0.{n}"], "seconds": 3e-4} for n, name in enumerate(set(hosts))}
                if first
                else {},
                "clock": {host: {"ahead": 0.001, "trip": 2e-4} for host in set(hosts[1:]) - {hosts[0]}}
                if rank == 0
                else {},
                "files": {"seen": 0.01, "write_error": None, "unseen": []}
                | {"swaps": {"written": 90} if rank == 0 else {"read": 400, "missing": 0, "torn": 0}}
                | ({"made": None} if rank == 0 else {"locked": True})
                | (
                    {
                        "disk": {
                            "write_bytes_per_second": 5e8,
                            "fsync_seconds": 2e-3,
                            "free_bytes": 2**40,
                            "kind": "nfs4",
                        }
                    }
                    if first
                    else {}
                ),
                "pace": {"flops": 5e10},
                "determinism": {"digests": ["d1"] * 4, "off": 3e-8},
                "slurm": {},
            }
        )
    return found


def speeds(hosts: tuple[str, ...], slow: tuple[int, int] | None = None, between: float = 2e9) -> Facts:
    rows = [
        {"bytes": size, "seconds": 1e-4 + size / 1e9, "bandwidth": size / (1e-4 + size / 1e9)}
        for size in bandwidth.SIZES
    ]
    pairs = []
    for a, b in combinations(range(len(hosts)), 2):
        rate = 8e9 if hosts[a] == hosts[b] else between
        rate /= 10 if (a, b) == slow else 1
        pairs.append({"ranks": (a, b), "hosts": [hosts[a], hosts[b]], "latency": 3e-5, "bandwidth": rate})
    return {"collectives": dict.fromkeys(bandwidth.LABELS, rows), "pairs": pairs}


FOUR = ("node1", "node1", "node2", "node2")


@pytest.mark.parametrize("hosts", [("box",), ("box", "box"), FOUR, ("a", "b", "c")])
@pytest.mark.parametrize("gpu", [False, True])
def test_sound_machines_are_called_so(hosts: tuple[str, ...], gpu: bool) -> None:
    found = judge_ranks(machines(*hosts, gpu=gpu), speeds(hosts) if len(hosts) > 1 else {}, NEEDS)
    assert {each.verdict for each in found} == {"ok"}, found
    assert {each.remedy for each in found} == {""}
    expected = [
        "versions",
        "devices",
        "cores",
        "resources",
        "pace",
        "network",
        "names",
        "ports",
        "clocks",
        "files",
        "links",
        "determinism",
    ]
    if len(set(hosts)) == 1:
        expected.remove("clocks")
    assert list(dict.fromkeys(each.check for each in found)) == expected


def put(section: str, ranks: tuple[int, ...] = (3,), **values: Any) -> Callable[[list[Facts]], None]:
    """A change of some ranks' facts."""

    def change(found: list[Facts]) -> None:
        for rank in ranks:
            found[rank][section] |= copy.deepcopy(values)

    return change


def version(package: str, what: str) -> Callable[[list[Facts]], None]:
    def change(found: list[Facts]) -> None:
        for rank in (2, 3):
            found[rank]["versions"]["packages"][package] = what

    return change


def filesystem(**values: Any) -> Callable[[list[Facts]], None]:
    def change(found: list[Facts]) -> None:
        found[2]["files"]["disk"] |= values

    return change


def in_a_job(found: list[Facts], **values: Any) -> None:
    for each in found:
        each["slurm"] = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "CPUS_ON_NODE": "8"}
    found[0]["slurm"] |= {
        "job": {"EndTime": "2026-11-21T13:00:00", "Requeue": "1"},
        "now": "2026-11-21T12:00:00",
        "notice": "USR1@120",
    } | values


def job(**values: Any) -> Callable[[list[Facts]], None]:
    return lambda found: in_a_job(found, **values)


def gpus_held(found: list[Facts]) -> None:
    in_a_job(found)
    for each in found:
        each["slurm"]["GPUS_ON_NODE"] = "4"


def bound(found: list[Facts]) -> None:
    in_a_job(found)
    for each in found:
        each["cores"] |= {"allowed": [0], "threads": 1}


# What is changed, the verdict that it must get, and words that figure and remedy must hold.
TROUBLES: dict[str, tuple[Callable[[list[Facts]], None], str, str, list[str]]] = {
    "another torch": (
        version("torch", "2.14.0"),
        "versions",
        "fails",
        ["torch 2.15.0 on node1; 2.14.0 on node2", "same on every host"],
    ),
    "another torchvision": (version("torchvision", "0.28.0"), "versions", "warning", ["0.28.0 on node2"]),
    "a package on one host alone": (
        version("ray", "2.60"),
        "versions",
        "warning",
        ["ray none on node1; 2.60 on node2"],
    ),
    "another commit": (put("versions", (2, 3), git_commit="def"), "versions", "warning", ["abc on node1", "commit"]),
    "versions that do not fit": (
        put("versions", (0, 1, 2, 3), unmet=["torchvision 0.29.2 wants torch==2.15.0, and 2.14.0 is installed"]),
        "versions",
        "warning",
        ["wants torch==2.15.0", "constraints.txt"],
    ),
    "two torches": (put("versions", **{"imported torch": "2.13.0"}), "versions", "warning", ["2.13.0", "PYTHONPATH"]),
    "a GPU less": (
        put("device", (2, 3), type="cpu"),
        "devices",
        "fails",
        ["cuda on node1; cpu on node2", "device=cpu"],
    ),
    "one GPU for two": (
        put("device", uuid="node2-0"),
        "devices",
        "fails",
        ["ranks 2, 3 share one GPU of node2", "one rank per GPU"],
    ),
    "other GPUs": (put("device", (2, 3), name="T4"), "devices", "warning", ["H200 on node1; T4 on node2", "alike"]),
    "a GPU that is taken": (put("device", used_bytes=2**36), "devices", "warning", ["65,536 of 131,072", "nvidia-smi"]),
    "GPUs without ranks": (put("device", gpus_visible=4), "devices", "warning", ["2 of 4 GPUs of node2", "nproc=4"]),
    "threads": (
        put("cores", (2, 3), threads=8),
        "cores",
        "warning",
        ["node2: 2 ranks with 16 threads on 8", "threads=4"],
    ),
    "a container": (
        put("cores", (2, 3), quota=2.0),
        "cores",
        "warning",
        ["8 threads on 2 cores", "limit", "threads=1"],
    ),
    "ranks on one core": (put("cores", (2, 3), allowed=[5], threads=1), "cores", "warning", ["at most 1 rank there"]),
    "a busy host": (put("cores", (2,), load=30.0), "cores", "warning", ["node2: 30 processes", "other work"]),
    "a rank that is slow": (
        put("pace", (1,), flops=2e10),
        "pace",
        "warning",
        ["at 50 GFLOP/s; rank 1 (node1) at 20", "throttled"],
    ),
    "another mtu": (put("network", (2, 3), mtu=9000), "network", "warning", ["mtu", "9000 on node2", "IFNAME"]),
    "InfiniBand unused": (
        put("network", (0, 1, 2, 3), infiniband=["mlx5_0"], variables={"NCCL_IB_DISABLE": "1"}),
        "network",
        "warning",
        ["mlx5_0", "unset NCCL_IB_DISABLE"],
    ),
    "a name that none knows": (
        put("reach", (2,), node1={"error": "gaierror: Name or service not known"}),
        "names",
        "warning",
        ["node2 cannot resolve node1", "/etc/hosts"],
    ),
    "a name that is itself": (
        put("reach", (2,), node1={"addresses": ["127.0.1.1"], "seconds": 1e-4}),
        "names",
        "warning",
        ["node1 is 127.0.1.1 on node2", "/etc/hosts"],
    ),
    "a firewall": (
        put("reach", (2,), node1={"addresses": ["10.0.0.1"], "refused": "timed out"}),
        "names",
        "warning",
        ["node2 cannot connect to node1 (10.0.0.1): timed out", "firewall"],
    ),
    "a port of the kernel's": (
        put("network", (0,), agent=False, master=["node1", "40000"]),
        "ports",
        "warning",
        ["node1:40000", "MASTER_PORT below 32768"],
    ),
    "a clock": (
        put("clock", (0,), node2={"ahead": -3.0, "trip": 1e-3}),
        "clocks",
        "warning",
        ["node2 is 3 s behind node1", "chrony"],
    ),
    "a folder that is not shared": (
        put("files", (2, 3), seen=None, write_error="FileNotFoundError: …"),
        "files",
        "fails",
        ["not shared: rank 2 (node2), rank 3 (node2)", "all hosts mount"],
    ),
    "a rank whose file nobody sees": (put("files", (0,), unseen=[3]), "files", "fails", ["not shared: rank 3 (node2)"]),
    "a rename in two pieces": (
        put("files", swaps={"read": 90, "missing": 3, "torn": 2}),
        "files",
        "fails",
        ["rank 3 (node2)", "2 times torn, 3 times missing", "atomic"],
    ),
    "a file that cannot be replaced": (
        put("files", (0,), swaps={"error": "OSError: [Errno 30] Read-only file system"}),
        "files",
        "fails",
        ["rank 0 cannot replace a file: OSError: [Errno 30]"],
    ),
    "a disk that is full on one host": (
        put("files", (2,), disk={"error": "OSError: No space left on device"}),
        "files",
        "fails",
        ["node2 cannot write a large file: OSError: No space"],
    ),
    "a folder that is late": (put("files", seen=4.0), "files", "warning", ["within 4 s", "actimeo"]),
    "a lock that holds nobody": (put("files", locked=False), "files", "warning", ["does not keep", "two runs"]),
    "a slow disk": (filesystem(write_bytes_per_second=1e6), "files", "warning", ["1 MB/s", "node2", "105 s"]),
    "a slow fsync": (filesystem(fsync_seconds=2.0), "files", "warning", ["fsync 2e+03 ms"]),
    "memory for a disk": (filesystem(kind="tmpfs"), "files", "warning", ["tmpfs", "it is memory"]),
    "a full disk": (filesystem(free_bytes=2**20), "files", "fails", ["1 MiB free", "not one checkpoint"]),
    "a disk soon full": (filesystem(free_bytes=250 * 2**20), "files", "warning", ["250 MiB free", "checkpoint.keep"]),
    "a wrong sum": (put("determinism", off=0.01), "determinism", "fails", ["wrong by 0.01 on rank 3 (node2)"]),
    "a sum that is no number": (put("determinism", off=float("nan")), "determinism", "fails", ["wrong by nan"]),
    "other bits": (
        put("determinism", digests=["d1"] * 3 + ["d2"]),
        "determinism",
        "fails",
        ["rank 3", "would diverge"],
    ),
    "other bits each time": (
        put("determinism", (0, 1, 2, 3), digests=["d1", "d2", "d1", "d1"]),
        "determinism",
        "warning",
        ["2 different results", "NCCL_ALGO"],
    ),
    "what cannot be looked at": (
        put("cores", (1,), error="PermissionError: no"),
        "cores",
        "warning",
        ["rank 1 (node1): PermissionError: no"],
    ),
    "nodes without ranks": (
        lambda found: (in_a_job(found), found[0]["slurm"].update(JOB_NUM_NODES="3"))[0],
        "slurm",
        "warning",
        ["3 nodes, and ranks on 2", "--nodes=3"],
    ),
    "GPUs that Slurm holds": (gpus_held, "slurm", "warning", ["4 GPUs of node1, and its 2 tasks use 2"]),
    "CPUs that srun hides": (bound, "slurm", "warning", ["8 CPUs of node1, and its tasks may use 1", "cpus_per_task"]),
    "the last minutes": (job(now="2026-11-21T12:55:00"), "slurm", "warning", ["ends in 5 minutes", "time_minutes"]),
    "no requeue": (job(job={"EndTime": "Unknown", "Requeue": "0"}), "slurm", "warning", ["not requeued", "--requeue"]),
    "no notice": (job(notice=""), "slurm", "warning", ["no --signal", "USR1@120"]),
    "a notice to the shell": (job(notice="B:USR1@60"), "slurm", "warning", ["B:USR1@60", "no rank"]),
    "a silent scontrol": (job(job=None), "slurm", "warning", ["scontrol does not answer"]),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_is_named_with_a_remedy(name: str) -> None:
    change, check, verdict, words = TROUBLES[name]
    found = machines(*FOUR, gpu=True)
    change(found)
    bad = [each for each in judge_ranks(found, speeds(FOUR), NEEDS) if each.verdict != "ok"]
    assert (check, verdict) in [(each.check, each.verdict) for each in bad], bad
    assert verdict == "fails" or not failed_checks(bad), "it works, and costs something"
    said = " ".join(f"{each.figure} | {each.remedy}" for each in bad if each.check == check)
    assert all(word in said for word in words), said
    assert all(each.remedy for each in bad)


def spoil_all(found: list[Facts]) -> None:
    """On a thousand ranks everything that can differ does."""
    for each in found:
        rank, host = each["rank"], each["host"]
        each["versions"]["packages"] |= {"torch": f"2.15.{rank}"}
        each["versions"] |= {"python": f"3.12.{rank}", "unmet": [f"torchvision wants torch=={rank % 3}"]}
        each["device"] |= {"name": f"GPU {rank}", "driver": host, "uuid": host, "used_bytes": 2**36}
        each["cores"] |= {"threads": 64, "load": 99.0, "allowed": list(range(rank % 8 + 1))}
        each["resources"] |= {"shared_bytes": 1, "temporary": "/tmp/" + 100 * "x"}
        each["resources"] |= {"files": [10, 9], "processes": [1, "ulimit -u"]}
        each["network"] |= {"mtu": 1000 + rank, "megabits": rank + 1}
        each["clock"] = {name: look | {"ahead": 9.0} for name, look in each["clock"].items()}
        each["reach"] = {name: {"error": "unknown"} for name in each["reach"]}
        each["files"] |= {"seen": None if rank else 0.01}
        each["slurm"] = {"JOB_ID": "7", "JOB_NUM_NODES": "256", "CPUS_ON_NODE": "8", "GPUS_ON_NODE": "8"}
    found[0]["slurm"] |= {"job": None}


def test_what_is_wrong_on_a_thousand_ranks_fits_a_few_screens() -> None:
    found = machines(*(f"node{rank // 8:03}" for rank in range(1024)), gpu=True)
    spoil_all(found)
    judged = judge_ranks(found, {}, NEEDS)
    assert len(judged) > 1024, "the file has a line for each rank"
    assert max(len(each.figure) for each in judged) < 200
    shown = summarized(judged, "preflight.json")
    assert len(shown) < 80
    assert list(dict.fromkeys(each.check for each in shown)) == list(dict.fromkeys(each.check for each in judged))
    more = [
        int(each.figure.split()[1]) for each in shown if each.figure.endswith("more like it; preflight.json has all")
    ]
    assert len(judged) == len(shown) - len(more) + sum(more), "none is left out"


def test_a_job_that_fits_is_called_so() -> None:
    found = machines(*FOUR, gpu=True)
    in_a_job(found)
    rows = [each for each in judge_ranks(found, speeds(FOUR), NEEDS) if each.check == "slurm"]
    assert [each.verdict for each in rows] == ["ok", "ok"], rows
    assert "60 minutes left" in rows[0].figure
    assert "USR1@120" in rows[0].figure


def test_eight_ranks_with_eight_threads_on_eight_cores() -> None:
    found = machines(*["big"] * 8)
    for each in found:
        each["cores"]["threads"] = 8
    (row,) = [each for each in judge_ranks(found, {}, NEEDS) if each.check == "cores"]
    assert (row.verdict, row.remedy) == ("warning", "set threads=1")
    assert "8 ranks with 64 threads on 8 cores" in row.figure


def test_device_cpu_where_gpus_are_is_named() -> None:
    found = machines("box", "box")
    for each in found:
        each["device"]["gpus_visible"] = 2
    (row,) = [each for each in judge_ranks(found, {}, NEEDS) if each.check == "devices"]
    assert (row.verdict, row.remedy) == ("warning", "set device=cuda")


@pytest.mark.parametrize(("cuda", "remedy"), [("13.0", "update the driver"), (None, "built for CUDA")])
def test_gpus_that_torch_does_not_see_are_named(cuda: str | None, remedy: str) -> None:
    found = machines("box")
    found[0]["device"]["gpus_present"], found[0]["versions"]["cuda"] = 4, cuda
    (row,) = [each for each in judge_ranks(found, {}, NEEDS) if each.check == "devices"]
    assert (row.verdict, row.figure) == ("warning", f"box has 4 GPUs, and torch (CUDA {cuda or 'none'}) sees none")
    assert remedy in row.remedy


def test_slow_links_are_named() -> None:
    three = ("a", "b", "c")
    rows = [each for each in judge_ranks(machines(*three), speeds(three, slow=(1, 2)), NEEDS) if each.check == "links"]
    assert [each.verdict for each in rows] == ["ok", "warning"]
    assert "slowest ranks 1 (b) and 2 (c) with 0.2 GB/s" in rows[1].figure
    assert rows[1].remedy.startswith(("leave out b", "leave out c"))
    rows = [each for each in judge_ranks(machines(*three), speeds(three, between=1e7), NEEDS) if each.check == "links"]
    assert (rows[1].verdict, "GLOO_SOCKET_IFNAME" in rows[1].remedy) == ("warning", True)


SHAPES = [["a"] * 2, ["a"] * 5, ["a", "b"], list("abc"), ["a", "a", "b", "b"], list("aabbcc"), list("abab")]
SHAPES += [["a", "b", "b", "c"], [f"h{n // 8}" for n in range(128)]]


@pytest.mark.parametrize("hosts", SHAPES, ids="-".join)
def test_rounds_of_pairs_share_no_rank_and_leave_no_two_hosts_out(hosts: list[str]) -> None:
    found = pair_rounds(hosts)
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(set(ranks)) == len(ranks)
        assert pairs
        inside = [hosts[a] for a, b in pairs if hosts[a] == hosts[b]]
        assert len(set(inside)) == len(inside), "one pair at a time on a host"
        assert not inside or len(inside) == len(pairs), "links within a host and between hosts are not tried together"
    flat = [pair for pairs in found for pair in pairs]
    assert len(set(flat)) == len(flat)
    assert all(a < b for a, b in flat)
    within = {pair for pair in combinations(range(len(hosts)), 2) if hosts[pair[0]] == hosts[pair[1]]}
    assert {pair for pair in flat if hosts[pair[0]] == hosts[pair[1]]} == within
    met = {frozenset((hosts[a], hosts[b])) for a, b in flat if hosts[a] != hosts[b]}
    assert met == {frozenset(pair) for pair in combinations(set(hosts), 2)}


def test_the_plot_is_read_from_its_numbers() -> None:
    rows = [{"bytes": size, "seconds": 1.0, "bandwidth": size} for size in (1e3, 1e6, 1e9)]
    flat = [{"bytes": size, "seconds": 1.0, "bandwidth": 1e3} for size in (1e3, 1e6, 1e9)]
    lines = bandwidth_plot({"all_reduce": rows, "pair": flat}, height=7).splitlines()
    field = [line.partition("│")[2] for line in lines[:7]]
    columns = [[row[10 * column : 10 * column + 10].strip() for row in field] for column in range(3)]
    assert columns[0] == [""] * 6 + ["*"]
    assert columns[1] == ["", "", "", "r", "", "", "p"]
    assert columns[2] == ["r", "", "", "", "", "", "p"]
    assert lines[0].startswith("        1 GB/s")
    assert "all-reduce" in lines[-1]


# Small readings ------------------------------------------------------------------------------------------------------


def test_a_container_s_cores_are_found(tmp_path: Path) -> None:
    for path, text in {
        "proc/self/cgroup": "4:cpu,cpuacct:/slurm/job_7\n1:memory:/x\n0::/box\n",
        "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "600000\n",
        "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/box/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert [version for _, version in control_groups("cpu", tmp_path)] == [1, 1, 1, 2, 2]
    assert core_quota(tmp_path) == 2.5
    (tmp_path / "sys/fs/cgroup/box/cpu.max").write_text("max 100000\n")
    assert core_quota(tmp_path) == 6.0


def test_requirements_that_are_not_met_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "torch==1.0",
        "numpy",
        "nowhere>=2",
        'windows-only; sys_platform == "win32"',
        'extra-only; extra == "gpu"',
    ]
    monkeypatch.setattr(versions.metadata, "requires", lambda package: wanted)
    first, second = unmet_requirements(["torchvision"])
    assert re.fullmatch(r"torchvision \S+ wants torch==1\.0, and \S+ is installed", first)
    assert second.endswith("wants nowhere>=2, which is not installed")
    monkeypatch.setattr(versions.metadata, "requires", lambda package: None)
    assert list(unmet_requirements(["torchvision"])) == []


def test_the_kind_of_a_file_system_is_its_innermost_mount_s(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/x / ext4 rw 0 0\nhost:/a {tmp_path}/a\\040b nfs4 rw 0 0\nt {tmp_path}/ab tmpfs rw 0 0\n")
    assert file_system.file_system_of(tmp_path / "a b" / "run", mounts) == "nfs4"
    assert file_system.file_system_of(tmp_path / "abc", mounts) == "ext4"


def test_a_job_s_words_are_read() -> None:
    assert signal_option("#SBATCH --requeue --signal=USR1@120\n") == "USR1@120"
    assert signal_option("#SBATCH --signal USR2@30\n# --signal=KILL\n") == "USR2@30"
    assert signal_option("#SBATCH -s 'B:TERM@9'\n") == "B:TERM@9"
    assert signal_option("#SBATCH --time=60\necho --signal=USR1\n") == signal_option("") == ""
    assert minutes_between("2026-11-21T12:00:00", "2026-11-21T13:30:00") == 90
    assert minutes_between("2026-11-21T12:00:00", "Unknown") is None


# Real ranks ----------------------------------------------------------------------------------------------------------


def test_links_of_real_ranks_are_measured_and_a_slow_pair_named() -> None:
    found = run_ranks(measured, 3)
    assert found[0]["collectives"].keys() == bandwidth.LABELS.keys()
    for name, rows in found[0]["collectives"].items():
        factor = {"all_reduce": 4 / 3, "pair": 1}.get(name, 2 / 3)
        for row, size in zip(rows, (2**12, 2**16), strict=True):
            assert size <= row["bytes"] < size + 12
            assert row["bandwidth"] == pytest.approx(factor * row["bytes"] / row["seconds"], rel=1e-6)
            assert 1e-6 < row["seconds"] < 1
    assert found[0]["collectives"] == found[1]["collectives"], "the slowest rank's time, on all"
    pairs = {tuple(pair["ranks"]): pair for pair in found[0]["pairs"]}
    assert sorted(pairs) == [(0, 1), (0, 2), (1, 2)]
    assert pairs[0, 2]["latency"] > 0.04 > pairs[0, 1]["latency"]
    rows = [each for each in judge_ranks(machines("a", "a", "a"), found[0], NEEDS) if each.check == "links"]
    assert rows[1].verdict == "warning"
    assert re.search(r"slowest ranks 0 \(\S+\) and 2 \(\S+\)", rows[1].figure), rows[1]


def measured(world: World) -> Facts:
    """With a link between ranks 0 and 2 that takes 50 ms, whatever it carries."""
    transfer = bandwidth.transfer

    def slowly(way: Any, message: torch.Tensor, peer: int) -> None:
        if {world.rank, peer} == {0, 2} and way is dist.isend:
            time.sleep(0.05)
        transfer(way, message, peer)

    bandwidth.transfer, bandwidth.SAMPLES, bandwidth.LATENCY_TRIPS = slowly, 3, 2
    bandwidth.PAIR_SIZES = {"cpu": 2**16}
    return measure_bandwidth(world, (2**12, 2**16))


def looks(world: World, out: str, trouble: str) -> Facts:
    """What a rank finds of the others, with something that is really wrong."""
    file_system.PATIENCE_SECONDS, file_system.SWAP_SECONDS, file_system.BLOCK_BYTES = 0.5, 0.2, 2**20
    folder = Path(out)
    if trouble == "apart":
        folder = folder / str(world.rank)
        folder.mkdir()
    if trouble == "in place":

        def write(path: Path, content: str | bytes) -> None:
            """Leave a long file as a reader may find it in the midst of a writing, so that none can miss it."""
            data = content.encode() if isinstance(content, str) else content
            path.write_bytes(data[:4096] + bytes(byte ^ 1 for byte in data[4096:]))

        files.write_atomically = write  # type: ignore[assignment]
    if trouble == "no lock":
        file_system.fcntl.lockf = lambda *_: None  # type: ignore[assignment]
    reduce = dist.all_reduce
    if trouble in ("bits", "sum") and world.rank == 1:

        def broken(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            done = reduce(tensor, *args, **more)
            tensor.mul_(1 + 2**-23 if trouble == "bits" else 1.001)
            return done

        dist.all_reduce = broken
    if trouble == "clock" and world.rank == 1:
        world.hosts[:] = ["here", "there"]
        network.time = type("Ahead", (), {"time": staticmethod(lambda: time.time() + 3)})  # type: ignore[assignment]
    if trouble == "clock":
        world.hosts[:] = ["here", "there"]
        return {"clock": network.probe_clock(world)}
    if trouble == "slow":
        product = torch.Tensor.__matmul__
        if world.rank == 1:
            torch.Tensor.__matmul__ = lambda a, b: (time.sleep(0.1), product(a, b))[1]  # type: ignore[method-assign]
        return {"pace": machine.probe_pace(world)}
    return {"files": file_system.probe_files(world, folder), "determinism": determinism.probe_determinism(world)}


REAL = {
    "": ({}, []),
    "apart": ({"files": "fails"}, ["not shared: rank 1"]),
    "in place": ({"files": "fails"}, ["torn"]),
    "no lock": ({"files": "warning"}, ["does not keep the others out"]),
    "bits": ({"determinism": "fails"}, ["rank 1", "other bits"]),
    "sum": ({"determinism": "fails"}, ["wrong by 0.001 on rank 1"]),
    "slow": ({"pace": "warning"}, ["rank 1 (b) at 1"]),
    "clock": ({"clocks": "warning"}, ["b is 3 s ahead of a"]),
}


@pytest.mark.parametrize("trouble", REAL)
def test_real_ranks_find_what_is_wrong(trouble: str, tmp_path: Path) -> None:
    expected, words = REAL[trouble]
    found = machines("a", "b")
    for mine, real in zip(found, run_ranks(looks, 2, str(tmp_path), trouble), strict=True):
        disk = mine["files"].get("disk")
        mine |= real
        if "files" in real and disk:  # this machine's own speed is not the question
            assert mine["files"]["disk"].keys() == disk.keys() if "disk" in mine["files"] else mine["rank"]
            mine["files"]["disk"] = disk
        if mine["rank"] == 0 and trouble == "clock":
            mine["clock"] = {"b": real["clock"]["there"]}
    bad = [each for each in judge_ranks(found, speeds(("a", "b")), NEEDS) if each.verdict != "ok"]
    assert {each.check: each.verdict for each in bad} == expected, bad
    said = " ".join(each.figure for each in bad)
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob(".preflight")), "nothing is left behind"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter measurements, for this process and the ranks it forks."""
    monkeypatch.setattr(bandwidth, "SIZES", bandwidth.SIZES[:3])
    monkeypatch.setattr(bandwidth, "PAIR_SIZES", {"cpu": 2**12})
    monkeypatch.setattr(file_system, "SWAP_SECONDS", 0.1)
    monkeypatch.setattr(file_system, "BLOCK_BYTES", 2**20)


@pytest.mark.slow_except("2")
@pytest.mark.usefixtures("narrow", "quick")
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])  # it measures: on a quiet machine
def test_this_machine_passes(ranks: int, tmp_path: Path) -> None:
    execute(doctor.train, tmp_path / "run", ranks)
    assert "run/preflight.json\n" in (tmp_path / "run" / "ranks" / "0.log").read_text()
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    rows = {each["check"]: each for each in report["findings"]}
    assert "fails" not in {each["verdict"] for each in report["findings"]}
    assert list(rows) == [
        *(
            "versions",
            "devices",
            "cores",
            "resources",
            "pace",
            "network",
            "names",
            *["ports"] * ("MASTER_PORT" in os.environ),
        ),
        *("files", "links", "determinism", "verify"),
    ]
    assert rows["verify"]["figure"].startswith("5 steps of ddp in fp64: equal")
    assert [each["rank"] for each in report["ranks"]] == list(range(ranks))
    assert report["ranks"][0]["versions"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert ("collectives" in report["links"]) == (ranks > 1)
    assert not (tmp_path / "run" / ".preflight").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("narrow", "quick")
def test_where_a_run_would_fail_the_exit_code_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file_system, "probe_disk", lambda folder, rank: {"error": "OSError: No space left on device"})
    with pytest.raises(AssertionError, match="a run would fail here: files; see preflight"):
        execute(doctor.train, tmp_path / "run", 2)
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert any(each["verdict"] == "fails" for each in report["findings"])


@pytest.mark.soak  # it measures: on a quiet machine
@pytest.mark.usefixtures("narrow", "quick")
def test_a_training_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "PROVEN_STEPS", 2)
    monkeypatch.setattr("lockstep.verify.rows.TOLERANCES", {"fp64": 0.0})
    with pytest.raises(AssertionError, match="a run would fail here: verify"):
        execute(doctor.train, tmp_path / "run", 2)


@pytest.mark.usefixtures("narrow", "quick")
def test_a_recipe_that_breaks_on_a_rank_ends_the_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(run: Run) -> None:
        if run.world.rank == 1:
            raise KeyError("the cause")
        whole(run)

    whole = ddp.train.train
    monkeypatch.setattr("recipes.ddp.train", replace(ddp.train, train=broken))
    with pytest.raises(AssertionError, match="preflight: ddp in fp64: KeyError: 'the cause'"):
        execute(doctor.train, tmp_path / "run", 2)


def test_a_rank_that_does_not_see_the_run_directory_says_so(tmp_path: Path) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "15001"}
    done = command("-m", "recipes.ddp", cwd=tmp_path, LOCKSTEP_RUN_DIR="/nowhere/run", **place)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: out=/nowhere/run: not there on ")


@pytest.mark.slow
def test_the_nodes_of_a_cluster_are_compared(tmp_path: Path) -> None:
    with Box(nodes=2) as box:
        words = ["-m", "recipes.doctor", "+cluster=slurm", "cluster.nodes=2", "threads=1", "out=run"]
        done = box.run(sys.executable, *words, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    rows = {each["check"]: each for each in report["findings"]}
    assert [each["host"] for each in report["ranks"]] == ["node1", "node2"]
    for check, words in {
        "network": "gloo over eth0",
        "names": "2 hosts, each reached by name",
        "clocks": "2 hosts within",
        "verify": "equal",
    }.items():
        assert rows[check]["verdict"] == "ok", rows[check]
        assert words in rows[check]["figure"], rows[check]
    assert "between hosts" in rows["links"]["figure"]
    job = [each for each in report["findings"] if each["check"] == "slurm"]
    assert "notice USR1@" in job[0]["figure"], job
    assert "would a run work here?" in done.stdout


@pytest.mark.slow
def test_a_run_directory_that_the_nodes_do_not_share_is_named(tmp_path: Path) -> None:
    alone = 'test $SLURM_PROCID = 0 || mount -t tmpfs none "$PWD/outputs" || exit 9; exec "$@"'
    (tmp_path / "outputs").mkdir()
    with Box(nodes=2) as box:
        words = ["srun", "--nodes=2", "unshare", "--mount", "sh", "-c", alone, "sh"]
        words += [sys.executable, "-m", "recipes.doctor", "timeout_seconds=20", "out=outputs/run"]
        done = box.run(*words, cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "not there on node2; set out to a folder on a file system that all hosts mount" in done.stderr
