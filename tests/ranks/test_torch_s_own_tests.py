"""torch's own tests of its SyncBatchNorm, which are part of its wheel, run against lockstep's. All but one of them are for
GPUs alone; here they run on CPUs and gloo, with their models, numbers and tolerances."""

from __future__ import annotations

import importlib
import unittest
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lockstep.distributed.process_group import World
from lockstep.distributed.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
from tests.helpers.harness import run_ranks

PREFIX = "test_DistributedDataParallel_SyncBatchNorm"
NAMES = [f"{PREFIX}{rest}" for rest in ("", "_Channels_Last", "_No_Affine", "_2D_Input", "_Single_Input_Per_Process")]
NAMES += [f"{PREFIX}_{rest}" for rest in ("Diff_Input_Sizes_Running_Value", "Diff_Input_Sizes_gradient", "half")]
NAMES += ["test_SyncBatchNorm_process_group"]


class Replaced:
    """A module in the eyes of torch's tests, some of whose names mean something else."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__ |= {"_module": module} | names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Ours(SyncBatchNorm):
    """Called as torch's is."""

    @staticmethod
    def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
        return convert_sync_batchnorm(model, process_group)


def on_cpu() -> ModuleType:
    """torch's file of tests, whose GPUs are the CPU and whose SyncBatchNorm is lockstep's; in this rank alone."""
    theirs = importlib.import_module("torch.testing._internal.distributed.distributed_test")
    for kind in (Tensor, nn.Module):
        kind.cuda = lambda self, *_: self  # type: ignore[assignment, method-assign, attr-defined]

    def wrap(model: nn.Module, device_ids: Any = None, **options: Any) -> DistributedDataParallel:
        return DistributedDataParallel(model, **options)

    layers = Replaced(nn, SyncBatchNorm=Ours, parallel=Replaced(nn.parallel, DistributedDataParallel=wrap))
    theirs.nn = layers  # type: ignore[attr-defined]
    theirs.torch = Replaced(torch, nn=layers, device=lambda *_: torch.get_default_device())  # type: ignore[attr-defined]
    return theirs


def failure(world: World, name: str) -> str:
    """What is wrong by one of the tests; empty where it passes."""
    theirs: Any = on_cpu()
    with_tensors: Any = importlib.import_module("torch.testing._internal.common_utils").TestCase

    class Case(theirs.DistributedTest._DistTestBase, with_tensors):  # type: ignore[misc, name-defined]
        rank = world.rank

        def _barrier(self, *_: Any, **__: Any) -> None:
            dist.barrier()

        def runTest(self) -> None:
            test: Any = getattr(type(self), name)
            while hasattr(test, "__wrapped__"):  # by what asks for GPUs
                test = test.__wrapped__
            test(self)

    found = unittest.TestResult()
    Case("runTest").run(found)
    assert found.testsRun == 1
    assert not found.skipped
    return "".join(text for _, text in [*found.errors, *found.failures])


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """Once, and not in every forked rank; without the import's ban on setting cuDNN's flags, which later tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        patch.setenv("BACKEND", "gloo")
        patch.setenv("WORLD_SIZE", "2")
        importlib.import_module("torch.testing._internal.distributed.distributed_test")


@pytest.mark.parametrize("name", NAMES)
def test_lockstep_s_layer_passes_torch_s_test(name: str) -> None:
    assert run_ranks(failure, 2, name) == ["", ""]


def failure_of_shares(world: World, name: str) -> str:
    """Likewise, where each rank normalises by its own share."""
    SyncBatchNorm.forward = nn.BatchNorm2d.forward  # type: ignore[method-assign]
    return failure(world, name)


@pytest.mark.parametrize("name", [PREFIX, f"{PREFIX}_2D_Input", f"{PREFIX}_Diff_Input_Sizes_Running_Value"])
def test_it_fails_where_ranks_normalise_apart(name: str) -> None:
    assert "Tensor-likes are not close" in "".join(run_ranks(failure_of_shares, 2, name))
