"""What all ranks' facts mean for a run: pure judgement of what the probes and the bandwidth test have found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lockstep.diagnose.bandwidth import amount
from lockstep.diagnose.findings import Finding
from lockstep.utils.text import count, mebibytes

Facts = dict[str, Any]
SKEW_SECONDS = 0.5  # from which clocks are called apart
AT_ONCE_SECONDS = 0.1
LATE_SECONDS = 1.0  # after which a file of another rank should have been seen
SLOW_WRITE, SLOW_FSYNC = 20e6, 0.5  # bytes/s and s from which a file system is called slow
SLOW_PAIR = 3  # times slower than the median of its kind a pair must be to be called slow
SLOW_NETWORK = 0.125e9  # bytes/s: what a network of 1 Gbit/s carries
SLOW_PACE = 0.7  # of the median's, below which a rank is called slow
BUSY = 2  # times as much work as cores from which a machine is called busy
TAKEN = 0.1  # share of a GPU's memory that others may hold without a word
OFF = 1e-5  # relative error of an fp32 sum that is rounding
SHORT_MINUTES = 10


@dataclass(frozen=True)
class Asked:
    """What of the run's settings the machine has to bear.

    Attributes:
        checkpoint_bytes: size of one checkpoint.
        keep: checkpoints that are kept.
        gradient_bytes: what an all-reduce of all gradients sends.
    """

    checkpoint_bytes: int
    keep: int
    gradient_bytes: int


def judge(ranks: list[Facts], links: Facts, asked: Asked) -> list[Finding]:
    """The table, in the order in which one would look.

    Args:
        ranks: lockstep.diagnose.probes.survey's.
        links: lockstep.diagnose.bandwidth.measure's; empty for a single rank.
    """
    looks: dict[str, tuple[str, Callable[[list[Facts]], Iterable[Finding]]]] = {
        "versions": ("versions", versions),
        "devices": ("device", devices),
        "cores": ("cores", cores),
        "pace": ("pace", pace),
        "network": ("network", network),
        "names": ("reach", names),
        "ports": ("network", ports),
        "clocks": ("clock", clocks),
        "files": ("files", lambda sound: files(sound, asked)),
        "links": ("", lambda sound: speeds(links, asked)),
        "determinism": ("determinism", determinism),
        "slurm": ("slurm", slurm),
    }
    found: list[Finding] = []
    for check, (section, look) in looks.items():
        troubled = [each for each in ranks if section and "error" in each[section]]
        for each in troubled[:1]:
            figure = f"could not be looked at on {place(each)}: {each[section]['error']}"
            found.append(Finding(check, "warning", figure, "look there by hand"))
        sound = [each for each in ranks if each not in troubled]
        found += look(sound) if sound else []
    return found


# Words -------------------------------------------------------------------------------------------------------------


def place(rank: Facts) -> str:
    return f"rank {rank['rank']} ({rank['host']})"


def by_host(ranks: list[Facts]) -> dict[str, list[Facts]]:
    """{host: its ranks}, in order of ranks."""
    found: dict[str, list[Facts]] = {}
    for each in ranks:
        found.setdefault(each["host"], []).append(each)
    return found


def apart(ranks: list[Facts], value: Callable[[Facts], Any]) -> str:
    """`2.15.0 on node1, node2; 2.14.0 on node3` where the ranks have not all the same value; else nothing."""
    hosts: dict[str, dict[str, None]] = {}
    for each in ranks:
        hosts.setdefault(str(value(each)), {})[each["host"]] = None
    if len(hosts) < 2:
        return ""
    return "; ".join(f"{value} on {', '.join(some)}" for value, some in hosts.items())


def everywhere(ranks: list[Facts]) -> str:
    return f"on {count(len(ranks), 'rank')} of {count(len(by_host(ranks)), 'host')}"


# Checks ------------------------------------------------------------------------------------------------------------


def versions(ranks: list[Facts]) -> Iterator[Finding]:
    """What is installed: whether it fits together, and is the same everywhere."""
    first, fine = ranks[0]["versions"], True
    for package in dict.fromkeys(name for each in ranks for name in each["versions"]["packages"]):
        found = apart(ranks, lambda each, package=package: each["versions"]["packages"].get(package, "none"))  # type: ignore[misc]
        if found:
            fine = False
            verdict = "fails" if package in ("torch", "lockstep") else "warning"
            yield Finding("versions", verdict, f"{package} {found}", "install the same on every host")  # type: ignore[arg-type]
    for what in ("python", "cuda", "nccl", "git_commit"):
        if found := apart(ranks, lambda each, what=what: each["versions"][what]):  # type: ignore[misc]
            fine = False
            remedy = "run the same commit everywhere" if what == "git_commit" else "install the same on every host"
            yield Finding("versions", "warning", f"{what} {found}", remedy)
    for line in dict.fromkeys(line for each in ranks for line in each["versions"]["unmet"]):
        fine = False
        yield Finding("versions", "warning", line, "install versions that fit: pip install -c constraints.txt …")
    for each in ranks:
        imported, installed = each["versions"]["imported torch"], each["versions"]["packages"].get("torch", "none")
        if imported.partition("+")[0] != installed.partition("+")[0]:
            fine = False
            figure = f"{place(each)} imports torch {imported}, and {installed} is installed"
            yield Finding("versions", "warning", figure, "there are two: look at PYTHONPATH")
            break
    if fine:
        some = [f"{name} {first['packages'][name]}" for name in ("torch", "torchvision") if name in first["packages"]]
        figure = f"python {first['python']}, {', '.join(some)}: the same {everywhere(ranks)}; all requirements are met"
        yield Finding("versions", "ok", figure)


def devices(ranks: list[Facts]) -> Iterator[Finding]:
    """What the ranks compute on, and whether it is alike."""
    fine = True

    def trouble(verdict: Any, figure: str, remedy: str) -> Finding:
        nonlocal fine
        fine = False
        return Finding("devices", verdict, figure, remedy)

    if found := apart(ranks, lambda each: each["device"]["type"]):
        yield trouble("fails", found, "leave out the hosts whose GPUs torch does not see, or set device=cpu")
    for what in ("name", "driver"):
        if found := apart(ranks, lambda each, what=what: each["device"].get(what)):  # type: ignore[misc]
            yield trouble("warning", found, "take hosts that are alike: the slowest device decides the speed")
    for host, some in by_host(ranks).items():
        gpus: dict[str, list[Facts]] = {}
        for each in some:
            if each["device"]["type"] == "cuda":
                gpus.setdefault(each["device"]["uuid"], []).append(each)
        for sharing in gpus.values():
            if len(sharing) > 1:
                who = ", ".join(str(each["rank"]) for each in sharing)
                verdict = "fails" if sharing[0]["network"].get("backend") == "nccl" else "warning"
                yield trouble(verdict, f"ranks {who} share one GPU of {host}", "start one rank a GPU")
            about = sharing[0]["device"]
            if about["used_bytes"] > TAKEN * about["total_bytes"]:
                held = f"{mebibytes(about['used_bytes'], 0)} of {mebibytes(about['total_bytes'], 0)} MiB"
                figure = f"{held} of {place(sharing[0])}'s GPU are taken already"
                yield trouble("warning", figure, "end the other processes: nvidia-smi names them")
        visible = max(each["device"]["gpus_visible"] for each in some)
        present = max(each["device"]["gpus_present"] for each in some)
        if present and not visible:
            cuda = some[0]["versions"].get("cuda")
            figure = f"{host} has {count(present, 'GPU')}, and torch (CUDA {cuda or 'none'}) sees none"
            remedy = "update the driver, or take a torch for an older CUDA; look at CUDA_VISIBLE_DEVICES"
            yield trouble("warning", figure, remedy if cuda else "install a torch that is built for CUDA")
        if visible and not gpus:
            yield trouble("warning", f"device=cpu, and torch sees {count(visible, 'GPU')} on {host}", "set device=cuda")
        elif visible > max(1, len(gpus)):
            figure = f"{visible - len(gpus)} of {visible} GPUs of {host} have no rank"
            yield trouble("warning", figure, f"set nproc={visible}, or cluster.tasks_per_node={visible}")
    if fine:
        yield Finding("devices", "ok", f"{ranks[0]['device']['name']} {everywhere(ranks)}")


def cores(ranks: list[Facts]) -> Iterator[Finding]:
    """Whether the ranks of a host want more threads than it has cores for them."""
    fine, usable = True, {}
    for host, some in by_host(ranks).items():
        each = [rank["cores"] for rank in some]
        there = len(set().union(*(set(one["allowed"]) for one in each)))
        limits = [there, *(one["quota"] for one in each if one["quota"])]
        usable[host] = least = min(limits)
        wanted = sum(one["threads"] for one in each)
        figure = f"{host}: {count(len(some), 'rank')} with {wanted} threads on {least:g} cores"
        figure += f" (a control group's limit; {there} are there)" if least < there else ""
        fit = int(least) // len(some)
        if wanted > least:
            fine = False
            remedy = f"set threads={fit}" if fit else f"start at most {count(max(1, int(least)), 'rank')} there"
            yield Finding("cores", "warning", f"{figure}: oversubscribed, each waits for the others", remedy)
        for rank in some:
            own = len(rank["cores"]["allowed"])
            if rank["cores"]["threads"] > own and wanted <= least:
                fine = False
                figure = f"{place(rank)} has {rank['cores']['threads']} threads and may use {count(own, 'core')}"
                yield Finding("cores", "warning", figure, "bind it to more (srun --cpus-per-task=…), or set threads=…")
        load = each[0]["load"]
        if load > BUSY * there:
            fine = False
            figure = f"{host}: {load:.0f} processes want its {there} cores"
            yield Finding("cores", "warning", figure, "wait for the other work there to end, or take another host")
    if len(set(usable.values())) > 1:
        fine = False
        figure = ", ".join(f"{host} {cores:g}" for host, cores in usable.items())
        yield Finding("cores", "warning", f"cores: {figure}", "take hosts that are alike: the slowest decides")
    if fine:
        one = ranks[0]["cores"]
        workers = f" and {count(one['workers'], 'DataLoader worker')}" if one["workers"] else ""
        figure = f"{count(one['threads'], 'thread')}{workers} a rank, {min(usable.values()):g} cores a host"
        yield Finding("cores", "ok", figure)


def pace(ranks: list[Facts]) -> Iterator[Finding]:
    """Whether all ranks compute equally fast; each step takes as long as the slowest one."""
    rates = [each["pace"]["flops"] for each in ranks]
    slow = min(ranks, key=lambda each: each["pace"]["flops"])
    median, least = statistics.median_high(rates), min(rates)
    figure = f"a matrix product at {median / 1e9:,.0f} GFLOP/s"
    if least < SLOW_PACE * median:
        figure += f"; {place(slow)} at {least / 1e9:,.0f}"
        remedy = "look there for other work, or a throttled device; else leave that host out: the others wait for it"
        yield Finding("pace", "warning", figure, remedy)
    else:
        yield Finding("pace", "ok", figure + (f", the slowest {least / 1e9:,.0f}" if len(ranks) > 1 else ""))


def network(ranks: list[Facts]) -> Iterator[Finding]:
    """What the tensors travel by."""
    fine, about = True, [each["network"] for each in ranks]
    several = len(by_host(ranks)) > 1
    for what, unit in (("mtu", ""), ("megabits", " Mbit/s")):
        if several and (found := apart(ranks, lambda each, what=what: each["network"].get(what))):  # type: ignore[misc]
            fine = False
            remedy = "the same network for all: set GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
            yield Finding("network", "warning", f"{what}{unit}: {found}", remedy)
    if several and about[0]["infiniband"]:
        off = about[0]["backend"] == "gloo" and ranks[0]["device"].get("type") == "cuda"
        if off or about[0]["variables"].get("NCCL_IB_DISABLE") == "1":
            fine = False
            figure = f"InfiniBand ({', '.join(about[0]['infiniband'])}) is there and not used"
            yield Finding("network", "warning", figure, "set backend=nccl" if off else "unset NCCL_IB_DISABLE")
    if fine:
        names = list(dict.fromkeys(one["interface"] for one in about if one.get("interface")))
        by = f" over {', '.join(names)}" if names else (" over this host" if not several else "")
        speed = f", {about[0]['megabits'] / 1000:g} Gbit/s" if about[0].get("megabits") else ""
        fast = f", InfiniBand {', '.join(about[0]['infiniband'])}" if about[0]["infiniband"] else ""
        yield Finding("network", "ok", f"{about[0]['backend']}{by}{speed}{fast}")


def names(ranks: list[Facts]) -> Iterator[Finding]:
    """Whether every host finds, and reaches, every host by its name."""
    looks = [(each, host, look) for each in ranks for host, look in each["reach"].items()]
    fine = True
    for each, host, look in looks:
        if "error" in look:
            fine, figure = False, f"{each['host']} cannot resolve {host}: {look['error']}"
            yield Finding("names", "warning", figure, "add it to DNS, or to /etc/hosts there")
        elif host != each["host"] and any(address.startswith("127.") for address in look["addresses"]):
            fine, figure = False, f"{host} is {', '.join(look['addresses'])} on {each['host']}, which is itself"
            yield Finding("names", "warning", figure, "correct /etc/hosts there")
        elif "refused" in look:
            fine = False
            figure = f"{each['host']} cannot connect to {host} ({look['addresses'][0]}): {look['refused']}"
            yield Finding("names", "warning", figure, "open all ports between the hosts in their firewall")
    if fine and looks:
        slowest = max(look["seconds"] for _, _, look in looks)
        hosts = count(len(by_host(ranks)), "host")
        yield Finding("names", "ok", f"{hosts}, each reached by name from each; slowest in {1e3 * slowest:.3g} ms")


def ports(ranks: list[Facts]) -> Iterator[Finding]:
    """Where the ranks met, and whether another process may be there first the next time."""
    about = ranks[0]["network"]
    address, port = about["master"]
    if port is None:
        return
    low, high = about["kernel_ports"]
    figure = f"met at {address}:{port}"
    if not about["agent"] and low <= int(port) <= high:
        figure += f"; the kernel hands out {low}–{high} to any process"
        yield Finding("ports", "warning", figure, f"set a MASTER_PORT below {low}")
    else:
        yield Finding("ports", "ok", figure + (", chosen by the launcher" if about["agent"] else ""))


def clocks(ranks: list[Facts]) -> Iterator[Finding]:
    """Whether the hosts agree on the time."""
    found = ranks[0]["clock"]
    if not found:
        return
    fine = True
    for host, look in found.items():
        if abs(look["ahead"]) > SKEW_SECONDS + look["trip"] / 2:
            fine = False
            side = "ahead of" if look["ahead"] > 0 else "behind"
            figure = f"{host} is {abs(look['ahead']):.3g} s {side} {ranks[0]['host']}"
            yield Finding("clocks", "warning", figure, "start chrony or ntpd there: times in logs cannot be compared")
    if fine:
        widest = max(abs(look["ahead"]) + look["trip"] / 2 for look in found.values())
        yield Finding("clocks", "ok", f"{count(len(found) + 1, 'host')} within {1e3 * widest:.2g} ms")


def files(ranks: list[Facts], asked: Asked) -> Iterator[Finding]:
    """Whether the run directory is one and the same for all ranks, keeps its promises, and is fast and large enough."""
    about = {each["rank"]: each["files"] for each in ranks}
    first = ranks[0]["files"]
    if first.get("made"):
        yield Finding("files", "fails", f"rank 0 cannot write there: {first['made']['error']}", "name another out")
        return
    blind = [each for each in ranks if each["files"]["seen"] is None]
    unseen = {rank for each in ranks if each not in blind for rank in each["files"]["unseen"]}
    if blind or unseen:
        who = ", ".join(place(each) for each in ranks if each in blind or each["rank"] in unseen)
        why = next((each["files"]["write_error"] for each in ranks if each["files"]["write_error"]), None)
        figure = f"not shared: {who} and rank 0 do not see each other's files" + (f" ({why})" if why else "")
        yield Finding("files", "fails", figure, "set out to a folder on a file system that all hosts mount")
        return
    if "error" in first["swaps"]:
        yield Finding("files", "fails", f"rank 0 cannot replace a file: {first['swaps']['error']}", "name another out")
        return
    late = max(one["seen"] for one in about.values())
    soon = f"within {late:.2g} s" if late > AT_ONCE_SECONDS else "at once"
    text = f"seen by all ranks {soon}, files replaced {first['swaps'].get('written', 0)} times"
    torn = [each for each in ranks if each["files"]["swaps"].get("torn") or each["files"]["swaps"].get("missing")]
    if torn:
        one = torn[0]["files"]["swaps"]
        figure = f"{place(torn[0])} found a file that was being replaced {one['torn']} times torn, "
        figure += f"{one['missing']} times missing"
        remedy = "set out to a file system where a rename is atomic: checkpoints and result.json rely on it"
        yield Finding("files", "fails", figure, remedy)
    elif late > LATE_SECONDS:
        yield Finding("files", "warning", text, "mount it with a shorter attribute cache (NFS: actimeo=1)")
    else:
        yield Finding("files", "ok", text + " under their eyes, always whole" * (len(ranks) > 1))
    if any(one.get("locked") is False for one in about.values()):
        figure = "a lock of one rank does not keep the others out"
        yield Finding("files", "warning", figure, "do not start two runs in one out; or mount it with locks")
    disks = [each for each in ranks if "disk" in each["files"]]
    for each in disks:
        if "error" in each["files"]["disk"]:
            figure = f"{each['host']} cannot write a large file: {each['files']['disk']['error']}"
            yield Finding("files", "fails", figure, "make room, or name another out")
            return
    yield from disk(disks, asked)


def disk(ranks: list[Facts], asked: Asked) -> Iterator[Finding]:
    """Speed and room of the file system, as each host has it."""
    slow = min(ranks, key=lambda each: each["files"]["disk"]["write_bytes_per_second"])
    late = max(ranks, key=lambda each: each["files"]["disk"]["fsync_seconds"])
    speed = slow["files"]["disk"]["write_bytes_per_second"]
    fsync = late["files"]["disk"]["fsync_seconds"]
    kind = ", ".join(dict.fromkeys(each["files"]["disk"]["kind"] for each in ranks))
    figure = f"{kind}: {speed / 1e6:,.0f} MB/s, fsync {1e3 * fsync:.2g} ms"
    figure += f", the slowest {slow['host']}" if len(ranks) > 1 else ""
    if {"tmpfs", "ramfs"} & set(kind.split(", ")):
        yield Finding("files", "warning", f"{figure}; it is memory", "set out to a disk: a reboot forgets this one")
    elif speed < SLOW_WRITE or fsync > SLOW_FSYNC:
        seconds = asked.checkpoint_bytes / speed
        remedy = f"a checkpoint takes {seconds:.0f} s: set checkpoint.minutes higher, or a faster out"
        yield Finding("files", "warning", figure, remedy)
    else:
        yield Finding("files", "ok", figure)
    free = min(each["files"]["disk"]["free_bytes"] for each in ranks)
    need = asked.checkpoint_bytes * (asked.keep + 1)  # one more while the next is written
    figure = f"{mebibytes(free, 0)} MiB free; {count(asked.keep + 1, 'checkpoint')} take {mebibytes(need, 0)}"
    if free < asked.checkpoint_bytes:
        yield Finding("files", "fails", figure, "make room, or name another out: not one checkpoint fits")
    elif free < need:
        yield Finding("files", "warning", figure, "make room, or set checkpoint.keep lower")
    else:
        yield Finding("files", "ok", figure)


def speeds(links: Facts, asked: Asked) -> Iterator[Finding]:
    """The links: what an all-reduce of the gradients takes, and the slowest pair."""
    if not links:
        yield Finding("links", "ok", "one rank: there are none")
        return
    reduce = links["collectives"]["all_reduce"]
    small, large = reduce[0], reduce[-1]
    seconds = asked.gradient_bytes * large["seconds"] / large["bytes"]
    figure = f"all-reduce: {1e6 * small['seconds']:,.0f} µs for {amount(small['bytes'])}, "
    figure += f"{large['bandwidth'] / 1e9:.3g} GB/s for {amount(large['bytes'])}; this model's gradients "
    figure += f"({mebibytes(asked.gradient_bytes)} MiB) in {1e3 * seconds:,.0f} ms"
    yield Finding("links", "ok", figure)
    kinds = {"ranks of a host": False, "hosts": True}
    for kind, between in kinds.items():
        pairs = [pair for pair in links["pairs"] if (pair["hosts"][0] != pair["hosts"][1]) == between]
        if not pairs:
            continue
        slow = min(pairs, key=lambda pair: pair["bandwidth"])
        median = statistics.median(pair["bandwidth"] for pair in pairs)
        late = statistics.median(pair["latency"] for pair in pairs)
        (a, b), (here, there) = slow["ranks"], slow["hosts"]
        figure = f"between {kind}: {median / 1e9:.3g} GB/s, {1e6 * late:,.0f} µs"
        if len(pairs) > 1:
            figure += f"; slowest ranks {a} ({here}) and {b} ({there}) with {slow['bandwidth'] / 1e9:.3g} GB/s"
        if len(pairs) > 2 and slow["bandwidth"] < median / SLOW_PAIR:
            remedy = f"leave out {worst(pairs) if between else here}, or look at its network card, cable and switch"
            yield Finding("links", "warning", figure, remedy)
        elif between and median < SLOW_NETWORK:
            remedy = "if there is a faster network, name its interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
            yield Finding("links", "warning", figure, remedy)
        else:
            yield Finding("links", "ok", figure)


def worst(pairs: list[Facts]) -> str:
    """The host whose pairs are slowest."""
    hosts = dict.fromkeys(host for pair in pairs for host in pair["hosts"])
    return min(hosts, key=lambda host: statistics.median(pair["bandwidth"] for pair in pairs if host in pair["hosts"]))


def determinism(ranks: list[Facts]) -> Iterator[Finding]:
    """Whether an all-reduce is right, the same on all ranks, and the same each time."""
    about = [each["determinism"] for each in ranks]
    wrong = [each for each in ranks if not each["determinism"]["off"] < OFF]  # a NaN is not less than anything
    times = len(about[0]["digests"])
    unequal = [each for each in ranks if each["determinism"]["digests"] != about[0]["digests"]]
    if wrong:
        figure = f"an all-reduce is wrong by {wrong[0]['determinism']['off']:.1g} on {place(wrong[0])}"
        yield Finding("determinism", "fails", figure, "leave that host out: its memory, GPU or network is broken")
    elif unequal:
        figure = f"{place(unequal[0])} gets other bits from an all-reduce than {place(ranks[0])}"
        remedy = "take hosts that are alike, and the same versions: the ranks' weights would part"
        yield Finding("determinism", "fails", figure, remedy)
    elif len(set(about[0]["digests"])) > 1:
        figure = f"{times} all-reduces of the same numbers give {len(set(about[0]['digests']))} different results"
        remedy = "set NCCL_ALGO=Ring: until then a run is not repeatable to the last bit"
        yield Finding("determinism", "warning", figure, remedy)
    else:
        off = max(one["off"] for one in about)
        figure = f"{times} all-reduces give the same bits on all ranks; off by {off:.0e}, which is rounding"
        yield Finding("determinism", "ok", figure)


def slurm(ranks: list[Facts]) -> Iterator[Finding]:
    """Whether the job's shape and settings fit the run."""
    about = ranks[0]["slurm"]
    if not about:
        return
    job = f"job {about['JOB_ID']}"
    fine = True
    nodes, hosts = int(about.get("JOB_NUM_NODES", "1")), by_host(ranks)
    if nodes > len(hosts):
        fine, figure = False, f"{job} has {nodes} nodes, and ranks on {len(hosts)}"
        yield Finding("slurm", "warning", figure, f"start them with srun --nodes={nodes}")
    for host, some in hosts.items():
        one = some[0]["slurm"]
        gpus, cpus = int(one.get("GPUS_ON_NODE") or 0), int(one.get("CPUS_ON_NODE") or 0)
        used = {each["device"].get("uuid") for each in some if each["device"].get("type") == "cuda"}
        if gpus > len(used):
            fine = False
            figure = f"{job} holds {count(gpus, 'GPU')} of {host}, and its {count(len(some), 'task')} use {len(used)}"
            remedy = "ask for as many tasks a node as GPUs, and let device=auto find them"
            yield Finding("slurm", "warning", figure, remedy)
        free = len({core for each in some for core in each["cores"].get("allowed", [])})
        if free and free < min(cpus, some[0]["cores"].get("present", cpus)):
            fine = False
            figure = f"{job} holds {cpus} CPUs of {host}, and its tasks may use {free}"
            yield Finding("slurm", "warning", figure, "set cluster.cpus_per_task, or srun --cpus-per-task")
    settings = list(job_settings(about, job))
    yield from settings
    if fine and not any(each.verdict != "ok" for each in settings):
        again = int(about.get("RESTART_COUNT", "0"))
        figure = f"{job}: {count(len(ranks), 'rank')} on {count(len(hosts), 'node')}"
        yield Finding("slurm", "ok", figure + (f", requeued {count(again, 'time')} so far" if again else ""))


