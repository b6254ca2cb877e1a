"""What a rank hands to its collectives, in bytes by operation, whoever calls them, Python or torch's C++."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")
SEND_NOTHING = ("wait_tensor", "wait_tensors", "barrier", "monitored_barrier_", "_wrap_tensor_autograd")


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes that are handed to collectives while it is entered; it changes nothing, and slows each operation.

    Attributes:
        bytes: by operation (`allreduce_`), each message once. Of what gathers, what a rank ends up with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if takes_dtensors(types):
            return NotImplemented  # it makes operations on local tensors of it, which come by here once more
        result = func(*args, **(kwargs or {}))
        if func.namespace in COLLECTIVES and func._opname not in SEND_NOTHING:
            # The last output is a handle; of what gathers, the larger side counts: what a rank ends up with.
            given, got = (sum(nbytes(each) for each in tree_leaves(side)) for side in (args[-1:] and args, result))
            handed = max(given, got) if func.namespace != "c10d" else nbytes_of_largest(args)
            if func._opname == "alltoall_base_":  # (output, input, …): they may be unequal, and what is sent counts
                handed = nbytes(args[1])
            self.bytes[func._opname] += handed
        return result

    def sent(self) -> int:
        """All of them but what was only received, by whoever waits for another rank's message."""
        return sum(size for name, size in self.bytes.items() if not name.startswith("recv"))


def takes_dtensors(types: Any) -> bool:
    """Whether one of an operation's argument types is DTensor, without loading it where nobody has: that takes a second."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and any(issubclass(each, loaded.DTensor) for each in types)


def nbytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def nbytes_of_largest(args: Any) -> int:
    """c10d's operations take lists of outputs and inputs: the larger of the two."""
    return max((sum(map(nbytes, tree_leaves(each))) for each in args), default=0)
