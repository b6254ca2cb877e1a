"""What launchers.lightning needs of Lightning itself, which takes seconds to import."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lockstep.launchers import children


class Numbered(DDPStrategy):
    """Numbers the ranks and leaves the rest to them: the process group and the device."""

    def setup_environment(self) -> None:
        self._set_world_ranks()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = Launcher(self, start_method=self._start_method)  # type: ignore[arg-type]


class Launcher(_MultiProcessingLauncher):
    """Lightning's, with signals held back until the ranks can hear them, and with patience.

    A rank ends by its exit code and returns nothing, for which Lightning's would wait for ever; and it ends the others
    at once, before they have noticed that one is gone.
    """

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> children.Failed:
        """Call `function` in every rank, wait; return who failed."""
        arguments = (function, args, kwargs, None)
        nproc = self._strategy.num_processes  # type: ignore[attr-defined]
        return children.start(self._wrapping_function, arguments, nproc, self._start_method)


def strategy(environment: ClusterEnvironment, nproc: int, nodes: int, method: Any) -> Numbered:
    """Assembled by Fabric, for `nproc` ranks on each of `nodes`; which devices they take is their own affair."""
    chosen = Numbered(cluster_environment=environment, start_method=method)
    Fabric(accelerator="cpu", strategy=chosen, devices=nproc, num_nodes=nodes)
    return chosen


def contract(numbered: Numbered) -> dict[str, str]:
    """torchrun's variables for this process, from Lightning's answers."""
    environment = numbered.cluster_environment
    assert environment is not None
    return {
        "RANK": str(numbered.global_rank),
        "WORLD_SIZE": str(numbered.world_size),
        "LOCAL_RANK": str(numbered.local_rank),
        "LOCAL_WORLD_SIZE": str(numbered.num_processes),
        "GROUP_RANK": str(numbered.node_rank),
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
    }


def start(target: str, nproc: int, nodes: int, method: str, folder: str) -> int:
    """One attempt; return as `launchers.lightning.launch` does."""
    store = None
    if nodes == 1:
        store = children.open_store()
        os.environ["NODE_RANK"] = "0"
    else:
        os.environ["TORCHELASTIC_RUN_ID"] = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    os.environ.pop("LOCAL_RANK", None)
    numbered = strategy(LightningEnvironment(), nproc, nodes, method)
    threads = os.environ.get("OMP_NUM_THREADS")

    def begin(*whom: Any) -> children.Failed:
        assert numbered.launcher is not None
        return numbered.launcher.launch(be_a_rank, numbered, threads, *whom)

    code = children.attempt(begin, target, folder, first=numbered.node_rank * nproc)
    del store
    return code


def be_a_rank(numbered: Numbered, threads: str | None, *whom: Any) -> None:
    """In the new process: ask Lightning for its numbers."""
    numbered.setup_environment()
    if threads is None:  # Lightning has set it; ranks count their threads themselves
        os.environ.pop("OMP_NUM_THREADS", None)
    children.be_a_rank(contract(numbered), *whom)


def under_slurm(tasks_per_node: int) -> dict[str, str]:
    """torchrun's variables for this task of srun's."""
    environment = SLURMEnvironment(auto_requeue=False)
    numbered = strategy(environment, tasks_per_node, int(os.environ["SLURM_NNODES"]), "popen")
    threads = os.environ.get("OMP_NUM_THREADS")
    assert numbered.launcher is not None
    numbered.launcher.launch(numbered.setup_environment)  # srun has started all: it checks their numbers, starts none
    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    return contract(numbered)
