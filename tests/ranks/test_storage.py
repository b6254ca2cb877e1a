"""What is written of a state: a copy that training cannot touch, hashed on its way, readable by torch alone."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lockstep.checkpoint import dcp as storage
from lockstep.checkpoint.dcp import HashedFile
from lockstep.checkpoint.directory import find_damage, fingerprint, folder_name
from lockstep.checkpoint.saver import CheckpointSaver, HostCopy
from lockstep.distributed.process_group import World
from tests.helpers.harness import run_ranks


def some_state(seed: int) -> dict[str, Tensor]:
    """All that makes a tensor special: large, empty, without dimensions, transposed, a part of another, shared."""
    draw = torch.Generator().manual_seed(seed)
    large = torch.randn(700, 500, generator=draw)
    return {
        "large": large,
        "part": torch.randn(8, 6, generator=draw)[2:5, 1:3],
        "transposed": torch.randn(5, 3, generator=draw).t(),
        "channels_last": torch.randn(2, 3, 4, 5, generator=draw).contiguous(memory_format=torch.channels_last),
        "number": torch.tensor(float(seed)),
        "bytes": torch.arange(9, dtype=torch.uint8) + seed,
        "half": torch.randn(7, generator=draw).bfloat16(),
        "empty": torch.empty(0, 3),
        "shared": large.view(-1)[:500],
        "weight": torch.nn.Parameter(torch.randn(4, generator=draw)),
    }


@pytest.mark.parametrize("sizes", [(), (0,), (1, 2, 3), (storage.CHUNK, 1), (3 * storage.CHUNK + 5, 0, 17)])
def test_a_file_s_fingerprint_is_that_of_what_it_was_handed(sizes: tuple[int, ...], tmp_path: Path) -> None:
    parts = [os.urandom(size) for size in sizes]
    with HashedFile(tmp_path / "file") as file:
        for part in parts:
            assert file.write(memoryview(part)) == len(part)
        told = file.sync()
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert told == fingerprint(tmp_path / "file")


def test_a_copy_is_out_of_training_s_reach_and_always_in_the_same_memory() -> None:
    copy = HostCopy()
    places = []
    for seed in (1, 2, 3):
        state = some_state(seed)
        held = copy.of(state)
        assert list(held) == list(state)
        for name, tensor in state.items():
            with torch.no_grad():
                tensor.zero_()
            assert torch.equal(held[name], some_state(seed)[name]), name
            assert not held[name].requires_grad or not held[name].grad_fn
        places.append([tensor.data_ptr() for tensor in held.values()])
    assert places[0] == places[1] == places[2]
    more = some_state(4) | {"momentum": torch.ones(3)}  # an optimizer that holds more after its first step
    assert torch.equal(copy.of(more)["momentum"], torch.ones(3))
    assert torch.equal(copy.of(more)["large"], some_state(4)["large"])
    del more["number"]
    assert "number" not in copy.of(more)


def write(world: World, folder: str, asynchronous: bool) -> dict[str, Any]:
    """Two saves by every rank, of states that it then overwrites."""
    saver = CheckpointSaver(Path(folder), world.control, asynchronous=asynchronous, keep=2, warn=print)
    seen: dict[str, Any] = {"mine": os.getpriority(os.PRIO_PROCESS, threading.get_native_id())}
    write_all = saver._write

    def spied(*arguments: Any) -> None:
        seen["writer's"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        time.sleep(0.1)  # the state is overwritten before anything is written
        write_all(*arguments)

    saver._write = spied  # type: ignore[method-assign]
    for step in (1, 2):
        state = some_state(step) | {f"rank {world.rank}": torch.tensor(world.rank)}
        saver.save(state, {"step": step})
        for tensor in state.values():
            with torch.no_grad():
                tensor.zero_()
    saver.wait()
    return seen


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_torch_alone_reads_what_ranks_wrote_behind_training_s_back(asynchronous: bool, tmp_path: Path) -> None:
    ranks = run_ranks(write, 2, str(tmp_path), asynchronous)
    for seen in ranks:
        assert seen["writer's"] == (min(19, seen["mine"] + 5) if asynchronous else seen["mine"])
    for step in (1, 2):
        path = tmp_path / folder_name(step)
        assert not find_damage(path)
        files = json.loads((path / "manifest.json").read_text())["files"]
        assert set(files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert all(entry == fingerprint(path / name) for name, entry in files.items())
        expected = some_state(step) | {"rank 0": torch.tensor(0), "rank 1": torch.tensor(1)}
        found = {name: torch.full_like(tensor, 9) for name, tensor in expected.items()}
        dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        size = sum((path / name).stat().st_size for name in files)
        assert size < 2 * 700 * 500 * 4, "of a part of a larger tensor, all of it was written"
