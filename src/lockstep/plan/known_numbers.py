"""Numbers that are known although tensors hold none: constants, and what follows from them.

A training asks its tensors few questions: did a gradient overflow, how many steps are done, how many numbers were
normalised. All other numbers are taken for 1, which is finite. So comparisons have an answer, and what is computed from
known numbers is known.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

CONSTANTS = ("full", "zeros", "ones", "zeros_like", "ones_like", "full_like", "zero_", "fill_", "scalar_tensor")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf")
FINITE = ("_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_")  # numbers that are 1 do not overflow
SMALL_TENSOR = 16  # numbers of a tensor that are looked at when it is constant


class KnownNumbers:
    """The first number of each storage whose numbers are known."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Any, bool | int | float]] = {}

    def of(self, tensor: Tensor) -> bool | int | float:
        """What the host reads from a tensor: what is known, else 1."""
        found = self._get(tensor)
        plain: Any = bool if tensor.dtype is torch.bool else float if tensor.is_floating_point() else int
        return plain(1 if found is None else found)

    def learn(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """See an operation and what it made."""
        name = func._opname
        fresh = [each for each in made if isinstance(each, FakeTensor)]
        if len(fresh) != 1 or name in FINITE:
            return
        compared = name in COMPARISONS and fresh[0].dtype is torch.bool
        constant = name in CONSTANTS and fresh[0].numel() <= SMALL_TENSOR
        counted = name == "sum" and given[0].numel() <= SMALL_TENSOR
        if not (compared or constant or counted or any(self._get(each) is not None for each in given)):
            return
        value = self._computed(func, args, kwargs) if not self._is_view(func, given, fresh[0]) else self._get(fresh[0])
        storage = fresh[0].untyped_storage()
        if value is None:
            self._values.pop(storage._cdata, None)
        else:
            self._values[storage._cdata] = (weakref.ref(storage), value)

    def forget(self, tensors: list[Tensor]) -> None:
        """Other ranks' numbers came into these."""
        for each in tensors:
            if isinstance(each, FakeTensor):
                self._values.pop(each.untyped_storage()._cdata, None)

    def _is_view(self, func: Any, given: list[Tensor], made: Tensor) -> bool:
        key = made.untyped_storage()._cdata
        return not func._schema.is_mutable and any(each.untyped_storage()._cdata == key for each in given)

    def _get(self, tensor: Tensor) -> bool | int | float | None:
        if not isinstance(tensor, FakeTensor):
            return None
        reference, value = self._values.get(tensor.untyped_storage()._cdata, (None, None))
        return value if reference is not None and reference() is not None else None

    def _computed(self, func: Any, args: Any, kwargs: Any) -> bool | int | float | None:
        """The operation on single numbers; None where it does not take them."""

        def alone(tensor: Tensor) -> Tensor:
            shape = tensor.shape if tensor.numel() <= SMALL_TENSOR else [1] * tensor.dim()
            return torch.full(shape, self.of(tensor), dtype=tensor.dtype)

        if kwargs.get("out") is not None:  # many numbers side by side in one that is given
            return None
        try:
            with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
                result = func(*tree_map_only(Tensor, alone, args), **tree_map_only(Tensor, alone, kwargs))
                number: bool | int | float = result.flatten()[0].item()
                return number
        except (RuntimeError, IndexError, AttributeError, TypeError, NotImplementedError):
            return None
