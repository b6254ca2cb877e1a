"""Time and bandwidth of collectives, and of pairs of ranks, by the size of the message.

A small message costs a latency, whatever its size; a large one is as fast as the link. For collectives this is the *bus*
bandwidth, as in nccl-tests, which can be compared with the link's own for any number of ranks n: an all-reduce of S
bytes sends 2 S (n − 1) / n bytes over each rank's link, an all-gather to S bytes, or a reduce-scatter of them, half of that.
Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from lockstep.diagnose.findings import Facts, Findings
from lockstep.distributed.collectives import gather_objects
from lockstep.distributed.process_group import World
from lockstep.utils.tables import terminal_tables, terminal_width
from lockstep.utils.text import mebibytes

SIZES = tuple(2**10 * 4**power for power in range(8))  # 1 KiB … 16 MiB
GPU_SIZES = (*SIZES, 2**26, 2**28)
PAIR_SIZES = {"cpu": 2**22, "cuda": 2**26}  # bytes by which pairs are compared
LATENCY_TRIPS, BANDWIDTH_TRIPS = 10, 1  # of a pair: small messages for its latency, large ones for its bandwidth
SAMPLES = 5  # of each measurement: their median counts
SECONDS = 0.1  # about so long all of them take together
ALL_INDICES = 64  # ranks up to which every two nodes try the links of all their ranks
SLOW_PAIR = 3  # times slower than the median of its kind a pair must be to be called slow
SLOW_NETWORK = 0.125e9  # bytes/s: what a network of 1 Gbit/s carries
BandwidthRow = dict[str, float]  # bytes, seconds, bandwidth in bytes a second
LABELS = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "pair": "pair"}


def measure_bandwidth(world: World, sizes: tuple[int, ...] = ()) -> dict[str, Any]:
    """Measure the links of all ranks; all ranks call it together, and there must be at least two.

    Args:
        sizes: bytes of the messages; none: those that suit the device.

    Returns:
        On every rank: `collectives`, {name: a BandwidthRow for each size}, where `pair` is rank 0 with the first rank of another
        host, or with rank 1. On rank 0 also `pairs`: {ranks, hosts, latency in s, bandwidth in bytes/s}, each.
    """
    where = message_device(world)
    sizes = sizes or (GPU_SIZES if where.type == "cuda" else SIZES)
    found = {name: [time_collective(world, name, size) for size in sizes] for name in list(LABELS)[:3]}
    away = next((rank for rank, host in enumerate(world.hosts) if host != world.hosts[0]), 1)
    found["pair"] = []
    for size in sizes:
        seconds = slowest_time(world, ping_pong(world, (0, away), size, BANDWIDTH_TRIPS))
        found["pair"].append({"bytes": size, "seconds": seconds, "bandwidth": size / seconds})
    mine = []
    for pairs in pair_rounds(world.hosts):
        dist.barrier(world.control)
        for pair in pairs:
            if world.rank in pair:
                size = PAIR_SIZES[where.type]
                latency, seconds = (
                    ping_pong(world, pair, 2**10, LATENCY_TRIPS),
                    ping_pong(world, pair, size, BANDWIDTH_TRIPS),
                )
                if world.rank == pair[0]:
                    hosts = [world.hosts[rank] for rank in pair]
                    mine.append({"ranks": pair, "hosts": hosts, "latency": latency, "bandwidth": size / seconds})
    return {"collectives": found, "pairs": [pair for some in gather_objects(mine, world.control) for pair in some]}


def time_collective(world: World, name: str, size: int) -> BandwidthRow:
    """Time one collective over all ranks; `size` bytes are what it reduces, gathers or scatters in all."""
    ranks = world.world_size
    piece = max(1, math.ceil(size / 4 / ranks))
    whole, mine = (torch.zeros(length, device=message_device(world)) for length in (ranks * piece, piece))
    run: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, mine),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(mine, whole),
    }
    seconds = slowest_time(world, timed(world, run[name], 1))  # the first one also makes connections and buffers
    seconds = slowest_time(world, timed(world, run[name], 1))
    repeats = min(20, max(1, int(SECONDS / SAMPLES / seconds)))
    seconds = statistics.median(slowest_time(world, timed(world, run[name], repeats)) for _ in range(SAMPLES))
    sent = (2 if name == "all_reduce" else 1) * 4 * piece * (ranks - 1)
    return {"bytes": 4 * piece * ranks, "seconds": seconds, "bandwidth": sent / seconds}


def timed(world: World, run: Callable[[], Any], repeats: int) -> float:
    """Seconds of one of `repeats` calls, begun by all ranks together."""
    dist.barrier(world.control)
    synchronize(world)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(world)
    return (time.perf_counter() - started) / repeats


def message_device(world: World) -> torch.device:
    """Where the messages lie: NCCL carries a GPU's memory, gloo the host's."""
    return world.device if world.backend == "nccl" else torch.device("cpu")


def synchronize(world: World) -> None:
    """Wait until a GPU has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def slowest_time(world: World, seconds: float) -> float:
    """The largest of all ranks' times, on all of them."""
    number = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=world.control)
    return max(number.item(), 1e-9)


