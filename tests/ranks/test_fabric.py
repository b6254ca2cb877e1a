"""recipes.lightning_fabric: the ranks that are there, our precision once, and the SyncBatchNorm that Fabric lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy

from lockstep.distributed import signals
from lockstep.distributed.process_group import World
from lockstep.distributed.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
from lockstep.integrations.fabric import joined
from lockstep.verify.trace import difference
from recipes import ddp, lightning_fabric, single, sync_batchnorm
from tests.helpers.harness import assert_equal, run_ranks, train
from tests.helpers.narrow_resnet import narrow_resnet18

pytestmark = pytest.mark.usefixtures("narrow")

TINY = (
    "data=synthetic",
    "data.size=48",
    "data.image_size=8",
    "global_batch_size=12",
    "max_steps=4",
    "optim.warmup_steps=0",
)


@pytest.mark.slow_except("('accumulate=3',)")
@pytest.mark.parametrize("words", [("accumulate=3",), ("precision=bf16",)], ids=str)
def test_fabric_trains_what_ddp_trains_to_the_last_bit(words: tuple[str, ...], tmp_path: Path) -> None:
    mine = train(lightning_fabric.train, tmp_path / "fabric", 2, *TINY, *words)
    assert_equal(mine, train(ddp.train, tmp_path / "ddp", 2, *TINY, *words))


@pytest.mark.slow
def test_synchronised_it_is_one_process(tmp_path: Path) -> None:
    """3 ranks; and what recipes.sync_batchnorm does, it does."""
    words = (*TINY, "precision=fp64")
    mine = train(lightning_fabric.train, tmp_path / "fabric", 3, *words, "sync_batchnorm=true")
    assert difference(mine, train(single.train, tmp_path / "single", 1, *words)) < 1e-10
    assert_equal(mine, train(sync_batchnorm.train, tmp_path / "sync", 3, *words))


def looked_at(world: World, when: str) -> tuple[int, int, bool, int, dict[str, torch.Tensor]]:
    """Layers that synchronise, all-reduces of three pieces, whether signals are still ours, threads, the weights."""
    torch.manual_seed(0)
    listener = signals.Listener(lambda words: None)
    before = [signals.signal.getsignal(number) for number in signals.SIGNALS]
    threads = torch.get_num_threads()
    model = narrow_resnet18(10, nn.BatchNorm2d).double()
    fabric = Fabric(strategy=DDPStrategy(**joined(world)), precision="64-true")
    fabric.launch()
    if when == "before":
        convert_sync_batchnorm(model)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if when == "after":
        convert_sync_batchnorm(wrapped)
    reduced: list[Any] = []

    def count(group, bucket):  # type: ignore[no-untyped-def]
        if bucket.is_last():
            reduced.append(bucket)
        return allreduce_hook(group, bucket)

    wrapped._forward_module.register_comm_hook(None, count)
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    for number, piece in enumerate(images.chunk(3)):
        mine = piece.chunk(world.world_size)[world.rank]
        with fabric.no_backward_sync(wrapped, enabled=number < 2):
            with fabric.autocast():
                loss = cross_entropy(wrapped(mine), torch.arange(len(mine)))
            fabric.backward(loss / 3)
    optimizer.step()
    kept = [signals.signal.getsignal(number) for number in signals.SIGNALS] == before
    listener.close()
    layers = sum(isinstance(layer, SyncBatchNorm) for layer in wrapped.modules())
    return layers, len(reduced), kept, torch.get_num_threads() - threads, dict(model.state_dict())


def test_what_fabric_leaves_alone_and_when_to_convert() -> None:
    """Converted after setup the layers synchronise all the same, because only their class changes."""
    found = {when: run_ranks(looked_at, 2, when)[0] for when in ("never", "before", "after")}
    for layers, reduced, kept, threads, _ in found.values():
        assert reduced == 1, "no_backward_sync holds back all but the last piece"
        assert kept, "signals have one owner"
        assert threads == 0
        assert layers in (0, 19)
    assert [found[when][0] for when in found] == [0, 19, 19]
    assert_equal(found["after"][4], found["before"][4])
    assert difference(found["never"][4], found["before"][4]) > 1e-3


def test_ranks_say_where_they_are() -> None:
    """Two hosts of two ranks, seen from the last one, which Slurm shows a single GPU."""
    cpu = torch.device("cpu")
    plan = joined(World(3, 4, 1, ["a", "a", "b", "b"], cpu, "gloo", 1))
    ranks = plan["cluster_environment"]
    assert (ranks.global_rank(), ranks.world_size(), ranks.local_rank(), ranks.node_rank()) == (3, 4, 1, 1)
    assert plan["parallel_devices"] == [cpu, cpu]
    assert ranks.creates_processes_externally
