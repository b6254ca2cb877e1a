"""What each rank finds of the machine it is on and of the way to the others; lockstep.diagnose.preflight judges it.

Every rank makes one dict of plain values, in which an error has the place of what could not be found out: one rank's
trouble is to be told, and must not leave the others waiting in a collective.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.distributed.collectives import agree, gather_objects
from lockstep.distributed.process_group import World, interface_towards
from lockstep.memory.usage import control_groups
from lockstep.run import Run
from lockstep.utils import files
from lockstep.utils.environment import cpu_name, git_commit
from lockstep.utils.environment import versions as installed_versions

Facts = dict[str, Any]
FOLDER = ".preflight"  # in the run directory, removed at the end
PATIENCE_SECONDS = 10.0  # in which a file of another rank must be seen
SWAP_SECONDS = 0.5  # in which rank 0 replaces a file again and again while the others read it
BLOCK_BYTES = 2**25  # written to see how fast that is
SMALL_FILES = 8  # of 4 KiB each, to see how long fsync takes
PINGS = 10
PRODUCTS = 20
CONNECT_SECONDS = 5.0
DRAWN = 2**16  # numbers that are all-reduced again and again
REPEATS = 4
SLURM = """JOB_ID JOB_NUM_NODES STEP_NUM_TASKS STEP_ID NTASKS CPUS_PER_TASK CPUS_ON_NODE GPUS_ON_NODE JOB_GPUS
    RESTART_COUNT PROCID JOB_PARTITION""".split()


def survey(run: Run) -> list[Facts]:
    """All ranks' facts, in rank order, on every rank; all call it together."""
    world = run.world
    mine: Facts = {"rank": world.rank, "host": world.hosts[world.rank], "local_rank": world.local_rank}
    alone: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "device": lambda: device(world),
        "cores": lambda: cores(world, run._workers()),
        "network": lambda: network(world),
        "slurm": lambda: slurm(world.rank),
    }
    for name, look in alone.items():
        mine[name] = told(look)
    # Each of these talks to the other ranks, and catches what goes wrong in between.
    mine["reach"] = reach(world)
    mine["clock"] = clock(world)
    mine["pace"] = pace(world)
    mine["files"] = shared_files(world, run.out)
    mine["determinism"] = determinism(world)
    return gather_objects(mine, world.control)


def told(look: Callable[[], Any]) -> Any:
    """What a look finds, or its error as {"error": text}."""
    try:
        return look()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def leaders(hosts: list[str]) -> list[int]:
    """The first rank of each host."""
    return sorted({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())


# By itself ----------------------------------------------------------------------------------------------------------


def versions() -> Facts:
    """What is installed, and which requirements of it are not met."""
    found = installed_versions()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": found,
        "imported torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "git_commit": git_commit(),
        "unmet": list(unmet(list(found))),
    }


def unmet(packages: list[str]) -> Iterator[str]:
    """Requirements of these packages that what is installed does not meet: `torchvision 0.29.2 wants torch==2.15.0`.

    Such a set imports, and breaks later: pip only warns of it, and a conda environment need not know.
    """
    from packaging.requirements import Requirement  # needed nowhere else

    for package in packages:
        for line in metadata.requires(package) or ():
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            who = f"{package} {metadata.version(package)} wants {wanted.name}{wanted.specifier}"
            try:
                there = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                yield f"{who}, which is not installed"
                continue
            if not wanted.specifier.contains(there, prereleases=True):
                yield f"{who}, and {there} is installed"


def device(world: World) -> Facts:
    """What this rank computes on."""
    found: Facts = {"type": world.device.type, "gpus_visible": cuda_count()}
    found["gpus_present"] = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if world.device.type == "cpu":
        return found | {"name": cpu_name()}
    properties = torch.cuda.get_device_properties(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    found |= {
        "name": properties.name,
        "index": world.device.index,
        "uuid": str(getattr(properties, "uuid", world.device.index)),
        "capability": f"{properties.major}.{properties.minor}",
        "total_bytes": total,
        # All that is taken, this process's own share of it, about half a GiB, included.
        "used_bytes": total - free - torch.cuda.memory_reserved(world.device),
        "driver": None,
    }
    with contextlib.suppress(Exception):  # NVML is missing, or is not allowed here
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
    return found


def cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cores(world: World, workers: int) -> Facts:
    """The cores that this process may run on, and what it wants to do with them."""
    return {
        "allowed": sorted(os.sched_getaffinity(0)),
        "present": os.cpu_count(),
        "quota": core_quota(),
        "threads": torch.get_num_threads(),
        "workers": workers,
        "load": os.getloadavg()[0],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def core_quota(machine: Path = Path("/")) -> float | None:
    """How many cores' time the control groups of this process give it: a container's limit; None: no limit."""
    least: list[float] = []
    for folder, version in control_groups("cpu", machine):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            least.append(int(quota) / int(period))
    return min(least, default=None)


def network(world: World) -> Facts:
    """By which interface this rank speaks to other hosts, and what its kernel hands out as ports."""
    away = [host for host in world.hosts if host != world.hosts[world.rank]]
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found: Facts = {
        "backend": world.backend,
        "master": [os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")],
        "agent": "TORCHELASTIC_RUN_ID" in os.environ,  # a launcher has chosen the port
        "kernel_ports": [low, high],
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))},
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
    }
    name = interface_towards(away[0]) if away else None
    if name:
        about = Path("/sys/class/net", name)
        found |= {"interface": name, "mtu": int((about / "mtu").read_text())}
        with contextlib.suppress(OSError, ValueError):  # a virtual one has no speed
            speed = int((about / "speed").read_text())
            found["megabits"] = speed if speed > 0 else None
    return found


