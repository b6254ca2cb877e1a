"""Seconds by work, as measured: of classes of operations and kinds of collectives, where one rate for all sizes is wrong.

On a CPU a sum of two small tensors runs in the cache, one of large tensors waits for memory and for pages, and an
exponential costs what ten sums do. So a profile may have a curve per class: points of (work, seconds), straight lines
between them. Work is floating-point operations for products, and else the bytes that are read and written. Operations are
in seconds of the processor; collectives have a curve in seconds of the clock, as `all-reduce`, and one in seconds of the
processor, as `all-reduce, work`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from lockstep.errors import UserError

HEAD_DIMS = (16, 64, 128)  # of attention whose seconds are measured
Curve = Sequence[Sequence[float]]  # (work, seconds), by work

TRANSCENDENTAL = (
    "silu", "gelu", "sigmoid", "tanh", "exp", "log", "erf", "softmax", "_softmax", "_log_softmax", "logsumexp", "softplus",
    "mish", "elu", "cos", "sin",
)  # fmt: skip
REDUCING = (
    "sum", "mean", "var", "std", "amax", "max", "min", "argmax", "norm", "linalg_vector_norm", "cumsum", "topk", "sort",
    "native_layer_norm", "native_batch_norm", "native_group_norm", "_native_batch_norm", "avg_pool", "max_pool",
    "adaptive", "_adaptive", "_fused_rms_norm", "_foreach_norm", "nll_loss",
)  # fmt: skip
REARRANGING = (
    "clone",
    "copy_",
    "_to_copy",
    "cat",
    "stack",
    "roll",
    "split_with_sizes_copy",
    "chunk_cat",
    "constant_pad",
    "flip",
)
LOOKING_UP = ("embedding", "index", "gather", "scatter", "take")
DIVIDING = ("sqrt", "rsqrt", "div", "reciprocal", "pow")
OPERATION_CLASSES = {
    "function": TRANSCENDENTAL,
    "reduction": REDUCING,
    "copy": REARRANGING,
    "lookup": LOOKING_UP,
    "root": DIVIDING,
}


def operation_class(name: str, flops: float, width: int = 0) -> str:
    """The class of an operation by torch's name for it: `silu_backward` is a function, `add_` an update in place.

    Args:
        width: the last dim of its first tensor; of attention that of a head, on which its pace depends.
    """
    if "attention" in name:
        dim = min(HEAD_DIMS, key=lambda each: abs(math.log(each / max(1, width))))
        return f"attention backward, {dim}" if "backward" in name else f"attention, {dim}"
    if "convolution" in name:
        return "convolution backward" if "backward" in name else "convolution"
    if flops:
        return "matmul"
    for group, names in OPERATION_CLASSES.items():
        if name in names or any(name.startswith(f"{each}_") and name != f"{each}_" for each in names):
            return group
    if name.endswith("_") or name in ("zeros_like", "zeros", "full", "ones_like", "fill"):
        return "update"
    return "elementwise"


def seconds_at(curve: Curve, work: float) -> float:
    """Seconds of so much work: before the first point as on it, beyond the last at the pace of the last two."""
    first, *_ = curve
    if work <= first[0]:
        return first[1]
    if len(curve) == 1:
        return first[1] * work / first[0]
    low, high = next((pair for pair in pairwise(curve) if work <= pair[1][0]), tuple(curve[-2:]))
    return max(0.0, low[1] + (high[1] - low[1]) * (work - low[0]) / (high[0] - low[0]))


def read_curves(content: Any, where: str) -> dict[str, list[tuple[float, float]]]:
    """Curves of a profile's file.

    Raises:
        UserError: one is not a list of (work, seconds), with rising work.
    """
    found = {}
    for name, points in (content or {}).items() if isinstance(content or {}, dict) else [("measured", content)]:
        try:
            found[str(name)] = made = [(float(work), float(seconds)) for work, seconds in points]
        except (TypeError, ValueError):
            made = []
        if not made or not rising(work for work, _ in made) or min(seconds for _, seconds in made) < 0:
            raise UserError(f"{where}: measured: {name}: must be pairs [work, seconds], by rising work")
    return found


def rising(values: Iterable[float]) -> bool:
    return all(first < second for first, second in pairwise(values))
