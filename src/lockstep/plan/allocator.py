"""What torch's caching allocator takes from a GPU to hold some tensors: more than their bytes.

It rounds each request up to 512 bytes. Requests up to 1 MiB are cut from segments of 2 MiB, those below 10 MiB from segments
of 20 MiB, and larger ones have a segment of their own, a multiple of 2 MiB. A request gets the smallest free block that
holds it; what is left of the block stays free, in the small pool from 512 bytes on, else above 1 MiB. Freed neighbours
become one block again. Segments are kept.
Source: https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp,
https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

BLOCK, MIB = 512, 2**20
SMALL_REQUEST, LARGE_REQUEST = MIB, 10 * MIB
SEGMENT_OF_SMALL, SEGMENT_OF_LARGE, ROUND = 2 * MIB, 20 * MIB, 2 * MIB


class CachingAllocator:
    """Segments and their blocks. `reserved`: bytes of all segments."""

    def __init__(self) -> None:
        self.reserved = self._next = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by pool: (size, address), sorted
        self._starts: dict[int, int] = {}  # free blocks: {address: size}
        self._ends: dict[int, int] = {}  # {end: address}
        self._used: dict[int, tuple[int, int, bool]] = {}  # {number: (address, size, small)}

    def take(self, number: int, size: int) -> None:
        """Give a tensor's storage its block."""
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        small = size <= SMALL_REQUEST
        pool = self._free[small]
        place = bisect_left(pool, (size, 0))
        if place == len(pool):
            self._add_segment(size, small)
            place = bisect_left(pool, (size, 0))
        found, address = pool[place]
        self._remove(found, address, small)
        rest = found - size
        if rest >= BLOCK if small else rest > SMALL_REQUEST:
            self._insert(rest, address + size, small)
        else:
            size = found
        self._used[number] = (address, size, small)

    def give_back(self, number: int) -> None:
        """Free a storage's block."""
        address, size, small = self._used.pop(number)
        if (before := self._ends.get(address)) is not None:
            self._remove(address - before, before, small)
            address, size = before, size + address - before
        if (after := self._starts.get(address + size)) is not None:
            self._remove(after, address + size, small)
            size += after
        self._insert(size, address, small)

    def _add_segment(self, size: int, small: bool) -> None:
        segment = SEGMENT_OF_SMALL if small else SEGMENT_OF_LARGE if size < LARGE_REQUEST else -(-size // ROUND) * ROUND
        self._next += ROUND  # a gap: blocks of two segments are never one
        self._insert(segment, self._next, small)
        self._next += segment
        self.reserved += segment

    def _insert(self, size: int, address: int, small: bool) -> None:
        insort(self._free[small], (size, address))
        self._starts[address], self._ends[address + size] = size, address

    def _remove(self, size: int, address: int, small: bool) -> None:
        pool = self._free[small]
        del pool[bisect_left(pool, (size, address))]
        del self._starts[address], self._ends[address + size]


def reserved_bytes(changes: Iterable[tuple[int, int]]) -> int:
    """Bytes of all segments after these changes.

    Args:
        changes: (number of a storage, change of its bytes), in order.
    """
    allocator, held = CachingAllocator(), dict[int, int]()
    for number, change in changes:
        if held.get(number):
            allocator.give_back(number)
        held[number] = held.get(number, 0) + change
        if held[number]:
            allocator.take(number, held[number])
    return allocator.reserved
