"""The random number generators of this process (Python, NumPy, torch, CUDA): their states as tensors, and back."""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lockstep.distributed.devices import gpus_in_use


def generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every random number generator of this process, as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3, "the layout below is that of Python's version 3"
    _, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*words, float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss, cached], dtype=torch.float64),
    }
    for gpu in gpus_in_use(device):  # the rank's own keeps its name on whichever GPU it resumes
        found["cuda" if gpu == device else f"cuda {gpu.index}"] = torch.cuda.get_rng_state(gpu)
    return found


def seed_generators(seed: int) -> None:
    """Start every random number generator of this process from one number."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators into the states that `generators` gave."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        *words, gauss = states["python"].tolist()
        random.setstate((3, tuple(int(word) for word in words), None if gauss != gauss else gauss))
    if "numpy" in states:
        *keys, position, has_gauss, cached = states["numpy"].tolist()
        array = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", array, int(position), int(has_gauss), cached))
    for gpu in gpus_in_use(device):
        name = "cuda" if gpu == device else f"cuda {gpu.index}"
        if name in states:
            torch.cuda.set_rng_state(states[name], gpu)
