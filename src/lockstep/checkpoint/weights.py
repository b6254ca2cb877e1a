"""Plain weights in a file of torch.save, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lockstep.errors import UserError

SAME_MODEL = "set model=…, model.norm=…, or the keys of your task, to the model that was saved"


def check_shape(path: Path, name: str, there: tuple[int, ...] | None, here: tuple[int, ...]) -> None:
    """Refuse a tensor that is missing or has another shape; raises UserError."""
    if there is None:
        raise UserError(f"{path}: holds no {name}; {SAME_MODEL}")
    if there != here:
        raise UserError(f"{path}: {name} is {list(there)} there and {list(here)} here; {SAME_MODEL}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that torch.save wrote: by itself, or as `model`, `state_dict` or `model_state_dict`.

    Raises:
        UserError: it holds something else, or loading it would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or isinstance(error, ModuleNotFoundError):
            raise UserError(
                f"resume={path}: refused, for loading it would run code from the file; "
                "save the weights alone: torch.save(model.state_dict(), path)"
            ) from None
        raise UserError(f"resume={path}: not a file of torch.save's ({said}); name a state_dict or a run") from None
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"resume={path}: holds no state_dict; save one: torch.save(model.state_dict(), path)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def check_weights(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model; raises UserError naming the first tensor that does not fit."""
    for name, tensor in wanted.items():
        check_shape(path, name, tuple(weights[name].shape) if name in weights else None, tuple(tensor.shape))
    more = sorted(set(weights) - set(wanted))
    if more:
        raise UserError(f"{path}: holds {more[0]}, which the model has not; {SAME_MODEL}")
