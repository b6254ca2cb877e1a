"""The page that a run ends with when memory runs out: what was asked for, what is held, and what would help.

An out-of-memory error names the operation that happened to come last, and a traceback of forty frames leads to it. The
page says instead how much was asked for, what holds the rest, and which setting would change most.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import linecache
import math
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lockstep.config.copies import with_values
from lockstep.config.schema import Config
from lockstep.diagnose.stacks import is_library
from lockstep.errors import CheckFailed
from lockstep.memory.predict import predict_activations, sharded_state_bytes
from lockstep.memory.usage import free_bytes
from lockstep.tasks.build import has_batchnorm
from lockstep.training.optim import states_per_weight
from lockstep.utils.files import write_json
from lockstep.utils.text import mebibytes

if TYPE_CHECKING:
    from lockstep.run import Run


OUT_OF_MEMORY_FILE = "out_of_memory.json"
SIGNS = (
    "can't allocate memory",  # torch's allocator on the CPU
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which has no other words for it
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# What CUDA's libraries say when they cannot make their workspace; by itself it may mean something else.
PERHAPS = ("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_INTERNAL_ERROR")
PHASES = {  # by the innermost function of such a name
    "evaluate": "evaluation",
    "on_validation_start": "evaluation",
    "_save": "saving a checkpoint",
    "_resume": "resuming",
    "backward": "backward",
    "_call_impl": "forward",
    "step": "the optimizer's update",
}


class OutOfMemory(CheckFailed):
    """The page is its text. The exit code is 1: nothing was wrong with the command."""


@dataclass(frozen=True)
class Knob:
    """A setting that would help, by how many bytes, and at what price."""

    setting: str
    saves: int
    price: str


def is_out_of_memory(error: BaseException, device: torch.device) -> bool:
    """Whether an exception means that there was no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError):
        return False
    if any(sign in text for sign in PERHAPS) and device.type == "cuda":
        return free_bytes(device)[0] < torch.cuda.get_device_properties(device).total_memory / 50
    return any(sign in text for sign in SIGNS)


def explain_out_of_memory(error: BaseException, run: Run) -> OutOfMemory:
    """The page, for an exception that `is_out_of_memory`. Its figures go into out_of_memory.json, the traceback into the log."""
    run.report.log.write("".join(traceback.format_exception(error)))
    where = locate(error.__traceback__, run.loop.module)
    free, who = free_bytes(run.device)
    held = run.held_bytes()
    traceback.clear_frames(error.__traceback__)  # they hold what the step held: room for what follows
    for frame, _ in traceback.walk_tb(error.__traceback__):
        _ = frame.f_locals  # until it is asked for again, up to Python 3.12, it is a copy that holds them too
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's: what it keeps for later counts against a limit
        ctypes.CDLL(None).malloc_trim(0)
    try:
        found = knobs(run.config, run.recipe, run.world.world_size, run.shards, where["phase"], run.device.type)
    except (RuntimeError, MemoryError) as failed:  # not even for that
        run.report.log.write(f"no estimates: {failed}\n")
        found = []
    asked = asked_for(error)
    figures = {
        "rank": run.world.rank,
        "step": run.step + 1,
        **where,
        "asked_bytes": asked,
        "free_bytes": free,
        "held_bytes": held,
        "knobs": [vars(knob) for knob in found],
    }
    write_json(run.out / OUT_OF_MEMORY_FILE, figures)
    return OutOfMemory(oom_report(figures, who, str(run.device), [*found]))


def oom_report(figures: dict[str, Any], who: str, device: str, found: list[Knob]) -> str:
    """The figures for people."""
    asked, free = figures["asked_bytes"], mebibytes(figures["free_bytes"])
    lines = [
        f"out of memory on rank {figures['rank']} ({device}) in step {figures['step']}, in {figures['phase']}"
        + (f", at {figures['layer']}" if figures["layer"] else ""),
        f"  asked for  {mebibytes(asked) if asked else 'an unknown number of'} MiB; free {free} MiB, says {who}",
        f"  by         {figures['line']}",
        "  held, MiB",
        *(f"    {mebibytes(size):>10}  {name}" for name, size in figures["held_bytes"].items()),
    ]
    if found:
        lines.append("  what helps most, by estimate")
        width = max(len(knob.setting) for knob in found)
        lines += [f"    {mebibytes(knob.saves):>10}  {knob.setting:{width}}  {knob.price}" for knob in found]
    else:
        lines.append(
            "  no memory was left for estimates; try accumulate=2, a smaller global_batch_size, precision=bf16"
        )
    lines.append(f"  the traceback is in ranks/{figures['rank']}.log; python -m recipes.doctor memory counts by layer")
    return "\n".join(lines)


