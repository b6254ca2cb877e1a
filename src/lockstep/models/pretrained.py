"""torchvision's weights for a model: which there are, and the file that has them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lockstep.config.schema import NARROW, RESNETS, Config
from lockstep.errors import UserError
from lockstep.models.resnet import SMALL_IMAGE
from lockstep.utils.downloads import answers_awaited


def torchvision_file(config: Config, name: str) -> Path:
    """The file of torchvision's weights for the model, where torch.hub keeps it, downloaded if it is not there.

    Raises:
        UserError: there are none for this model, or they cannot be fetched.
    """
    from torchvision.models import get_model_weights

    model = config.model
    if model.name == NARROW:
        raise UserError(f"weights={name}: there are none for {NARROW}; set model=resnet18, or weights=random")
    every = get_model_weights(model.name)
    known = {"imagenet": every.DEFAULT} | dict(every.__members__)
    if name not in known:
        raise UserError(
            f"weights={name}: torchvision has none for {model.name}; allowed are {', '.join(known)}, random"
        )
    if model.norm == "group":
        raise UserError(
            f"weights={name}: trained with BatchNorm, model.norm={model.norm} has none; set model.norm=batch"
        )
    if model.name in RESNETS and (model.image_size or 0) <= SMALL_IMAGE:
        raise UserError(
            f"weights={name}: conv1.weight is 7 × 7 there and 3 × 3 here, where images of {model.image_size} pixels "
            "get another stem; set model.image_size=224"
        )
    url = known[name].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # The name ends with the beginning of the file's SHA-256; it gets that name when it is complete.
            digest = file.stem.rpartition("-")[2]
            with answers_awaited():
                torch.hub.download_url_to_file(url, str(file), digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"weights={name}: {url} could not be fetched ({said}); put it at {file} by hand, or anywhere and set "
                "resume=FILE instead"
            ) from None
    return file
