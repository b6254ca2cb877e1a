"""How ranks find each other: the store that rank 0 or torchrun's agent serves, and a round call of the ranks in it."""

from __future__ import annotations

import base64
import errno
import functools
import ipaddress
import itertools
import json
import os
import resource
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lockstep.distributed.environment import Place
from lockstep.distributed.store import (
    BRIEFLY_SECONDS,
    absent_keys,
    close_question,
    get_many,
    leave_store,
    run_within,
    wait_for_keys,
)
from lockstep.distributed.twins import LOOK_SECONDS, Lookout, exported_once, named
from lockstep.errors import UserError

NOTICE_SECONDS = 60.0  # after that, rank 0 says which ranks it is waiting for
CONNECTIONS = 4  # of a rank's to the store, at most at one time
RANKS_SHOWN = 8  # that a message names


def open_store(place: Place, timeout_seconds: float) -> dist.Store:
    """Connect to the key-value store where ranks meet; rank 0 serves it unless torchrun's agent already does.

    Raises:
        UserError: the port is taken, or nobody answers there, or another process is this rank too.
    """
    serves = place.rank == 0 and not place.agent_store
    lookout = Lookout(place.rank, place.world_size)
    where = f"MASTER_ADDR={place.master_addr} MASTER_PORT={place.master_port}"
    alone = (lambda: None) if place.agent_store else lookout.look
    if not serves and not is_listening(place.master_addr, place.master_port, timeout_seconds, alone):
        raise UserError(
            f"rank {place.rank} could not reach rank 0 at {where} within {timeout_seconds:g} s: "
            "start rank 0, or correct the address, or raise timeout_seconds"
        )

    def connect() -> dist.Store:
        if serves and place.world_size * CONNECTIONS > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
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
            lookout.look(now=True)
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


