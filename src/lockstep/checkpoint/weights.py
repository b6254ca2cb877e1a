"""Weights without the rest of a training: in a file, or in a folder that another project has written."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.checkpoint.prefixes import Fit, fit_names, taken
from lockstep.config.packages import require
from lockstep.errors import UserError
from lockstep.models.parameters import NO_HEAD
from lockstep.utils.text import count


def load_weights(
    path: Path, wanted: Mapping[str, Tensor], prefix: str | None = None, head: str = NO_HEAD
) -> tuple[dict[str, Tensor], Fit]:
    """The weights in a file or a folder under the names of the model that `wanted` is the state_dict of.

    Args:
        prefix, head: as `fit_names` has them.

    Raises:
        UserError: it holds something else, weights of another model, several that fit, or loading it would run code.
    """
    if path.is_dir():
        file = deepspeed_file(path)
        if file is None:
            return _load_folder(path, wanted, prefix, head)
        path = file
    return select(path, read_weights(path), wanted, prefix, head)


def select(
    path: Path, there: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str | None, head: str = NO_HEAD
) -> tuple[dict[str, Tensor], Fit]:
    """The model's weights among tensors that were read from `path`; the rest is as `load_weights` has it."""
    fit = fit_names(path, there, wanted, prefix, head)
    return taken(fit, there, wanted), fit


def is_foreign(path: Path) -> bool:
    """Whether this is a folder of weights that others have written: with torch.distributed.checkpoint, or DeepSpeed."""
    ours = (path / "manifest.json").is_file()
    return path.is_dir() and not ours and ((path / ".metadata").is_file() or deepspeed_file(path) is not None)


def deepspeed_file(path: Path) -> Path | None:
    """The file of the weights in a checkpoint of DeepSpeed's, or in the folder of them whose `latest` names one."""
    if (path / "latest").is_file():
        path = path / (path / "latest").read_text(errors="replace", encoding="utf-8").strip()
    whole = path / "mp_rank_00_model_states.pt"
    files = sorted(path.glob("*mp_rank_*_model_states.pt")) if path.is_dir() else []
    if whole in files and len(files) == 1:
        return whole
    if files:
        raise UserError(
            f"resume={path}: DeepSpeed has the weights in {count(len(files), 'file')} there, such as {files[0].name}; put them "
            "together with the zero_to_fp32.py beside them, and name the file that it writes"
        )
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file that torch.save wrote, those of nested dicts under the dicts' keys, joined by dots; or in a
    file of safetensors.

    Raises:
        UserError: it holds something else, or loading it would run code; safetensors is not installed.
    """
    if path.suffix == ".safetensors":
        load_file = safetensors().load_file
        try:
            return dict(load_file(path))
        except Exception as error:  # the package's own, which derives from nothing else
            said = str(error).splitlines()[0]
            raise UserError(f"resume={path}: not a file of safetensors ({said}); name a state_dict or a run") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # many scripts save their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "DTensor" in str(error) or "ShardedTensor" in str(error):
            raise UserError(
                f"resume={path}: holds parts of sharded tensors; save the whole weights, with "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
            ) from None
        if "weights_only" in str(error) or isinstance(error, ModuleNotFoundError):
            raise UserError(
                f"resume={path}: refused, for loading it would run code from the file; "
                "save the weights alone: torch.save(model.state_dict(), path)"
            ) from None
        raise UserError(f"resume={path}: not a file of torch.save's ({said}); name a state_dict or a run") from None
    found = dict(_flatten(content))
    if not found:
        raise UserError(f"resume={path}: holds no state_dict; save one: torch.save(model.state_dict(), path)")
    return found


def safetensors() -> Any:
    """The package, its part for torch.

    Raises:
        UserError: it is not installed.
    """
    require("safetensors", "a .safetensors file")
    import safetensors.torch

    return safetensors.torch


def _flatten(content: Any, before: str = "", depth: int = 0) -> list[tuple[str, Tensor]]:
    """The tensors in nested dicts with texts as keys. An optimizer's have numbers, and are not taken."""
    if not isinstance(content, Mapping) or depth > 8:
        return []
    found = []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            found.append((f"{before}{key}", value))
        elif isinstance(key, str):
            found += _flatten(value, f"{before}{key}.", depth + 1)
    return found


def _load_folder(
    path: Path, wanted: Mapping[str, Tensor], prefix: str | None, head: str
) -> tuple[dict[str, Tensor], Fit]:
    from lockstep.checkpoint import dcp  # a second to import

    beside = ("optim", "lr_scheduler.", "scheduler.", "dataloader.", "train_state.", "rng")
    entries = dcp.tensor_metadata(path, others=True)
    there = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if not name.startswith(beside)
    }
    if not there:
        raise UserError(f"resume={path}: holds no tensors; name a folder that has the weights")
    fit = fit_names(path, there, wanted, prefix, head)
    sources = fit.sources.values()
    found = {name: torch.empty_like(there[name], device="cpu") for name in sources}
    dcp.load_tensors(path, found, alone=True, others=True)
    return taken(fit, found, wanted), fit
