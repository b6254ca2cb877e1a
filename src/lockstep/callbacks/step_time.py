"""What a rank's steps were spent on: waiting for batches, computing on how many cores, or neither."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.distributed.collectives import gather_numbers
from lockstep.distributed.cores import usable_cores
from lockstep.distributed.heartbeat import DATA_WAIT_SHARE, Heartbeat
from lockstep.training.timing import WARM_UP, warm_up
from lockstep.utils.text import count

STEP_SHARES = ("data_wait_share", "cores_busy", "main_thread_busy")  # in result.json, each followed by _by_rank


class StepTimeMonitor(Callback):
    """Shares of the steps' time without the warm-up, into result.json; says so where the wait for data is long.

    Args:
        heartbeat: whose clocks are read.
        workers: processes that read this rank's samples.
    """

    def __init__(self, heartbeat: Heartbeat, workers: int = 0) -> None:
        self._heartbeat, self._workers, self._steps = heartbeat, workers, 0
        self._marks: dict[int, Sequence[float]] = {0: heartbeat.of_steps()}  # where the steps after so many begin
        self._left_out = [0.0] * 4

    def on_step_begin(self, context: CallbackContext) -> None:
        self.before_step()

    def before_step(self) -> None:
        """Be told of each step, before it begins."""
        if self._steps in (1, WARM_UP):
            self._marks[self._steps] = self._heartbeat.of_steps()
        self._steps += 1

    def now(self) -> Sequence[float]:
        """The clocks as they are, for `leave_out`."""
        return self._heartbeat.of_steps()

    def leave_out(self, steps: int, since: Sequence[float]) -> None:
        """Not to count the last `steps` steps, which began when `now` said `since`."""
        self._steps -= steps
        self._left_out = [out + more for out, more in zip(self._left_out, self._since(since), strict=True)]

    @property
    def seconds_left_out(self) -> float:
        """What `leave_out` was told not to count."""
        return self._left_out[0]

    def shares(self) -> dict[str, float]:
        """Of a second of a step, by name; empty where no step was taken."""
        passed = self._since(self._marks[warm_up(self._steps)])
        wall, cpu, main, waited = (here - out for here, out in zip(passed, self._left_out, strict=True))
        if wall <= 0:
            return {}
        return {"data_wait_share": waited / wall, "cores_busy": cpu / wall, "main_thread_busy": main / wall}

    def on_train_end(self, context: CallbackContext, evaluation: object) -> None:
        shares = {name: gather_numbers(share, context.device) for name, share in self.shares().items()}
        context.note("", **{f"{name}_by_rank": shares.get(name) for name in STEP_SHARES})
        waits = shares.get("data_wait_share", [0.0])
        if max(waits) > DATA_WAIT_SHARE:
            longest = waits.index(max(waits))
            world, cores = context.world, usable_cores()
            threads = world.threads if context.device.type == "cpu" else 1
            ranks = world.hosts.count(world.hosts[0])
            advice = loader_advice(self._workers, ranks=ranks, threads=threads, cores=cores)
            context.note(f"data: rank {longest} waited for data for {max(waits):.0%} of its steps' time: {advice}")

    def _since(self, mark: Sequence[float]) -> list[float]:
        return [after - before for after, before in zip(self._heartbeat.of_steps(), mark, strict=True)]


def loader_advice(workers: int, *, ranks: int, threads: int, cores: int) -> str:
    """What could be done about a long wait for data on a host.

    Args:
        workers: processes that read one rank's samples.
        ranks: on this host.
        threads: with which a rank computes.
    """
    if not workers:
        return "each rank prepares its own; data.workers=1 has another process do it, which pays where a core is free"
    if ranks * (threads + workers) < cores:
        return f"set data.workers={2 * workers}"
    return f"decoding shares {count(cores, 'core')} with the model: not more workers would help, but smaller files"
