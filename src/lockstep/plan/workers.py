"""Rows are planned beside each other, one per core: none needs what another has found."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from lockstep.distributed.cores import usable_cores

_plan_row: Callable[[int], Any] | None = None  # what forked processes find in place: rows need not be pickled


def planned_beside(plan: Callable[[int], Any], numbers: list[int]) -> Iterator[tuple[int, Any]]:
    """(number, what `plan` makes of it) of each, as they are done.

    On Linux each core has a process, a fork of this one; elsewhere, or with one core, all are planned in this process.

    Args:
        plan: called with a number; what it returns must be picklable, and it must not raise.
        numbers: in the order in which they are begun.

    Yields:
        the number with None where its process was ended, as by the kernel when memory is short.
    """
    global _plan_row
    processes = min(len(numbers), usable_cores())
    if processes < 2 or sys.platform != "linux":
        yield from ((number, plan(number)) for number in numbers)
        return
    _plan_row = plan
    importlib.import_module("torch.distributed.tensor.debug")  # for all processes once; each row needs it
    try:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, fork, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: dict[Future[Any], int] = {pool.submit(_forked, number): number for number in numbers}
            for done in as_completed(waiting):
                try:
                    yield waiting[done], done.result()
                except BrokenProcessPool:
                    yield waiting[done], None
    finally:
        _plan_row = None


def _forked(number: int) -> Any:
    assert _plan_row, f"process {os.getpid()} is no fork"
    return _plan_row(number)
