"""result.json: a run in numbers."""

from __future__ import annotations

import time
from typing import Any

from lockstep.callbacks.base import CallbackContext
from lockstep.callbacks.model_flops import rates
from lockstep.training.evaluate import Evaluation
from lockstep.training.timing import percentile


def result_fields(
    context: CallbackContext,
    status: str,
    *,
    evaluation: Evaluation | None,
    step_seconds: list[float],
    memory: list[float],
    parameters: tuple[int, int],
    setup_seconds: float,
    unit: str,
) -> dict[str, Any]:
    """The fields that every run has.

    Args:
        status: finished or preempted.
        step_seconds: of this start, without the warm-up; without any, speeds are null.
        memory: each rank's peak, in bytes.
        parameters: how many there are, and how many of them are trained.
        setup_seconds: from the start to the first step.
        unit: what a sample is called, in the plural.
    """
    config, world = context.config, context.world
    median = percentile(step_seconds, 50) if step_seconds else None
    speed = config.global_batch_size / median if median else None
    return {
        "recipe": context.recipe,
        "task": config.task.name,
        "status": status,
        "world_size": world.world_size,
        "backend": world.backend,
        "device": world.device.type,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "allocator": config.allocator,
        "steps": context.step,
        "epochs": context.step // context.steps_per_epoch,
        "samples_seen": context.step * config.global_batch_size,
        "train_loss": context.train_loss,
        "eval_loss": None,
        **(evaluation.scalars if evaluation else {}),
        **dict.fromkeys(("samples_per_second", f"{unit}_per_second"), speed),
        **rates(context.notes, speed),
        "step_seconds_p50": median,
        "step_seconds_p95": percentile(step_seconds, 95) if step_seconds else None,
        "peak_memory_bytes": int(max(memory)),
        "peak_memory_bytes_by_rank": [int(size) for size in memory],
        "parameters": parameters[0],
        "trainable_parameters": parameters[1],
        "setup_seconds": setup_seconds,
        "wall_seconds": time.perf_counter() - context.started,
    }