def asked_for(error: BaseException) -> int | None:
    """Bytes that could not be had, as the message has them."""
    exact = re.search(r"tried to allocate (\d+) bytes", str(error))
    if exact:
        return int(exact[1])
    rounded = re.search(r"Tried to allocate ([\d.]+) ([KMG]iB|bytes)", str(error))
    if rounded:
        return int(float(rounded[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[rounded[2]])
    return None


def locate(frames: TracebackType | None, model: nn.Module | None) -> dict[str, Any]:
    """Where it was: the `phase` of the training, the `layer` by its name in the model, the recipe's own `line`."""
    names = {id(module): name for name, module in model.named_modules()} if model is not None else {}
    phase, layer, line = "the recipe", "", ""
    while frames is not None:
        code = frames.tb_frame.f_code
        layer = names.get(id(frames.tb_frame.f_locals.get("self")), layer)
        updates = code.co_name != "step" or "/optim/" in code.co_filename  # a pipeline's schedule has a step too
        if updates and not (phase == "evaluation" and code.co_name == "_call_impl"):
            phase = PHASES.get(code.co_name, phase)
        if not is_library(code.co_filename):
            text = linecache.getline(code.co_filename, frames.tb_lineno).strip()
            line = f"{Path(code.co_filename).name}:{frames.tb_lineno}  {text}"
        frames = frames.tb_next
    return {"phase": phase, "layer": layer, "line": line}


def knobs(config: Config, recipe: str, ranks: int, shards: int, phase: str, device: str) -> list[Knob]:
    """The three settings that would save most on a rank, computed for this very config; none that it has already."""
    pieces = max(config.accumulate, config.pipeline_micro_batches)
    share = config.global_batch_size // shards
    at_once = -(-share // pieces)

    def kept(images: int, **values: Any) -> int:
        return predict_activations(with_values(config, values), images, device).total

    now = kept(at_once)
    found = []
    if at_once > 1:
        saves = now * (at_once // 2) // at_once  # activations grow with the images, and nothing else does
        key = "micro_batches" if config.pipeline_micro_batches > 1 else "accumulate"
        fewer = (
            config.global_batch_size
            // (2 * shards * config.pipeline_micro_batches)
            * shards
            * config.pipeline_micro_batches
        )
        price = f"activations of {-(-at_once // 2)} samples at a time, not of {at_once}; the same training"
        price += ", but that BatchNorm sees less" if has_batchnorm(config) else ""
        price += f" (global_batch_size={fewer} saves as much, and is another)" if fewer else ""
        found.append(Knob(f"{key}={2 * pieces}", saves, price))
    if config.precision in ("fp32", "fp64"):
        other = "bf16" if config.precision == "fp32" else "fp32"
        found.append(Knob(f"precision={other}", now - kept(at_once, precision=other), "activations of half the size"))
    found += state_knobs(config, recipe, ranks)
    if phase == "evaluation":  # without backward a block's input, result and shortcut are all that is alive
        largest = max(math.prod(shape[1:]) for shape in predict_activations(config, 2, device).outputs.values())
        half = config.eval_batch_size // 2
        found.append(Knob(f"eval_batch_size={half}", 3 * 4 * largest * half, "the same evaluation"))
    found = [knob for knob in found if knob.saves > 2**20]
    return sorted(found, key=lambda knob: -knob.saves)[:3]


def state_knobs(config: Config, recipe: str, ranks: int) -> list[Knob]:
    """What would make weights, gradients and optimizer smaller."""
    found = []
    whole = sharded_state_bytes(config, ranks)["ddp"]["total"]
    if recipe == "deepspeed_zero" and (stage := getattr(config, "stage", 3)) < 3 and ranks > 1:
        table = sharded_state_bytes(config, ranks)
        now = table[f"deepspeed_zero stage={stage}"]["total"] if stage else whole
        found.append(Knob("stage=3", now - table["deepspeed_zero stage=3"]["total"], "half as much again to send"))
    elif recipe not in ("fsdp", "deepspeed_zero", "pipeline_parallel", "model_parallel"):
        over = max(2, ranks)
        saves = whole - sharded_state_bytes(config, over)["fsdp"]["total"]
        found.append(Knob("recipes.fsdp", saves, f"parameters, gradients and optimizer cut over {over} ranks"))
    if states_per_weight(config.optim)[0] > 1:
        lighter = with_values(config, {"optim.name": "sgd", "optim.arguments": {}})
        saves = whole - sharded_state_bytes(lighter, ranks)["ddp"]["total"]
        found.append(
            Knob("optim=sgd", saves // (ranks if recipe == "fsdp" else 1), "one state a weight; another training")
        )
    return found