def ping_pong(world: World, pair: tuple[int, int], size: int, times: int) -> float:
    """Seconds in which a message of `size` bytes gets from one rank of a pair to the other; 0 on all other ranks.

    Args:
        times: there and back so often, in each measurement.
    """
    if world.rank not in pair:
        return 0.0
    first, peer = world.rank == pair[0], pair[0] if world.rank == pair[1] else pair[1]
    message = torch.zeros(max(1, size // 4), device=message_device(world))
    taken = []
    for _ in range(1 + SAMPLES):
        synchronize(world)
        started = time.perf_counter()
        for _ in range(times):
            for way in (dist.isend, dist.irecv) if first else (dist.irecv, dist.isend):
                transfer(way, message, peer)
        synchronize(world)
        taken.append((time.perf_counter() - started) / times / 2)
    return statistics.median(taken[1:])  # the first one also makes the connection


def transfer(way: Any, message: Tensor, peer: int) -> None:
    """Send or receive. Batched: NCCL then takes the group's own connections, and makes none for each pair."""
    for work in dist.batch_isend_irecv([dist.P2POp(way, message, peer)]):
        work.wait()


def pair_rounds(hosts: list[str]) -> list[list[tuple[int, int]]]:
    """Which ranks try their link at the same time, so that no two of them share one.

    First all pairs within a host, one at a time on each; then pairs of hosts, as in a tournament in which each plays
    each. In those the ranks of the same place on both try theirs, since each may have a network card of its own: all
    of them in turn, or with many ranks another one in each round.
    """
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    inside = [list(combinations(ranks, 2)) for ranks in nodes.values()]
    found = [
        [pairs[number] for pairs in inside if number < len(pairs)] for number in range(max(map(len, inside), default=0))
    ]
    players: list[list[int] | None] = list(nodes.values())
    if len(players) % 2:
        players.append(None)
    places = min(map(len, nodes.values()))
    for number in range(len(players) - 1):
        half = len(players) // 2
        games = [(a, b) for a, b in zip(players[:half], reversed(players[half:]), strict=True) if a and b]
        for place in range(places) if len(hosts) <= ALL_INDICES else [number % places]:
            if games:
                found.append([(min(a[place], b[place]), max(a[place], b[place])) for a, b in games])
        players = [players[0], players[-1], *players[1:-1]]
    return found


# What it means ----------------------------------------------------------------------------------------------------


def judge_links(links: Facts, gradient_bytes: int) -> Findings:
    """What an all-reduce of the gradients takes, and which pair of ranks is slowest.

    Args:
        links: from measure_bandwidth; empty for a single rank.
    """
    found = Findings("links")
    if not links:
        found.ok("one rank: there are none")
        return found
    reduce = links["collectives"]["all_reduce"]
    small, large = reduce[0], reduce[-1]
    seconds = gradient_bytes * large["seconds"] / large["bytes"]
    figure = f"all-reduce: {1e6 * small['seconds']:,.0f} µs for {message_size(small['bytes'])}, "
    figure += f"{large['bandwidth'] / 1e9:.3g} GB/s for {message_size(large['bytes'])}; this model's gradients "
    figure += f"({mebibytes(gradient_bytes)} MiB) in {1e3 * seconds:,.0f} ms"
    found.ok(figure)
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
            remedy = (
                f"leave out {slowest_host(pairs) if between else here}, or look at its network card, cable and switch"
            )
            found.warning(figure, remedy)
        elif between and median < SLOW_NETWORK:
            remedy = "if there is a faster network, name its interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
            found.warning(figure, remedy)
        else:
            found.ok(figure)
    return found


def slowest_host(pairs: list[Facts]) -> str:
    """The host whose pairs are slowest."""
    hosts = dict.fromkeys(host for pair in pairs for host in pair["hosts"])
    return min(hosts, key=lambda host: statistics.median(pair["bandwidth"] for pair in pairs if host in pair["hosts"]))


# For people ---------------------------------------------------------------------------------------------------------


def bandwidth_tables(found: dict[str, list[BandwidthRow]], ranks: int) -> list[Table]:
    """Time and bus bandwidth of each collective, and of a pair, by the message's size."""
    columns = {"message": [message_size(row["bytes"]) for row in list(found.values())[-1]]}
    for name, rows in found.items():
        columns[f"{LABELS[name]} ms"] = [f"{1e3 * row['seconds']:.3g}" for row in rows]
        columns[f"{LABELS[name]} GB/s"] = [f"{row['bandwidth'] / 1e9:.3g}" for row in rows]
    return terminal_tables(f"links of {ranks} ranks: milliseconds, and GB/s over a link", columns, text=())


def bandwidth_plot(found: dict[str, list[BandwidthRow]], height: int = 8) -> str:
    """Bandwidth against the message's size, both logarithmic, as text: a letter a collective, `*` where they meet."""
    letters = dict(zip(LABELS, "rgsp", strict=True))
    values = [row["bandwidth"] for rows in found.values() for row in rows]
    low, high = math.log10(min(values)), math.log10(max(values))
    columns = len(next(iter(found.values())))
    width = min(10, (terminal_width() - 16) // columns)
    field = [[" "] * columns for _ in range(height)]
    for name, rows in found.items():
        for column, row in enumerate(rows):
            level = (math.log10(row["bandwidth"]) - low) / ((high - low) or 1)
            line = height - 1 - round(level * (height - 1))
            field[line][column] = letters[name] if field[line][column] == " " else "*"
    lines = []
    for number, cells in enumerate(field):
        value = 10 ** (high - (high - low) * number / max(1, height - 1)) / 1e9
        lines.append(f"{value:9.3g} GB/s │" + "".join(f"{cell:^{width}}" for cell in cells))
    each = 1 if width >= len("256 KiB ") else 2  # a size under every place, or under every second
    sizes = [message_size(row["bytes"]) for row in list(found.values())[-1]]
    under = "".join(f"{size:^{width}}" if each == 1 else f"{size:{2 * width}}" for size in sizes[::each])
    key = ", ".join(f"{letters[name]} {LABELS[name]}" for name in found)
    below = [f"{'':15}└{'─' * width * columns}", f"{'':16}{under.rstrip()}", f"{'':9}{key}, * several"]
    return "\n".join([*lines, *below])


def message_size(size: float) -> str:
    """`16 KiB`, `4 MiB`."""
    return f"{size / 2**20:.3g} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"
