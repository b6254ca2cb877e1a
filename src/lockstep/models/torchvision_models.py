"""torchvision's other classification models, by name, fitted to the config's classes, image size and normalisation."""

from __future__ import annotations

import difflib
import inspect
import math
import typing
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.config.schema import RESNETS, ModelConfig
from lockstep.errors import UserError


def check_model(config: ModelConfig) -> None:
    """Hold the name to torchvision's, and what is asked of a model other than our ResNets to what it can be.

    Raises:
        UserError: no such model, or it cannot take images of this size, these arguments or this normalisation.
    """
    if config.name in RESNETS:
        if config.arguments:
            raise UserError(
                f"model.arguments={config.arguments}: {config.name} takes none; choose another model, or leave them out"
            )
        return
    from torchvision import models

    known = models.list_models(module=models)
    if config.name not in known:
        near = ", ".join(difflib.get_close_matches(config.name, known, cutoff=0.4)) or "none"
        raise UserError(
            f"model={config.name}: allowed are {', '.join(RESNETS)}, and the names of torchvision's other "
            f"classification models; nearest: {near}"
        )
    if config.init in ("kaiming", "zero_residual"):
        raise UserError(
            f"model.init={config.init}: is the ResNets'; {config.name} has torchvision's; set model.init=xavier, or leave it out"
        )
    with torch.device("meta"):
        model = build_torchvision_model(replace(config, norm="own"))
    if config.norm != "own" and not any(isinstance(module, _BatchNorm) for module in model.modules()):
        what = "to replace; " if config.norm == "group" else "and gets none; "
        raise UserError(f"model.norm={config.norm}: {config.name} has no BatchNorm {what}leave model.norm out")
    size = config.image_size
    assert size is not None
    try:
        model.eval()(torch.empty(2, 3, size, size, device="meta"))
    except Exception as error:
        raise UserError(
            f"model.image_size={size}: {config.name} cannot take images of that size ({_first_line(error)}); "
            "set model.image_size=224"
        ) from None


def build_torchvision_model(config: ModelConfig) -> nn.Module:
    """Any of torchvision's classification models, as torchvision initialises it: images [N, 3, S, S] to logits.

    `norm=group` puts a GroupNorm of at most 32 groups, as many as divide the channels, where a BatchNorm was.

    Raises:
        UserError: `arguments` names one that the model does not take, or the image size does not fit it.
    """
    from torchvision.models import get_model_builder

    builder = get_model_builder(config.name)
    kind = typing.get_type_hints(builder)["return"]
    takes = {
        name for name, rule in inspect.signature(kind.__init__).parameters.items() if rule.kind is not rule.VAR_KEYWORD
    } - {"self", "num_classes"}
    for name in config.arguments:
        if name not in takes:
            raise UserError(f"model.arguments.{name}: {config.name} takes no such argument; it takes {sorted(takes)}")
    given: dict[str, Any] = {"num_classes": config.num_classes}
    if "image_size" in takes:
        given["image_size"] = config.image_size
    if "input_size" in takes:
        given["input_size"] = (config.image_size, config.image_size)
    if "aux_logits" in takes:  # one output, as of any other model
        given |= {"aux_logits": False, "init_weights": False}
    given |= config.arguments
    _check_patches(config)
    try:
        model = _build(builder, given)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"model={config.name} model.image_size={config.image_size} model.arguments={config.arguments}: "
            f"torchvision says: {_first_line(error)}"
        ) from None
    if config.norm == "group":
        replace_batchnorm(model)
    if config.init == "xavier":
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return model


def _check_patches(config: ModelConfig) -> None:
    """A ViT's name ends with the side of its patches, of which an image holds a whole number."""
    head, _, patch = config.name.rpartition("_")
    size = config.image_size or 0
    if head.startswith("vit_") and size % int(patch):
        below = size // int(patch) * int(patch)
        nearest = " or ".join(str(each) for each in (below, below + int(patch)) if each)
        raise UserError(
            f"model.image_size={size}: {config.name} cuts images into patches of {patch} × {patch} pixels; "
            f"set model.image_size={nearest}"
        )


def _build(builder: Any, given: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return builder(weights=None, **given)
        except NotImplementedError:  # it reckons its widths with tensors, which the meta device cannot
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                return builder(weights=None, **given).to("meta")


def replace_batchnorm(model: nn.Module) -> None:
    """Put a GroupNorm in the place of each BatchNorm."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                parent.add_module(name, nn.GroupNorm(math.gcd(32, child.num_features), child.num_features))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
