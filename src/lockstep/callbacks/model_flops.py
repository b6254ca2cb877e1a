"""Tokens per second and MFU: how much of the hardware's arithmetic goes into the model.

**MFU**, model FLOPs utilization, is the floating-point operations that the model's forward and backward need, over what
the devices could do in that time (PaLM, appendix B, https://arxiv.org/abs/2204.02311). What is computed again, because
activations are checkpointed, does not count. A causal attention counts in full, as it does there: for a GPT the sum is
6 · N · T + 12 · layers · width · T² a sequence of T tokens, N being the weights of its matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.config.schema import Config
from lockstep.data.batch import map_tensors
from lockstep.data.loader import generators_restored
from lockstep.distributed.process_group import World
from lockstep.tasks.build import sample_of, sketch_of
from lockstep.training.precision import AUTOCAST

# Dense operations a second in bf16 and fp16, without sparsity; the first name that the device's contains. Sources:
# NVIDIA's and AMD's data sheets (https://www.nvidia.com/en-us/data-center/h100/ and its neighbours, https://www.amd.com/
# en/products/accelerators/instinct/mi300/mi300x.html); of GeForce the architecture's white paper, with fp32 sums.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}


class FlopCounter(TorchDispatchMode):
    """Adds up the floating-point operations of what runs within it, by torch's own formulas.

    As torch.utils.flop_counter.FlopCounterMode does, which takes operations apart in Python first: that loads modules
    for more than a second.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.total, self._formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := self._formulas.get(func.overloadpacket):
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def flops_per_sample(task: Any, seed: int) -> int | None:
    """Of forward and backward, without recomputation, for one sample; no number is computed, only shapes.

    Training goes on with the random numbers that it would have had.

    Returns:
        None where the model cannot be run on the meta device.
    """
    try:
        with generators_restored(), FlopCounter() as counter:
            inputs, targets = (map_tensors(lambda each: each.to("meta"), part) for part in sample_of(task, seed))
            model = sketch_of(task).eval()  # without dropout
            task.loss(model(inputs), targets).backward()
    except Exception:  # a model of one's own may ask for a value, or for another device; it may raise anything
        return None
    return counter.total


def peak_flops(world: World, precision: str) -> float | None:
    """Of all ranks' devices, one each, a second; None where the device or the precision is not in the table."""
    if world.device.type != "cuda" or precision not in AUTOCAST:
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((world.world_size * peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def work_of_a_sample(config: Config, task: Any, world: World) -> dict[str, Any]:
    """The fields of result.json from which `rates` follow; nothing for a task that has no tokens."""
    if not (tokens := getattr(task, "tokens_per_sample", None)):
        return {}
    peak = None if config.several_devices else peak_flops(world, config.precision)
    return {
        "tokens_per_sample": int(tokens),
        "flops_per_sample": flops_per_sample(task, config.seed),
        "peak_flops_per_second": peak,
    }


def rates(work: dict[str, Any], samples_per_second: float | None) -> dict[str, float | None]:
    """Tokens and floating-point operations a second, and MFU, as far as they are known.

    Args:
        work: what `work_of_a_sample` has found.
        samples_per_second: of all ranks; None gives None.
    """
    if not work.get("tokens_per_sample"):
        return {}
    flops = samples_per_second and work["flops_per_sample"] and samples_per_second * work["flops_per_sample"]
    peak = work["peak_flops_per_second"]
    return {
        "tokens_per_second": samples_per_second and samples_per_second * work["tokens_per_sample"],
        "model_flops_per_second": flops,
        "mfu": flops / peak if flops and peak else None,
    }
