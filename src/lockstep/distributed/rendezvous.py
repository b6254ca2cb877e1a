"""How ranks find each other: the store that rank 0 or torchrun's agent serves, and a round call of the ranks in it."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lockstep.distributed.environment import Place
from lockstep.errors import UserError

Returned = TypeVar("Returned")
NOTICE_SECONDS = 60.0  # after that, rank 0 says which ranks it is waiting for


def open_store(place: Place, timeout_seconds: float) -> dist.Store:
    """Connect to the key-value store where ranks meet; rank 0 serves it unless torchrun's agent already does.

    Raises:
        UserError: the port is taken, or nobody answers there.
    """
    serves = place.rank == 0 and not place.agent_store
    where = f"MASTER_ADDR={place.master_addr} MASTER_PORT={place.master_port}"
    if not serves and not is_listening(place.master_addr, place.master_port, timeout_seconds):
        raise UserError(
            f"rank {place.rank} could not reach rank 0 at {where} within {timeout_seconds:g} s: "
            "start rank 0, or correct the address, or raise timeout_seconds"
        )

    def connect() -> dist.Store:
        listening = listen_at(place.master_addr, place.master_port) if serves else None
        options: dict[str, Any] = {"master_listen_fd": listening.detach()} if listening else {}
        return dist.TCPStore(
            place.master_addr,
            place.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,  # it would wait without saying who is missing; check_in names them
            **options,
        )

    # If something listens there that is no store, TCPStore waits for ever, whatever its timeout.
    try:
        return dist.PrefixStore("lockstep", run_within(timeout_seconds, connect))
    except TimeoutError:
        raise UserError(f"{where}: something answers there that is no store; set a free MASTER_PORT") from None
    except (RuntimeError, ValueError, OSError) as error:  # DistNetworkError among them
        text = str(error).lower()
        if "eaddrinuse" in text or "address already in use" in text:
            raise UserError(f"{where}: the port is in use on {socket.gethostname()}; set a free MASTER_PORT") from None
        raise UserError(f"{where}: no store there ({str(error).splitlines()[0]}); set another MASTER_PORT") from None


def listen_at(host: str, port: int) -> socket.socket | None:
    """A socket that listens where MASTER_ADDR says and nowhere else, for the store; None: on all interfaces, as torch's.

    Only localhost and an address of this machine's are taken at their word: other machines may know a name by another
    address than this one does.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((str(address), port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # the address of something that passes it on
            return None
        raise


def run_within(seconds: float, work: Callable[[], Returned]) -> Returned:
    """What `work` returns, or raises.

    Raises:
        TimeoutError: it takes longer; the thread it is in is left alone.
    """
    done: Future[Returned] = Future()

    def call() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done.result(seconds)


def is_listening(host: str, port: int, timeout_seconds: float) -> bool:
    """Wait until something listens at host:port. TCPStore would wait too, and print a page of C++ when it gives up."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def wait_for_keys(store: dist.Store, keys: list[str], timeout_seconds: float) -> bool:
    """Whether all keys were set within the time. Asks again and again, because Store.wait logs C++ warnings."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.001
    while True:
        try:
            if store.check(keys):
                return True
        except dist.DistNetworkError:
            return False  # the rank that served the store is gone
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def from_rank_0(
    store: dist.Store, rank: int, name: str, work: Callable[[], dict[str, str]], timeout_seconds: float
) -> dict[str, str]:
    """What `work` returns on rank 0, which alone calls it, on all ranks.

    Args:
        name: of the answer in the store, for this once.

    Raises:
        UserError: rank 0 has ended without an answer.
    """
    if rank == 0:
        try:
            told = work()
        except BaseException as error:
            told = {"error": f"rank 0 failed: {error}"}
            raise
        finally:
            store.set(name, json.dumps(told))
    elif not wait_for_keys(store, [name], timeout_seconds):
        raise UserError("rank 0 ended before it had sent a config; its own words say why")
    return dict(json.loads(store.get(name)))


def check_in(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout_seconds: float,
    note: str = "",
    nodes: tuple[str, ...] = (),
) -> tuple[dist.Store, list[str], list[str]]:
    """Wait until every rank is there; return the part of the store that is theirs, their host names and their notes.

    init_process_group would wait as well, but its time-out does not say which rank it waited for, and in a store that
    outlives its ranks, as an elastic agent's does, it takes a dead rank's address for a new one's. Here rank 0 opens a
    round under a fresh name, and lists in the end who came to it; who is not in that list has read an older name.

    Args:
        note: a text for all other ranks.
        nodes: where each rank should be, to say where to look for one that is missing.

    Raises:
        UserError: some ranks did not come; all the ranks that did come get their numbers.
    """
    me = uuid.uuid4().hex
    here = json.dumps([me, socket.gethostname(), note])
    everyone: list[Any] | None = None
    if rank == 0:
        room = dist.PrefixStore(me, store)
        room.set("0", here)
        store.set("round", me)
        keys = [str(r) for r in range(world_size)]
        if not wait_for_keys(room, keys, min(timeout_seconds, NOTICE_SECONDS)) and timeout_seconds > NOTICE_SECONDS:
            late = [r for r, key in enumerate(keys) if not room.check([key])]
            print(f"still waiting for {describe_ranks(late, nodes)} of {world_size}", file=sys.stderr, flush=True)
            wait_for_keys(room, keys, timeout_seconds - NOTICE_SECONDS)
        everyone = [json.loads(room.get(key)) if room.check([key]) else None for key in keys]
        room.set("list", json.dumps(everyone))
    else:
        # Rank 0 answers when its own wait is over; the others may have come a moment before it.
        deadline, seen = time.monotonic() + timeout_seconds + 30, ""
        while everyone is None and wait_for_keys(store, ["round"], deadline - time.monotonic()):
            current = store.get("round").decode()
            room = dist.PrefixStore(current, store)
            if current != seen:
                room.set(str(rank), here)
                seen = current
            if wait_for_keys(room, ["list"], 0.2):
                listed = json.loads(room.get("list"))
                everyone = listed if listed[rank] and listed[rank][0] == me else None
            if everyone is None and time.monotonic() > deadline:
                break
    if everyone is None:
        raise UserError(f"rank 0 did not join within timeout_seconds={timeout_seconds:g}: start it, or look at its log")
    missing = [r for r, entry in enumerate(everyone) if entry is None]
    if missing:
        leave_store(room, rank, world_size - len(missing))
        raise UserError(
            f"{describe_ranks(missing, nodes)} of {world_size} did not join within timeout_seconds={timeout_seconds:g}: start "
            f"{'them' if len(missing) > 1 else 'it'}, or set WORLD_SIZE to the number of processes you start"
        )
    return room, [entry[1] for entry in everyone], [entry[2] for entry in everyone]


def describe_ranks(ranks: list[int], nodes: tuple[str, ...]) -> str:
    """`ranks 2 (node2), 3 (node2)`, without the nodes where nobody knows them."""
    words = [f"{rank} ({nodes[rank]})" if rank < len(nodes) else str(rank) for rank in ranks]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def leave_store(store: dist.Store, rank: int, readers: int) -> None:
    """Leave after reading from a store: rank 0, which may serve it, waits until the other readers have read."""
    store.add("read", 1)
    if rank == 0:
        deadline = time.monotonic() + 5
        while store.add("read", 0) < readers and time.monotonic() < deadline:
            time.sleep(0.01)
