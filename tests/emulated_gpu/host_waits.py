"""Where the host waits for a GPU: copies to it, values it reads, streams and events it waits for.

As on a real GPU, `torch.cuda.set_sync_debug_mode("warn")` makes each a warning and "error" an error. A real one is silent about
what says by its name that it waits (`synchronize()`); this one is not.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

# Operations whose result the host must know before it can go on.
WAITING = set(
    "_local_scalar_dense item is_nonzero equal nonzero masked_select bincount histc unique_dim _unique _unique2 "
    "unique_consecutive repeat_interleave".split()
)


def host_waits(what: str) -> None:
    """Say that it does, to whoever has asked."""
    mode = torch.cuda.get_sync_debug_mode()
    if mode == 1:
        frame = next((each for each in reversed(traceback.extract_stack()) if not is_ours(each.filename)), None)
        where = (frame.filename, frame.lineno or 0) if frame else ("?", 0)
        warnings.warn_explicit(f"called a synchronizing CUDA operation: {what}", UserWarning, *where)
    elif mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def is_ours(file: str) -> bool:
    return file.startswith((str(Path(__file__).parent), str(Path(torch.__file__).parent)))


def announced(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        host_waits(what)
        return function(*args, **kwargs)

    return call


def install() -> None:
    torch.cuda.synchronize = announced(torch.cuda.synchronize, "cuda.synchronize")
    for kind in (torch.cuda.Stream, torch.cuda.Event):
        kind.synchronize = announced(kind.synchronize, f"{kind.__name__}.synchronize")  # type: ignore[method-assign]
