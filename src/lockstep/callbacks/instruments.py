"""What looks on while a run trains, and says what it sees. Only gradients.* can change what is trained."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.callbacks.device_stats import DeviceStats
from lockstep.callbacks.gradient_stats import GradientStats, wanted
from lockstep.callbacks.graph_leaks import GraphLeaks, warning
from lockstep.callbacks.memory_report import MemoryReport, everyone, summarize_memory
from lockstep.callbacks.unused_parameters import UnusedParameters, listed
from lockstep.distributed.collectives import gather_numbers, gather_objects
from lockstep.distributed.heartbeat import DATA_WAIT_SHARE
from lockstep.loggers.base import Histogram
from lockstep.memory.tracker import LayerMemory
from lockstep.training.local_gradients import LocalGradients
from lockstep.training.timing import StepTime, warm_up
from lockstep.utils.files import write_json
from lockstep.utils.text import count

if TYPE_CHECKING:
    from lockstep.callbacks.profiler import Profiler
    from lockstep.run import Run


LOAD = ("data_wait_share", "cores_busy", "main_thread_busy")  # in result.json, each followed by _by_rank
NOTHING = contextlib.nullcontext()


def advice(workers: int, *, ranks: int, threads: int, cores: int) -> str:
    """What could be done about a long wait for images on a host.

    Args:
        workers: processes that prepare one rank's images.
        ranks: on this host.
        threads: with which a rank computes.
    """
    if not workers:
        return "each rank prepares its own; data.workers=1 has another process do it, which pays where a core is free"
    if ranks * (threads + workers) < cores:
        return f"set data.workers={2 * workers}"
    return f"decoding shares {count(cores, 'core')} with the model: not more workers would help, but smaller files"


class Instruments:
    """One rank's, for one start of a run. All ranks call each method together.

    Those that belong to a start's first step end with it: which parameters got no gradient, and what memory each layer
    held, where memory=report asks.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._graphs, self._meter = GraphLeaks(), DeviceStats(run.device)
        self._gradients: GradientStats | None = None
        self._audit: UnusedParameters | None = None
        self._account: MemoryReport | None = None
        self._load = StepTime(run.heartbeat)
        self._profiler: Profiler | None = None

    def begin(
        self, module: nn.Module, model: nn.Module, optimizer: Optimizer, names: list[str], parts: LocalGradients
    ) -> None:
        """Attach what is asked for.

        Args:
            module: what this rank holds of the model.
            model: the same, wrapped or not.
            names: every parameter of the whole model.
            parts: where gradients are to be seen.
        """
        run = self._run
        if wanted(run.config):
            self._gradients = GradientStats(run.config, names, module, parts, device=run.device, say=run.report.line)
        if run.config.memory:
            self._account = MemoryReport(module, optimizer)
        self._audit = UnusedParameters(module, model, optimizer)
        if run.config.profile:
            self._begin_profile(run.config.profile)

    def _begin_profile(self, steps: int) -> None:
        run, left = self._run, self._run.total_steps - self._run.step
        if warm_up(left) + steps > left:
            run.report.line(f"profile={steps}: left out, for only {count(left, 'step')} are left to take")
            return
        from lockstep.callbacks.profiler import Profiler

        path = run.out / "ranks" / f"{run.world.rank}.trace.json"
        self._profiler = Profiler(run.device, run.step + warm_up(left) + 1, steps, path)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the scalars that logged steps have of gradients."""
        return self._gradients.columns if self._gradients else ()

    @property
    def profiling(self) -> bool:
        """Whether the step that is being taken is recorded, and its time says nothing."""
        return self._profiler is not None and self._profiler.active

    def waiting(self) -> contextlib.AbstractContextManager[Any]:
        """Within it this rank waits for its next batch."""
        return self._profiler.waiting() if self._profiler and self._profiler.active else NOTHING

    def recorded(self, loss: Tensor) -> None:
        """See a loss with its graph."""
        self._graphs.watch(loss, self._run.step)

    def before_step(self, step: int, logged: bool) -> None:
        """Get ready for a step, which will be logged or not."""
        self._load.before_step()
        if self._profiler:
            if step == self._profiler.first:
                self._profiled_since = self._run.heartbeat.of_steps()
            self._profiler.before_step(step)
        if self._account:
            self._account.start()
        if self._gradients:
            config = self._run.config
            every = config.logger.histograms
            drawn = logged and every > 0 and -(-step // config.log_every) % every == 0
            self._gradients.prepare(step, logs=logged, histograms=drawn)

    def after_step(self, step: int, updated: bool) -> None:
        """Judge a step that was taken; under fp16 it may have been left out, and what looks at an update waits for one.

        Raises:
            UserError: a parameter got no gradient that DistributedDataParallel waits for.
            CheckFailed: gradients.stop_on_nan is set, and there was one.
        """
        run = self._run
        if self._profiler and self._profiler.after_step(step):
            self._report_profile(self._profiler)
            self._profiler = None
        if self._audit and updated:
            self._name_unused(self._audit.finish())
            self._audit = None
        if self._account:
            layers = self._account.stop()
            if updated:
                self._report_memory(layers)
                self._account = None
        if kept := self._graphs.kept(step):
            run.report.line(warning(kept))
            run.note("", graphs_kept=[number + 1 for number in kept])  # steps, as they are logged
        if self._gradients:
            self._gradients.check(run.world.rank, run.stop)

    def read(self, updated: bool) -> tuple[dict[str, float], dict[str, Histogram], str]:
        """(scalars, histograms, words for the progress line) of a logged step, of one with or without an update."""
        usage, figures = self._meter.read() if self._run.world.rank == 0 else ("", {})
        gradients = self._gradients if updated else None
        return figures | (gradients.scalars if gradients else {}), gradients.histograms if gradients else {}, usage

    def finish(self, workers: int) -> None:
        """Put down what the steps were spent on, by rank, and say so where the wait for data is long.

        Args:
            workers: processes that prepare this rank's images.
        """
        run = self._run
        shares = {name: gather_numbers(share, run.device) for name, share in self._load.shares().items()}
        run.note("", **{f"{name}_by_rank": shares.get(name) for name in LOAD})
        waits = shares.get("data_wait_share", [0.0])
        if max(waits) > DATA_WAIT_SHARE:
            longest = waits.index(max(waits))
            world, cores = run.world, len(os.sched_getaffinity(0))
            threads = world.threads if run.device.type == "cpu" else 1
            remedy = advice(workers, ranks=world.hosts.count(world.hosts[0]), threads=threads, cores=cores)
            run.note(f"data: rank {longest} waited for images for {max(waits):.0%} of its steps' time: {remedy}")

    def _name_unused(self, mine: list[str]) -> None:
        """Say which parameters got no gradient in this start's first step, whichever rank has them."""
        run = self._run
        names = list(dict.fromkeys(name for some in gather_objects(mine, run.world.control) for name in some))
        if names:
            run.note("", parameters_without_gradient=names)
            run.report.line(
                f"warning: no gradient in the first step for {listed(names)}: not trained; use them, or freeze them"
            )

    def _report_profile(self, profiler: Profiler) -> None:
        """Write down what the recorded steps were spent on, by rank; they do not count as steps of the run's speed."""
        from lockstep.callbacks.profiler import in_a_line, worst

        run, began = self._run, time.perf_counter()
        ranks = gather_objects(profiler.report(), run.world.control)
        run.note(
            f"profile: {in_a_line(ranks)}",
            profiled_steps=profiler.steps,
            communication_seconds_by_rank=[each["communication"] for each in ranks],
            exposed_communication_seconds_by_rank=[each["exposed"] for each in ranks],
        )
        if run.world.rank == 0:
            operations = worst(ranks)
            shown = [{name: value for name, value in each.items() if name != "operations"} for each in ranks]
            write_json(run.out / "profile.json", {"steps": profiler.steps, "ranks": shown, "operations": operations})
        self._load.leave_out(profiler.steps, self._profiled_since)
        run.pause(time.perf_counter() - began)

    def _report_memory(self, layers: list[LayerMemory]) -> None:
        """Write down what each rank held in the step that has ended, the first one."""
        run = self._run
        ranks = everyone(layers, run.world.control)
        run.note(f"held: {summarize_memory(ranks)}, in MiB by rank; by layer in memory.json")
        if run.world.rank == 0:
            write_json(run.out / "memory.json", {"ranks": ranks})
