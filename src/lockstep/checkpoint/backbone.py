"""Backbones: the weights of a trained model without its head, from a run, a checkpoint, a file, or torchvision."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from lockstep.checkpoint import directory
from lockstep.checkpoint.weights import is_foreign, load_weights, read_weights, select
from lockstep.config.run_directory import checkpoint_folder, read_result
from lockstep.config.schema import NO_SOURCE, Config
from lockstep.config.tasks import IMAGES, short_name
from lockstep.errors import UserError
from lockstep.models.parameters import NO_HEAD
from lockstep.models.pretrained import torchvision_file
from lockstep.models.resnet import SMALL_IMAGE


def backbone(config: Config, model: nn.Module, head: str, pretrained: str | None) -> tuple[dict[str, Tensor], str]:
    """What resume=PATH or weights=NAME has for a model, on the CPU: all but the tensors whose names begin with `head`;
    and a line's end that says what is left out, and what was stripped from their names.

    Nothing where `pretrained`, the value of `weights=`, is random. torchvision's weights are downloaded if they are not there.

    Raises:
        UserError: neither of the two is set, or both, or the weights are not there or those of another model.
    """
    images = config.task.name == IMAGES
    given = config.resume not in NO_SOURCE
    if given == (pretrained is not None):
        what = "one of them is too many" if given else "there is nothing to transfer from"
        raise UserError(
            f"resume={config.resume} and weights={pretrained or 'null'}: {what}; set resume=PATH (a run, "
            f"a checkpoint or a file of weights){', or weights=imagenet' if images else ''}"
        )
    if pretrained == "random":
        return {}, ""
    if pretrained and not images:
        raise UserError(
            f"weights={pretrained}: torchvision's weights are for task=images; task={short_name(config.task.name)} takes "
            "resume=PATH, a run of this task or a file of its model's weights"
        )
    but = "" if head == NO_HEAD else f", all but {head}*"
    path = torchvision_file(config, pretrained) if pretrained else Path(config.resume).expanduser()
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}
    if is_foreign(path):
        found, fit = load_weights(path, wanted, config.resume_prefix, head)
        return found, but + fit.said()
    weights = plain_weights(path)
    stems = [tensor for name, tensor in weights.items() if re.search(r"^(?!.*layer).*\bconv1\.weight$", name)]
    there = stems[0].shape if stems else torch.Size()
    here = wanted.get("conv1.weight", torch.empty(0)).shape
    if images and there != here and len(there) == len(here) == 4 and there[:2] == here[:2]:
        raise UserError(
            f"{path}: conv1.weight is {there[-1]} × {there[-1]} there and {here[-1]} × {here[-1]} here, where images "
            f"of {config.model.image_size} pixels get another stem (up to {SMALL_IMAGE} the small one); "
            f"set model.image_size={224 if there[-1] > here[-1] else SMALL_IMAGE}"
        )
    found, fit = select(path, weights, wanted, config.resume_prefix, head)
    return found, but + fit.said()


def plain_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file, in a finished run, in a run's newest checkpoint or in that one checkpoint.

    Raises:
        UserError: there is none, or the checkpoint is damaged.
    """
    if path.is_file():
        return read_weights(path)
    if not path.is_dir():
        raise UserError(f"resume={path}: no such file or folder; name a run, a checkpoint, or a file of weights")
    if read_result(path).get("status") == "finished" and (path / "model.pt").is_file():
        return read_weights(path / "model.pt")
    folder, name = checkpoint_folder(path)
    found = folder / name if name else directory.list_checkpoints(folder)[0]
    problem = directory.find_damage(found)
    if problem:
        raise UserError(f"resume={found}: not intact ({problem}); name another checkpoint")
    return weights_in(found)


def weights_in(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint."""
    from lockstep.checkpoint import dcp  # a second to import

    entries = {name: entry for name, entry in dcp.tensor_metadata(path).items() if name.startswith("model.")}
    if not entries:
        raise UserError(f"resume={path}: an engine's files; name the weights alone: its run's model.pt, or best.pt")
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load_tensors(path, found, alone=True)
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}