def slurm(rank: int) -> Facts:
    """What Slurm says of this task, and on rank 0 of its job; nothing outside of a job."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    found: Facts = {name: os.environ[f"SLURM_{name}"] for name in SLURM if f"SLURM_{name}" in os.environ}
    if rank == 0:
        said = spoken("scontrol", "--oneliner", "show", "job", found["JOB_ID"])
        found["job"] = dict(re.findall(r"\b(EndTime|Requeue|TimeLimit|Partition)=(\S*)", said)) if said else None
        found["now"] = time.strftime("%Y-%m-%dT%H:%M:%S")  # in the time zone of the job's own times
        found["notice"] = notice(spoken("scontrol", "write", "batch_script", found["JOB_ID"], "-") or "")
    return found


def notice(script: str) -> str:
    """What a batch script's --signal says, such as USR1@120; empty: nothing."""
    found = re.findall(r"^#SBATCH\s(?:.*\s)?(?:--signal[= ]|-s\s?)['\"]?([\w:@]+)", script, re.MULTILINE)
    return found[-1] if found else ""


def spoken(*command: str) -> str | None:
    """What a command prints; None where it cannot be run, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


# With the others ----------------------------------------------------------------------------------------------------


def reach(world: World) -> Facts:
    """{host: address and seconds, or an error}: each host's first rank resolves and connects to every host by name."""
    here = leaders(world.hosts)
    listening: socket.socket | None = None
    port = 0
    if world.rank in here:
        with contextlib.suppress(OSError):
            listening = socket.create_server(("", 0), backlog=len(here) + 8)  # the kernel answers for it
            port = listening.getsockname()[1]
    ports = gather_objects(port, world.control)
    found: Facts = {}
    for leader in here if world.rank in here else ():
        host = world.hosts[leader]
        found[host] = told(lambda host=host, leader=leader: connect(host, ports[leader]))  # type: ignore[misc]
    dist.barrier(world.control)
    if listening:
        listening.close()
    return found


def connect(host: str, port: int) -> Facts:
    addresses = sorted(
        {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)}
    )
    found: Facts = {"addresses": addresses}
    started = time.perf_counter()
    try:
        socket.create_connection((addresses[0], port), timeout=CONNECT_SECONDS).close()
        found["seconds"] = time.perf_counter() - started
    except OSError as error:
        found["refused"] = error.strerror or str(error) or type(error).__name__
    return found


def clock(world: World) -> Facts:
    """On rank 0, {host: seconds by which its clock is ahead of rank 0's, give or take half the way there and back}.

    As NTP has it: the other's time lies in the middle of the quickest round trip.
    """
    found: Facts = {}
    for leader in leaders(world.hosts)[1:]:
        if world.rank not in (0, leader):
            continue
        number = torch.zeros(1, dtype=torch.float64)
        best: list[tuple[float, float]] = []
        for _ in range(PINGS):
            if world.rank == 0:
                asked = time.time()
                dist.send(number, leader, group=world.control)
                dist.recv(number, leader, group=world.control)
                back = time.time()
                best.append((back - asked, number.item() - (asked + back) / 2))
            else:
                dist.recv(number, 0, group=world.control)
                number.fill_(time.time())
                dist.send(number, 0, group=world.control)
        if world.rank == 0:
            trip, ahead = min(best)
            found[world.hosts[leader]] = {"ahead": ahead, "trip": trip}
    return found


def pace(world: World) -> Facts:
    """Operations a second of this rank's device in a matrix product, while all other ranks have theirs at work too."""
    cuda = world.device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if cuda else (384, torch.float32)
    a = torch.rand(size, size, device=world.device, dtype=dtype)
    dist.barrier(world.control)
    taken = []
    for _ in range(1 + PRODUCTS):
        started = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for a GPU
        taken.append(time.perf_counter() - started)
    return {"flops": 2 * size**3 / statistics.median(taken[1:])}  # the first one also wakes threads and libraries


