"""Batches of any shape: a pytree of tensors, that is nested dicts, lists, tuples and dataclasses, moved and cut as one.

torch.utils._pytree would walk dicts, lists and tuples; dataclasses it knows only where somebody has registered them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.errors import UserError


@dataclass
class Batch:
    """What a rank trains on, or evaluates, at a time.

    Attributes:
        inputs, targets: any pytree of tensors whose first dim are the samples: [count, …].
        count: how many samples it holds.
        weight: this rank's share of what the loss is a mean over, times the number of shares: its loss times this,
            averaged over the ranks, is the mean over the global batch. 1 where all ranks have equally many items.
        items: how many items the loss of this batch is a mean over, where a task says so itself (`weigh`).
        weigh: the task's function that says so; None: samples are counted.
    """

    inputs: Any
    targets: Any
    count: int
    weight: float | Tensor = 1.0
    items: Tensor | None = None
    weigh: Callable[[Any], Tensor] | None = None

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a copy to a GPU runs beside the computation."""
        inputs, targets = (
            map_tensors(lambda tensor: tensor.pin_memory(), each) for each in (self.inputs, self.targets)
        )
        return Batch(inputs, targets, self.count)


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """A tree of the same form with `change(tensor)` in the place of every tensor; all else is kept."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        changed = {key: map_tensors(change, value) for key, value in tree.items()}
        return changed if type(tree) is dict else _rebuilt(tree, changed)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(change, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(change, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [entry.name for entry in dataclasses.fields(tree) if entry.init]
        return dataclasses.replace(tree, **{name: map_tensors(change, getattr(tree, name)) for name in names})
    return tree


def _rebuilt(tree: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    """A mapping of another class than dict, such as transformers' BatchEncoding, with other values."""
    try:
        return type(tree)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


def tree_tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    yield from found


def with_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """A tree of the same form with these tensors in it, in the order of `tree_tensors`."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), tree)


def first_tensor(tree: Any, what: str) -> Tensor:
    """The first tensor of a tree.

    Raises:
        UserError: it has none.
    """
    for tensor in tree_tensors(tree):
        return tensor
    raise UserError(f"{what} hold no tensor ({describe(tree)}): a dataset gives (inputs, targets) with tensors in both")


def as_scalar(value: Any, device: torch.device) -> Tensor:
    """A number as a tensor on a device, which does not wait for it as a copy of the number would; a tensor as it is."""
    if isinstance(value, bool | int | float):
        return torch.full((), value, device=device)
    return torch.as_tensor(value, device=device)


def on_device_of(outputs: Any, targets: Any) -> Any:
    """Targets where the outputs are: a model that is split over devices answers on its last one."""
    device = first_tensor(outputs, "the model's outputs").device
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), targets)


def describe(tree: Any) -> str:
    """A tree by the shapes and types of its leaves, for messages: `{'ids': int64 [4, 16]}`."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {list(tree.shape)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        inner = ", ".join(describe(value) for value in tree[:4]) + (", …" if len(tree) > 4 else "")
        return f"({inner})" if isinstance(tree, tuple) else f"[{inner}]"
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        inner = ", ".join(f"{entry.name}={describe(getattr(tree, entry.name))}" for entry in dataclasses.fields(tree))
        return f"{type(tree).__name__}({inner})"
    return type(tree).__name__


def cut_tree(tree: Any, start: int, stop: int, count: int) -> Any:
    """Samples start…stop − 1 of a tree that holds `count` samples.

    A tensor is cut along its first dim. A list of `count` objects that are no such tensors, as a collate of its own may
    make of samples of unequal length, is cut as a list. What belongs to no sample, such as a number, is kept.

    Raises:
        UserError: a tensor's first dim is not the samples.
    """
    if isinstance(tree, Tensor):
        if tree.dim() and tree.shape[0] != count:
            raise UserError(
                f"a tensor {list(tree.shape)} of a batch of {count} samples cannot be cut into micro-batches: its first "
                "dim must be the samples; change the task's collate, or set accumulate=1"
            )
        return tree[start:stop] if tree.dim() else tree
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields") and len(tree) == count:
        rows = [isinstance(each, Tensor) and each.dim() > 0 and each.shape[0] == count for each in tree]
        if not all(rows):
            return tree[start:stop]
    if isinstance(tree, Mapping):
        changed = {key: cut_tree(value, start, stop, count) for key, value in tree.items()}
        return changed if type(tree) is dict else _rebuilt(tree, changed)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(cut_tree(value, start, stop, count) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(cut_tree(value, start, stop, count) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [entry.name for entry in dataclasses.fields(tree) if entry.init]
        return dataclasses.replace(tree, **{name: cut_tree(getattr(tree, name), start, stop, count) for name in names})
    return tree


def pieces(count: int, wanted: int) -> list[tuple[int, int]]:
    """(start, stop) of `wanted` pieces of `count` samples, or a few less: of ceil(count / wanted) each, as
    torch.chunk."""
    size = -(-count // wanted)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def join_trees(trees: list[Any]) -> Any:
    """Trees of the same form as one, tensors put together along their first dim."""
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(trees)
    if isinstance(first, Mapping):
        changed = {key: join_trees([tree[key] for tree in trees]) for key in first}
        return changed if type(first) is dict else _rebuilt(first, changed)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(join_trees(list(values)) for values in zip(*trees, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(join_trees(list(values)) for values in zip(*trees, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [entry.name for entry in dataclasses.fields(first) if entry.init]
        return dataclasses.replace(
            first, **{name: join_trees([getattr(tree, name) for tree in trees]) for name in names}
        )
    return first
