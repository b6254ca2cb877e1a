"""Which callbacks a run has: those that its config asks for, and no others."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.callbacks.base import Callback, CallbackList
from lockstep.callbacks.clipping_check import ClippingCheck
from lockstep.callbacks.device_stats import DeviceStats
from lockstep.callbacks.gradient_stats import GradientStats, wants_gradient_stats
from lockstep.callbacks.graph_leaks import GraphLeakWatch
from lockstep.callbacks.memory_report import MemoryReport
from lockstep.callbacks.metrics_logger import MetricsLogger
from lockstep.callbacks.nan_guard import NanGuard
from lockstep.callbacks.step_time import StepTimeMonitor
from lockstep.callbacks.unused_parameters import UnusedParameters
from lockstep.config.schema import Config
from lockstep.data.batches import BatchSource
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.distributed.process_group import World
from lockstep.training.clip import clips


def build_callbacks(
    config: Config,
    world: World,
    dims: ParallelDims,
    source: BatchSource,
    *,
    first: Sequence[Callback] = (),
) -> CallbackList:
    """The callbacks of one start of a run, in the order in which they are called.

    Args:
        dims: how the ranks share the work.
        source: what is trained on.
        first: further ones, such as a tool's, which come before all others.
    """
    step_time = StepTimeMonitor(world.heartbeat, source.workers)
    found: list[Callback] = [*first, step_time]
    if config.profile:
        from lockstep.callbacks.profiler import ProfileSteps  # torch.profiler: only who asks for it imports it
        from lockstep.callbacks.traffic_count import TrafficCount

        found += [ProfileSteps(config.profile, step_time), TrafficCount(config.profile, step_time)]
    if config.record_tensors:
        from lockstep.callbacks.tensor_recorder import TensorRecorder

        found.append(TensorRecorder(config.record_tensors, dims))
    found.append(UnusedParameters())
    if config.memory:
        found.append(MemoryReport())
    found.append(GraphLeakWatch())
    if clips(config.gradients):
        found.append(ClippingCheck())
    if wants_gradient_stats(config):
        found.append(GradientStats(config))
    if config.gradients.stop_on_nan:
        found.append(NanGuard(config))
    if world.rank == 0:
        found.append(DeviceStats(world.device))
        if config.logger.mllog:
            from lockstep.callbacks.mlperf_log import MlperfLog

            found.append(MlperfLog(source))
    return CallbackList([*found, MetricsLogger(source.task)])