def job_settings(about: Facts, job: str) -> Iterator[Finding]:
    """Time left, requeueing, and the notice before the end."""
    known = about.get("job")
    if not known:
        yield Finding("slurm", "warning", f"{job}: scontrol does not answer there", "look with: scontrol show job")
        return
    minutes = minutes_left(about["now"], known.get("EndTime", ""))
    signal = about["notice"]
    if minutes is not None and minutes < SHORT_MINUTES:
        figure = f"{job} ends in {minutes:.0f} minutes"
        yield Finding("slurm", "warning", figure, "ask for more: cluster.time_minutes, or sbatch --time")
    if known.get("Requeue") == "0":
        figure = f"{job} is not requeued after a preemption or a lost node"
        yield Finding("slurm", "warning", figure, "submit it with --requeue")
    if signal.startswith("B:"):
        figure = f"{job}: --signal={signal} reaches the batch script's shell, and no rank"
        yield Finding("slurm", "warning", figure, f"write --signal={signal[2:]}")
    elif not signal:
        figure = f"{job}: no --signal in its script; the time limit then comes as SIGTERM, with KillWait left to save"
        yield Finding("slurm", "warning", figure, "submit it with --signal=USR1@120")
    elif minutes is not None:
        yield Finding("slurm", "ok", f"{job}: {minutes:.0f} minutes left, requeued when asked, notice {signal}")


def minutes_left(now: str, end: str) -> float | None:
    """Minutes between two of Slurm's times; None where there is no end."""
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(now)).total_seconds() / 60
    except ValueError:  # Unknown
        return None
