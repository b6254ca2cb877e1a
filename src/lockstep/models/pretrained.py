"""Backbones: the weights of a trained model without its head, from a run, a checkpoint, a file, or torchvision."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lockstep.checkpoint import layout
from lockstep.checkpoint.weights import check_weights, read_weights
from lockstep.config.run_directory import checkpoint_folder, read_result
from lockstep.config.schema import Config
from lockstep.errors import UserError
from lockstep.models.resnet import SMALL_IMAGE

CONNECT_SECONDS = 30.0


def backbone(config: Config, model: nn.Module, head: str, pretrained: str | None) -> dict[str, Tensor]:
    """What resume=PATH or weights=NAME has for a model, on the CPU: all but the tensors whose names begin with `head`.

    Nothing where `pretrained`, the value of `weights=`, is random. torchvision's weights are downloaded if they are not there.

    Raises:
        UserError: neither of the two is set, or both, or the weights are not there or those of another model.
    """
    given = config.resume not in ("auto", "never")
    if given == (pretrained is not None):
        what = "one of them is too many" if given else "there is nothing to transfer from"
        raise UserError(
            f"resume={config.resume} and weights={pretrained or 'null'}: {what}; set resume=PATH (a run, "
            "a checkpoint or a file of weights), or weights=imagenet"
        )
    if pretrained == "random":
        return {}
    path = torchvision_file(config, pretrained) if pretrained else Path(config.resume).expanduser()
    weights = {name: tensor for name, tensor in plain_weights(path).items() if not name.startswith(head)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}
    there, here = (tensors.get("conv1.weight", torch.empty(0)).shape for tensors in (weights, wanted))
    if there != here and len(there) == len(here) == 4 and there[:2] == here[:2]:
        raise UserError(
            f"{path}: conv1.weight is {there[-1]} × {there[-1]} there and {here[-1]} × {here[-1]} here, where images "
            f"of {config.model.image_size} pixels get another stem (up to {SMALL_IMAGE} the small one); "
            f"set model.image_size={224 if there[-1] > here[-1] else SMALL_IMAGE}"
        )
    check_weights(path, weights, wanted)
    return weights


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
    found = folder / name if name else layout.names(folder)[0]
    problem = layout.whats_wrong(found)
    if problem:
        raise UserError(f"resume={found}: not intact ({problem}); name another checkpoint")
    return weights_in(found)


def weights_in(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint."""
    from lockstep.checkpoint import dcp  # a second to import

    entries = {name: entry for name, entry in dcp.described(path).items() if name.startswith("model.")}
    if not entries:
        raise UserError(f"resume={path}: an engine's files; name the weights alone: its run's model.pt, or best.pt")
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load_tensors(path, found, alone=True)
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def torchvision_file(config: Config, name: str) -> Path:
    """The file of torchvision's weights for the model, where torch.hub keeps it, downloaded if it is not there.

    Raises:
        UserError: there are none for this model, or they cannot be fetched.
    """
    from torchvision.models import get_model_weights

    model = config.model
    every = get_model_weights(model.name)
    known = {"imagenet": every.DEFAULT} | dict(every.__members__)
    if name not in known:
        raise UserError(
            f"weights={name}: torchvision has none for {model.name}; allowed are {', '.join(known)}, random"
        )
    if model.norm != "batch":
        raise UserError(
            f"weights={name}: trained with BatchNorm, model.norm={model.norm} has none; set model.norm=batch"
        )
    if (model.image_size or 0) <= SMALL_IMAGE:
        raise UserError(
            f"weights={name}: conv1.weight is 7 × 7 there and 3 × 3 here, where images of {model.image_size} pixels "
            "get another stem; set model.image_size=224"
        )
    url = known[name].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        before = socket.getdefaulttimeout()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(CONNECT_SECONDS)
            # The name ends with the beginning of the file's SHA-256; it gets that name when it is complete.
            digest = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(file), digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"weights={name}: {url} could not be fetched ({said}); put it at {file} by hand, or anywhere and set "
                "resume=FILE instead"
            ) from None
        finally:
            socket.setdefaulttimeout(before)
    return file
