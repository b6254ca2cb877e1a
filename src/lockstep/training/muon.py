"""Muon beside AdamW, as one optimizer, and Muon's iteration in fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, _muon


class MuonAndAdamW(Optimizer):
    """Muon for the parameters of two dims that are no embeddings, AdamW for all others, behind one optimizer's face.

    Both get the same learning rate and weight decay: Muon's updates are scaled to the size that AdamW's have.
    Source: https://kellerjordan.github.io/posts/muon/, https://arxiv.org/abs/2502.16982 (the scaling)

    Args:
        groups: of parameters, of any number of dims.
        arguments: Muon's; AdamW gets the learning rate and the weight decay of them.
        embeddings: parameters of two dims that are AdamW's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], arguments: dict[str, Any], embeddings: Sequence[Tensor] = ()
    ) -> None:
        tables = {id(each) for each in embeddings}
        shared = {name: arguments[name] for name in ("lr", "weight_decay")}
        split = []
        for group in groups:
            if "muon" in group:  # another one's, such as a rank's part of it, with places for what others have
                split.append(group)
                continue
            matrices = [each for each in group["params"] if each.dim() == 2 and id(each) not in tables]
            others = [each for each in group["params"] if each.dim() != 2 or id(each) in tables]
            parts = [{**group, "params": matrices, "muon": True}, {**group, "params": others, "muon": False}]
            split += [part for part in parts if part["params"]]
        super().__init__(split, shared)
        kinds: dict[bool, Any] = {
            True: lambda own: torch.optim.Muon(own, **{"adjust_lr_fn": "match_rms_adamw"} | arguments),
            False: lambda own: torch.optim.AdamW(own, **shared),
        }
        self._parts: dict[bool, Optimizer] = {}
        for muon, build in kinds.items():
            if own := [group for group in self.param_groups if group["muon"] == muon]:
                self._parts[muon] = build(own)  # fills the rest of its arguments into the groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for muon, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["muon"] == muon]
            part.state = self.state
            exact = muon and any(each.dtype == torch.float64 for group in part.param_groups for each in group["params"])
            with _newton_schulz_in_fp64() if exact else contextlib.nullcontext():
                part.step()


@contextlib.contextmanager
def _newton_schulz_in_fp64() -> Iterator[None]:
    """Within it, torch's Muon iterates in its gradients' precision. Its own is bf16 whatever they are in: matrices that are
    sharded, and so summed in another order, would part by a thousandth in fp64, too. Torch has no public way to say so."""
    name = "_zeropower_via_newtonschulz"
    before = getattr(_muon, name)
    setattr(_muon, name, orthogonalised)
    try:
        yield
    finally:
        setattr(_muon, name, before)


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """U S V^T with S near 1, of a matrix [M, N], in its own precision.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
