"""Asking the key-value store in which ranks meet: few questions, waits that its server does, an end that all have read."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from lockstep.distributed.twins import LOOK_SECONDS
from lockstep.errors import UserError

Returned = TypeVar("Returned")
BRIEFLY_SECONDS = 5.0  # for what an ending rank writes down
KEYS_AT_ONCE = 1000  # whose values one answer of the store holds


def run_within(seconds: float, work: Callable[[], Returned]) -> Returned:
    """What `work` returns, or raises.

    Raises:
        TimeoutError: it takes longer; the thread it is in is left alone.
    """
    return begin(work).result(seconds)


def begin(work: Callable[[], Returned]) -> Future[Returned]:
    """Do it in a thread that nobody has to wait for."""
    done: Future[Returned] = Future()

    def call() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done


def run_briefly(work: Callable[[], object]) -> None:
    """Do what takes a moment, or leave it where a disk that does not answer holds it up."""
    with contextlib.suppress(TimeoutError):
        run_within(BRIEFLY_SECONDS, work)


def wait_for_keys(
    store: dist.Store, keys: list[str], timeout_seconds: float, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Whether all keys were set within the time: one question, which the server answers when they are.

    After False, or an error of `meanwhile`, the connection is not to be used again, for the question is still open: who
    has more to ask hands in a clone. Store.wait's own time-out is not asked for, because it logs C++ warnings.

    Args:
        meanwhile: called again and again, without this connection; what it raises ends the wait.
    """
    deadline = time.monotonic() + timeout_seconds
    answered = begin(lambda: store.wait(keys, timedelta(days=30)))
    while True:
        try:
            answered.result(max(0.0, min(LOOK_SECONDS / 2, deadline - time.monotonic())))
            return True
        except TimeoutError:
            if time.monotonic() >= deadline:
                return answered.done() and answered.exception() is None
            meanwhile()
        except RuntimeError:  # the rank that served the store is gone
            return False


def absent_keys(store: dist.Store, keys: list[str]) -> list[str]:
    """Those of the keys that nobody has set, in order; a store says only whether all are there, so it halves them."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    half = len(keys) // 2
    return absent_keys(store, keys[:half]) + absent_keys(store, keys[half:])


def close_question(store: dist.Store, keys: list[str]) -> list[str]:
    """Those of the keys that nobody has set; now they are set, to nothing.

    A wait for them that was given up ends by that. Left open, it would abort a process that serves the store itself and
    ends as Python does.
    """
    absent = absent_keys(store, keys)
    for key in absent:
        store.set(key, "")
    return absent


def get_many(store: dist.Store, keys: list[str]) -> list[bytes]:
    """The values of keys that are all there."""
    parts = (keys[begin : begin + KEYS_AT_ONCE] for begin in range(0, len(keys), KEYS_AT_ONCE))
    return [value for part in parts for value in store.multi_get(part)]


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


def await_everyone(store: dist.Store, name: str, ranks: int) -> None:
    """Wait, a moment at most, until all ranks are here.

    After a last collective a rank may leave while another one has not yet looked at what it has received: gloo then tells
    that one of the broken connection, and not that its wait is over.
    """
    deadline = time.monotonic() + BRIEFLY_SECONDS
    with contextlib.suppress(RuntimeError):  # the rank that served the store is gone
        everyone = -(-store.add(name, 1) // ranks) * ranks  # more than once under one name
        while store.add(name, 0) < everyone and time.monotonic() < deadline:
            time.sleep(0.02)


def leave_store(store: dist.Store, rank: int, readers: int) -> None:
    """Leave after reading from a store: rank 0, which may serve it, waits until the other readers have read."""
    store.add("read", 1)
    if rank == 0:
        deadline = time.monotonic() + 5
        while store.add("read", 0) < readers and time.monotonic() < deadline:
            time.sleep(0.01)
