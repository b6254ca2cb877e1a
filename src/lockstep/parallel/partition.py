"""Cutting a ResNet into consecutive parts: by name, or so that the parts cost the same."""

from __future__ import annotations

import copy
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.config.schema import ModelConfig
from lockstep.errors import UserError
from lockstep.models.resnet import build_model


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """A torchvision ResNet as what its forward calls one after the other: {name: module}, residual blocks whole."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            found |= {f"{name}.{number}": block for number, block in child.named_children()}
        else:
            found[name] = child
    return found


def units(model: nn.Module) -> dict[str, list[str]]:
    """What a cut may not tear apart: {first block: its blocks}. The stem, each residual block, and the head.

    Inside the stem and the head a ReLU works in place, or there is nothing to gain.
    """
    names = list(blocks(model))
    residual = [number for number, name in enumerate(names) if "." in name]
    starts = [0, *residual, residual[-1] + 1, len(names)]
    return {names[start]: names[start:stop] for start, stop in pairwise(starts)}


class Part(nn.Module):
    """Consecutive blocks of a model, under the names they have there: the parts' state_dicts make up the model's."""

    def __init__(self, chosen: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, block in chosen.items():
            layer, _, number = name.partition(".")
            if number:
                if not hasattr(self, layer):
                    self.add_module(layer, nn.Module())
                getattr(self, layer).add_module(number, block)
            else:
                self.add_module(name, block)
        self.names = list(chosen)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W], or the part before's output, to the next part's input, or logits [N, classes]."""
        for name in self.names:
            if name == "fc":
                x = torch.flatten(x, 1)
            x = self.get_submodule(name)(x)
        return x


def split(model: nn.Module, firsts: list[str]) -> list[Part]:
    """Cut a model before each of the named blocks; the parts share its parameters."""
    every = blocks(model)
    names = list(every)
    bounds = [0, *(names.index(first) for first in firsts), len(names)]
    return [Part({name: every[name] for name in names[start:stop]}) for start, stop in pairwise(bounds)]


def choose_cuts(model: nn.Module, cut: Any, parts: int, images: Tensor) -> list[str]:
    """The first block of each part but the first.

    Args:
        cut: a layer or block name, a list of them, or `balanced`: measured on `images`, a micro-batch on the device
            where the model is.
        parts: how many parts there are to be.

    Raises:
        UserError: a name is no layer, the order is wrong, or the number of names does not make that many parts.
    """
    names = list(units(model))
    if cut == "balanced":
        if parts > len(names):
            raise UserError(
                f"cut=balanced: the model has {len(names)} blocks to cut between, too few for {parts} parts"
            )
        return [names[start] for start in balance(measure_units(model, images), parts)[1:]]
    asked = list(cut) if isinstance(cut, list) else [str(cut)]
    firsts = [next((name for name in names[1:] if name == word or name.startswith(f"{word}.")), "") for word in asked]
    shown = f"[{','.join(map(str, asked))}]" if isinstance(cut, list) else asked[0]
    layers = dict.fromkeys(name.partition(".")[0] for name in names[1:])
    allowed = ", ".join([*layers, *(name for name in names if "." in name)])
    if "" in firsts:
        raise UserError(f"cut={shown}: not a layer to cut before; allowed are {allowed}, or balanced")
    if sorted(firsts, key=names.index) != firsts or len(set(firsts)) != len(firsts):
        raise UserError(f"cut={shown}: the cuts must be in the model's order, each once: {allowed}")
    if len(firsts) != parts - 1:
        raise UserError(
            f"cut={shown}: makes {len(firsts) + 1} parts, not {parts}; name {parts - 1} layers, or balanced"
        )
    return firsts


def check_cut(config: ModelConfig, cut: Any, parts: int) -> None:
    """Refuse a cut that `choose_cuts` would, on a model without memory: names need no weights."""
    with torch.device("meta"):
        model = build_model(config)
    if cut != "balanced":
        choose_cuts(model, cut, parts, torch.empty(0))
    elif parts > len(units(model)):
        raise UserError(f"cut=balanced: {config.name} has {len(units(model))} blocks, too few for {parts} parts")


def measure_units(model: nn.Module, images: Tensor, rounds: int = 7) -> list[float]:
    """Seconds of each unit's forward and backward: the median of several rounds, for a noisy one misplaces a cut."""
    model = copy.deepcopy(model).train()
    parts = split(model, list(units(model))[1:])
    seconds: list[list[float]] = [[] for _ in parts]
    for _ in range(rounds):
        x = images
        for number, part in enumerate(parts):
            x = x.detach().requires_grad_(number > 0)
            started = _clock(images.device)
            x_next = part(x)
            x_next.sum().backward()
            seconds[number].append(_clock(images.device) - started)
            x = x_next
    return [statistics.median(times) for times in seconds]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def balance(costs: list[float], parts: int) -> list[int]:
    """Where to start each of `parts` consecutive, non-empty groups so that the dearest one is as cheap as it can be.

    Dynamic programming over (first n blocks, k groups): O(parts · blocks²).
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(n, 1): (total[n], [0]) for n in range(1, len(costs) + 1)}
    for k in range(2, parts + 1):
        for n in range(k, len(costs) + 1):
            best[n, k] = min(
                (max(best[m, k - 1][0], total[n] - total[m]), [*best[m, k - 1][1], m]) for m in range(k - 1, n)
            )
    return best[len(costs), parts][1]
