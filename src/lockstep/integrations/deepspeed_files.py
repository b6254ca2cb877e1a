"""DeepSpeed's checkpoint files: what it writes and reads, kept in memory, and what any number of ranks saved.

They are pickles. They are read by torch's `weights_only` reader, which resolves nothing but tensors and the three
classes named here; DeepSpeed's own tool, zero_to_fp32, would run whatever a pickle names.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from lockstep.errors import UserError

TensorsByName = dict[str, Tensor]


class CheckpointBuffers(CheckpointEngine):
    """What writes and reads for DeepSpeed: it keeps what is to be saved, and unpickles no code.

    Attributes:
        kept: {file name: content} of the last save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, memoryview] = {}

    def create(self, info: Any) -> None:
        self.kept = {}

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: Any) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        self.kept[Path(path).name] = buffer.getbuffer()

    def load(self, path: Any, map_location: Any = None) -> Any:
        return load_file(Path(path))

    def commit(self, info: Any) -> bool:
        return True


def load_file(path: Path) -> Any:
    """What is in a file of DeepSpeed's, on the CPU; of tensors only those parts are read that are used.

    Raises:
        UserError: reading it would run code.
    """
    try:
        with torch.serialization.safe_globals([fragment_address, LossScaler, ZeroStageEnum]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path}: refused, for it holds more than DeepSpeed's tensors ({said})") from None


def load_first_file(folder: Path) -> dict[str, Any]:
    """What rank 0 saved besides its part of the optimizer."""
    found: dict[str, Any] = load_file(sorted(folder.glob("*_model_states.pt"))[0])
    return found


def load_checkpoint(folder: Path) -> tuple[TensorsByName, dict[str, TensorsByName]]:
    """All that DeepSpeed saved, by any number of ranks in any stage: (the state_dict, {parameter: optimizer state}).

    In stage 1 and 2 each rank saves a section of one long vector of all parameters, and where in it each parameter
    lies; in stage 3 its section of each parameter, one after the other.
    """
    first = load_first_file(folder)
    module, stage = first["module"], first["ds_config"]["zero_optimization"]["stage"]
    if stage == 0:
        names = first["trained"]
        return dict(module), {names[number]: state for number, state in first["optimizer"]["state"].items()}
    ranks, shapes = first["dp_world_size"], first["param_shapes"]
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for rank in range(ranks):
        saved = load_file(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        if stage == 3:
            flats, states = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
            places = [section_places(group, ranks) for group in shapes]
        else:
            flats, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"]
            places = [
                {name: (at.start, at.numel) for name, at in group.items()} for group in saved["param_slice_mappings"]
            ]
        for number, place in enumerate(places):
            for name, (start, size) in place.items():
                for key, value in {"": flats[number], **states.get(number, {})}.items():
                    part = value[start : start + size] if value.dim() else value  # Adam's step is one number
                    parts.setdefault(name, {}).setdefault(key, []).append(part)
    shape = {name: size for group in shapes for name, size in group.items()}
    whole = {
        name: {key: join_sections(some, shape[name]) for key, some in entries.items()}
        for name, entries in parts.items()
    }
    weights = {name: whole[name].pop("") if name in whole else tensor for name, tensor in module.items()}
    return weights, whole


def section_places(shapes: dict[str, torch.Size], ranks: int) -> dict[str, tuple[int, int]]:
    """Stage 3: {parameter: (start, size)} of its sections in a rank's vector; the last rank's may be padded."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // ranks)
        found[name] = (start, size)
        start += size
    return found


def join_sections(parts: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat(parts)[: shape.numel()].view(shape) if parts[0].dim() else parts[0]