def determinism(world: World) -> Facts:
    """Of one all-reduce of random numbers, made several times: what came out on this rank, and how far off it is."""
    exact, mine = torch.zeros(DRAWN, dtype=torch.float64), torch.empty(0)
    for rank in range(world.world_size):
        drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(rank))
        exact += drawn
        mine = drawn if rank == world.rank else mine
    mine = mine.to(world.device)
    digests, total = [], mine
    for _ in range(REPEATS):
        total = mine.clone()
        dist.all_reduce(total)
        digests.append(hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest())
    off = ((total.cpu().double() - exact).norm() / exact.norm()).item()
    return {"digests": digests, "off": off}


def shared_files(world: World, out: Path) -> Facts:
    """Whether the ranks see each other's files in the run directory, whole at any time, and how fast it is."""
    folder, found = out / FOLDER, Facts()
    nonce = uuid.uuid4().hex
    if world.rank == 0:
        found["made"] = told(lambda: begin(folder, nonce))
    nonce = agree([nonce], world.control)[0]
    found["seen"] = wait_for(folder / "hello", nonce, PATIENCE_SECONDS)
    # Each writes a file for its neighbour; rank 0 reads all.
    mine = told(lambda: files.write_atomically(folder / f"rank-{world.rank}", nonce))
    dist.barrier(world.control)
    others = range(world.world_size) if world.rank == 0 else [(world.rank + 1) % world.world_size]
    found["write_error"] = mine["error"] if mine else None
    found["unseen"] = []
    for rank in others:  # one that is not there is reason enough not to wait as long for the next
        if wait_for(folder / f"rank-{rank}", nonce, 0.1 if found["unseen"] else PATIENCE_SECONDS) is None:
            found["unseen"].append(rank)
    dist.barrier(world.control)
    found["swaps"] = told(lambda: replace(folder / "swapped") if world.rank == 0 else reread(folder / "swapped"))
    dist.barrier(world.control)
    if world.rank in leaders(world.hosts):
        found["disk"] = told(lambda: disk(folder, world.rank))
    lock = told(lambda: take_lock(folder / "lock")) if world.rank == 0 else None
    dist.barrier(world.control)
    if world.rank:
        found["locked"] = told(lambda: is_locked(folder / "lock"))
    dist.barrier(world.control)
    if world.rank == 0:
        if isinstance(lock, int):
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
    return found


def begin(folder: Path, nonce: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files.write_atomically(folder / "hello", nonce)
    files.write_atomically(folder / "swapped", filled(0))


def filled(number: int) -> bytes:
    """A file's content that tells whether all of it is of one writing."""
    return bytes([number % 256]) * 2**16


def wait_for(path: Path, content: str, seconds: float) -> float | None:
    """Seconds until a file is there with this content; None where it does not come in time."""
    started = time.monotonic()
    while True:
        passed = time.monotonic() - started  # before the look, so that there is one however slow this process is
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return passed
        if passed >= seconds:
            return None
        time.sleep(0.02)


def replace(path: Path) -> Facts:
    """Write a file anew, again and again."""
    until, written = time.monotonic() + SWAP_SECONDS, 0
    while time.monotonic() < until:
        written += 1
        files.write_atomically(path, filled(written))
    return {"written": written}


def reread(path: Path) -> Facts:
    """Read it meanwhile: how often it was there and whole, missing, or a mix of two writings."""
    until, found = time.monotonic() + SWAP_SECONDS, {"read": 0, "missing": 0, "torn": 0, "stale": 0}
    while time.monotonic() < until:
        try:
            content = path.read_bytes()
        except OSError as error:  # stale: NFS has deleted the old file while it was read; it is to be tried again
            found["stale" if error.errno == errno.ESTALE else "missing"] += 1
            continue
        whole = len(content) == len(filled(0)) and content.count(content[:1]) == len(content)
        found["read" if whole else "torn"] += 1
    return found


def disk(folder: Path, rank: int) -> Facts:
    """Speed of a large file with one fsync, seconds of a small one's, bytes free, and the kind of file system."""
    block, path = os.urandom(2**20), folder / f"block-{rank}"
    started = time.perf_counter()
    with path.open("wb") as stream:
        for _ in range(BLOCK_BYTES // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    seconds, small = time.perf_counter() - started, []
    for _ in range(SMALL_FILES):
        started = time.perf_counter()
        files.write_atomically(path, block[:4096])
        small.append(time.perf_counter() - started)
    path.unlink()
    return {
        "write_bytes_per_second": BLOCK_BYTES / seconds,
        "fsync_seconds": statistics.median(small),
        "free_bytes": shutil.disk_usage(folder).free,
        "kind": kind_of(folder),
    }


def kind_of(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that a folder is on: ext4, nfs4, lustre, tmpfs, …"""
    best, kind = "", "unknown"
    for line in mounts.read_text().splitlines():
        _, point, what, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, what
    return kind


def take_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether rank 0's lock keeps this rank out."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