def is_listening(host: str, port: int, timeout_seconds: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
    """Wait until something listens at host:port. TCPStore would wait too, and print a page of C++ when it gives up.

    Args:
        meanwhile: called again and again; what it raises ends the wait.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            meanwhile()
            time.sleep(0.1)


def check_in(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout_seconds: float,
    note: str = "",
    nodes: tuple[str, ...] = (),
    served_by_rank_0: bool = False,
) -> tuple[dist.Store, list[str], list[str]]:
    """Wait until every rank is there; return the part of the store that is theirs, their host names and, on rank 0,
    their notes.

    init_process_group would wait as well, but its time-out does not say which rank it waited for, and in a store that
    outlives its ranks, as an elastic agent's does, it takes a dead rank's address for a new one's. Here rank 0 opens a
    round under a fresh name; whoever finds an older round is led on to the next one from there.

    A rank asks the store a constant number of times, whatever the number of ranks, and the store's server does the
    waiting. All read one answer: the hosts, each once with its number of ranks, compressed.

    Args:
        note: a text for rank 0.
        nodes: where each rank should be, to say where to look for one that is missing.
        served_by_rank_0: the store began with this start and ends with it, and no launcher of torch's has numbered the
            ranks: then two processes may take themselves for one rank.

    Raises:
        UserError: some ranks did not come, and all the ranks that did come get their numbers; or one came twice.
    """
    claims = Claims(store, rank, world_size) if served_by_rank_0 else None
    answer: dict[str, Any] | None
    if rank == 0:
        room, answer, notes = call_roll(store, world_size, timeout_seconds, note, nodes, claims)
    else:
        # Rank 0 answers when its own wait is over; the others may have come a moment before it.
        room, answer = answer_roll(store, rank, note, time.monotonic() + timeout_seconds + 30, claims)
        notes = []
    if answer is None:
        raise UserError(f"rank 0 did not join within timeout_seconds={timeout_seconds:g}: start it, or look at its log")
    if missing := answer["missing"]:
        leave_store(room, rank, world_size - len(missing))
        raise UserError(
            f"{describe_ranks(missing, nodes)} of {world_size} did not join within timeout_seconds={timeout_seconds:g}: start "
            f"{'them' if len(missing) > 1 else 'it'}, or set WORLD_SIZE to the number of processes you start"
        )
    return room, [host for host, ranks in answer["hosts"] for _ in range(ranks)], notes


def call_roll(
    store: dist.Store,
    world_size: int,
    timeout_seconds: float,
    note: str,
    nodes: tuple[str, ...],
    claims: Claims | None,
) -> tuple[dist.Store, dict[str, Any], list[str]]:
    """Open a round and answer it, as rank 0: (its part of the store, the answer, the notes of those who came)."""
    alone = claims.check if claims else lambda: None
    name = uuid.uuid4().hex
    room = dist.PrefixStore(name, store)
    room.set("0", json.dumps([room.add("come", 1), socket.gethostname(), note]))
    before = store.compare_set("round", "", name).decode()
    if before != name:  # of ranks that are dead; new ones may have found it already
        store.set("round", name)
        older = dist.PrefixStore(before, store)
        older.set("next", name)
        older.compare_set("answer", "", pack({"come": 0}))
    keys = [str(rank) for rank in range(world_size)]
    briefly = min(timeout_seconds, NOTICE_SECONDS)
    try:
        if not wait_for_keys(room.clone(), keys, briefly, alone) and timeout_seconds > NOTICE_SECONDS:
            late = [int(key) for key in absent_keys(room, keys)]
            print(f"still waiting for {describe_ranks(late, nodes)} of {world_size}", file=sys.stderr, flush=True)
            wait_for_keys(room.clone(), keys, timeout_seconds - NOTICE_SECONDS, alone)
    finally:
        missing = close_question(room, keys)
    there = [json.loads(each) for each in get_many(room, [key for key in keys if key not in set(missing)])]
    answer: dict[str, Any] = {"come": room.add("come", 0), "missing": [int(key) for key in missing]}
    answer["hosts"] = [[host, len(list(ranks))] for host, ranks in itertools.groupby(host for _, host, _ in there)]
    if answer["come"] > len(there):  # a rank came twice, or is on its way: each is to know whether it was heard
        answer["heard"] = [number for number, _, _ in there]
    room.set("answer", pack(answer))
    return room, answer, [text for _, _, text in there]


def answer_roll(
    store: dist.Store, rank: int, note: str, deadline: float, claims: Claims | None
) -> tuple[dist.Store, dict[str, Any] | None]:
    """Come to rank 0's round, as another rank: (its part of the store, the answer, or None where there is none)."""
    alone = claims.check if claims else lambda: None
    room, key = store, "round"
    while wait_for_keys(room, [key], deadline - time.monotonic(), alone):
        room, key = dist.PrefixStore(room.get(key).decode(), store), "next"
        number = room.add("come", 1)
        room.set(str(rank), json.dumps([number, socket.gethostname(), note]))
        if not wait_for_keys(room, ["answer"], deadline - time.monotonic(), alone):
            break
        answer = json.loads(zlib.decompress(base64.b85decode(room.get("answer"))))
        if claims:
            claims.heed(answer)
        # A round of dead ranks has its answer already, and this rank came after that.
        if number <= answer["come"] and number in answer.get("heard", [number]):
            return room, answer
        if claims and rank not in answer["missing"]:
            raise claims.refused()
    return room, None


def pack(answer: dict[str, Any]) -> str:
    return base64.b85encode(zlib.compress(json.dumps(answer).encode())).decode()


class Claims:
    """Who says that it is which rank, in a store that rank 0 serves and that ends with it."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._first, self.rank, self.world_size = store, rank, world_size
        mine = dist.PrefixStore("claims", store)
        self.lookout = Lookout(rank, world_size)
        self.number = mine.add(str(rank), 1)
        mine.set(f"{rank}/{self.number}", named(os.getpid()))
        # A thousand ranks that wait are not to ask four thousand times a second.
        self._pause = LOOK_SECONDS / 2 * (1 + world_size / 256)
        self._next = time.monotonic() + self._pause
        if rank == 0 and self.number > 1:  # the first serves the store: it is there, and may wait, or train already
            wait_for_keys(self.store, ["twice"], BRIEFLY_SECONDS)
            self._next = 0.0
            self.check()
            raise self.refused()

    @functools.cached_property
    def store(self) -> dist.Store:
        """A connection of its own, made only by a rank that has to wait: the other one is waiting."""
        return dist.PrefixStore("claims", self._whole)

    @functools.cached_property
    def _whole(self) -> dist.Store:
        return self._first.clone()

    def check(self) -> None:
        """Raises UserError where another process is this rank too, or where one has found that of any rank.

        The earlier one finds the later one, so that one that has ended in the meantime is not found.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._pause
        try:
            if self.store.check(["twice"]):
                raise UserError(self.store.get("twice").decode())
            if self.store.add(str(self.rank), 0) > self.number:
                time.sleep(2 * LOOK_SECONDS)  # for those that come a moment later
                raise self.refused(self.number)
            self.lookout.look()
        except UserError as error:
            # Whoever waits is told by the answer, and no question is left open in a store that is about to end.
            if self._whole.check(["round"]):
                room = dist.PrefixStore(self._whole.get("round").decode(), self._whole)
                room.compare_set("answer", "", pack({"come": sys.maxsize, "missing": [], "refused": str(error)}))
            self.store.set("twice", str(error))
            leave_store(self.store, self.rank, self.world_size - len(self.lookout.twins))
            raise

    def heed(self, answer: dict[str, Any]) -> None:
        """Raises UserError where the answer is what another rank has found."""
        if "refused" in answer:
            leave_store(self.store, self.rank, self.world_size)
            raise UserError(answer["refused"])

    def refused(self, first: int = 1) -> UserError:
        """What is said of this rank's processes, from the `first` that came on."""
        keys = [f"{self.rank}/{number}" for number in range(first, self.store.add(str(self.rank), 0) + 1)]
        known = [self.store.get(key).decode() for key in keys if self.store.check([key])]
        return exported_once(self.rank, self.world_size, sorted(known))


def describe_ranks(ranks: list[int], nodes: Sequence[str]) -> str:
    """`ranks 2 (node2), 3 (node2)`, without the nodes where nobody knows them; of very many, the first and how many."""
    words = [f"{rank} ({nodes[rank]})" if rank < len(nodes) else str(rank) for rank in ranks[:RANKS_SHOWN]]
    if len(ranks) > RANKS_SHOWN:
        where = {nodes[rank] for rank in ranks if rank < len(nodes)}
        on = f" on {len(where)} hosts" if len(where) > 1 else ""
        words.append(f"… ({len(ranks)} ranks{on})")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
