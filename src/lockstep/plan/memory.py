"""What a rank's tensors hold during a step, by part, and what is there at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, UntypedStorage

from lockstep.distributed.dtensor import local_shard
from lockstep.plan.allocator import reserved_bytes

PARTS = ("parameters", "gradients", "optimizer", "communication", "activations")


class StorageLedger:
    """Every storage that is alive, with its bytes, from `see` on; each is counted once.

    What a storage is for is known only later: a gradient is one when the optimizer takes it. So events are kept, and the
    parts of the peak are told apart at the end.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._names: dict[int, int] = {}  # a storage's address is used again: {address: its number}
        self._alive: dict[int, Any] = {}
        self._events: list[tuple[int, int]] = []  # (number, change of its bytes)
        self._parts: dict[int, str] = {}
        self._left_out: set[int] = set()
        self._hosted: set[int] = set()
        self._count = self._now = self._most = self._at = self._host_now = self.host_peak = 0

    def see(self, tensors: Iterable[Tensor], hosted: bool = False) -> None:
        """Take note of these tensors' storages.

        Args:
            hosted: whether those that are new lie in the host's memory, and not in the device's.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._names:
                self._count += 1
                self._names[key] = number = self._count
                self._alive[key] = weakref.ref(storage, partial(self._gone, key, number))
                if hosted:
                    self._hosted.add(number)
            self._resize(self._names[key], storage.nbytes())

    def resized(self, storage: UntypedStorage) -> None:
        """Take note that a storage has another size, as FSDP's have without an operation."""
        if storage._cdata in self._names:
            self._resize(self._names[storage._cdata], storage.nbytes())

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count these no longer: a device does not hold them."""
        for tensor in tensors:
            number = self._names.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._resize(number, 0)
                self._left_out.add(number)

    def move_to_host(self, tensors: Iterable[Tensor]) -> None:
        """Count these as the host's from now on."""
        for tensor in tensors:
            number = self._names.get(local_shard(tensor).untyped_storage()._cdata)
            if number is not None and number not in self._hosted:
                size = self._sizes.get(number, 0)
                self._resize(number, 0)
                self._hosted.add(number)
                self._resize(number, size)

    def is_hosted(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the host's memory."""
        return self._names.get(tensor.untyped_storage()._cdata) in self._hosted

    def call(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what storages are for; of several parts the first in PARTS counts: a bucket of gradients is gradients."""
        for tensor in tensors:
            if tensor is not None:
                number = self._names.get(local_shard(tensor).untyped_storage()._cdata)
                if number is not None:
                    self._parts[number] = min(part, self._parts.get(number, part), key=PARTS.index)

    def begin(self) -> None:
        """Find the peak from now on."""
        on_device = ((number, size) for number, size in self._sizes.items() if number not in self._hosted)
        self._events, self._most = [(number, size) for number, size in on_device if size], self._now
        self._at, self.host_peak = len(self._events), self._host_now

    def peak(self) -> dict[str, int]:
        """Bytes by part when most was there."""
        held: dict[int, int] = {}
        for number, change in self._events[: self._at]:
            held[number] = held.get(number, 0) + change
        found = dict.fromkeys(PARTS, 0)
        for number, size in held.items():
            found[self._parts.get(number, "activations")] += size
        return found

    def slack(self) -> int:
        """Bytes that torch's allocator would have taken by then beyond the peak, on a GPU."""
        return max(0, reserved_bytes(self._events) - self._most)

    def _resize(self, number: int, size: int) -> None:
        size = 0 if number in self._left_out else size
        change = size - self._sizes.get(number, 0)
        if change and number in self._hosted:
            self._sizes[number] = size
            self._host_now += change
            self.host_peak = max(self.host_peak, self._host_now)
        elif change:
            self._sizes[number] = size
            self._events.append((number, change))
            self._now += change
            if self._now > self._most:
                self._most, self._at = self._now, len(self._events)

    def _gone(self, key: int, number: int, reference: Any) -> None:
        self._resize(number, 0)
        self._sizes.pop(number, None)
        self._hosted.discard(number)
        del self._names[key], self._alive[key]
