"""The emulated GPUs themselves: what tests on them rely on, each promise with what would break it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import emulated_gpu
from tests.helpers.gpus import emulated
from tests.helpers.harness import command


def said(script: str, folder: Path, count: int = 2, mib: int = 4096, **variables: str) -> list[object]:
    """What a script prints on emulated GPUs, a JSON value per line."""
    done = command("-c", f"import torch\n{script}", cwd=folder, **emulated(count, mib) | variables)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_copy_arrives_when_its_stream_is_waited_for_and_not_before(tmp_path: Path) -> None:
    script = """
def show(x): print(x.tolist())
there, other = torch.tensor([1.0, 2.0], device="cuda:1"), torch.ones(2, device="cuda:0")
host = torch.zeros(2).pin_memory()
host.copy_(there, non_blocking=True); show(host)
torch.cuda.current_stream(0).synchronize(); show(host)  # the other device's
torch.cuda.current_stream(1).synchronize(); show(host)
host.copy_(there + 1, non_blocking=True)
stream = torch.cuda.Stream(1)
stream.wait_stream(torch.cuda.current_stream(1))
stream.synchronize(); show(host)  # which waits for the copy's
host.copy_(there + 2, non_blocking=True)
event = torch.cuda.current_stream(1).record_event(); show(host)
event.synchronize(); show(host)
host.copy_(there + 3); show(host)
"""
    nothing, late = [0.0, 0.0], [2.0, 3.0]
    assert said(script, tmp_path) == [nothing, nothing, [1.0, 2.0], late, late, [3.0, 4.0], [4.0, 5.0]]


def test_the_digits_are_the_cpus_and_memory_runs_out_where_it_ends(tmp_path: Path) -> None:
    script = """
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
def step(device):
    nn.functional.cross_entropy(net.to(device)(images.to(device)), labels.to(device)).backward()
    found = [x.cpu().clone() for x in [*(p.grad for p in net.parameters()), *net.buffers()]]
    net.zero_grad(); net[1].reset_running_stats()
    return found
print(sum(torch.equal(a, b) for a, b in zip(step("cpu"), step("cuda:1"), strict=True)))
print(torch.cuda.mem_get_info(0)[1] // 2**20)
try:
    held = [torch.empty(2**20, 16, dtype=torch.uint8, device="cuda:0") for _ in range(100)]
except torch.cuda.OutOfMemoryError as error:
    print('"' + str(error).split(".")[0] + '"')
"""
    assert said(script, tmp_path, mib=100) == [9, 100, "CUDA out of memory"]


@pytest.mark.slow
def test_what_a_gpu_refuses_is_refused(tmp_path: Path) -> None:
    script = """
import json
def refused(work):
    try: work(); print('""')
    except RuntimeError as error: print(json.dumps(str(error)))
here, there, host = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"), torch.ones(2)
refused(lambda: here + there)
refused(lambda: here + host)
refused(lambda: here + host.sum())  # a number of the host's goes along with every kernel
refused(lambda: torch.ones(2, device="cuda:2"))
print(torch.cuda.device_count())
"""
    mixed, host, fine, missing, count = said(script, tmp_path)
    assert str(mixed).endswith("at least two devices, cuda:0, cuda:1! (add)")
    assert str(host).endswith("at least two devices, cpu, cuda:0! (add)")
    assert fine == ""
    assert "invalid device ordinal" in str(missing)
    assert count == 2
    assert said("print(torch.cuda.device_count())", tmp_path, 4, CUDA_VISIBLE_DEVICES="3,0") == [2]
    assert said("print(torch.cuda.device_count())", tmp_path, 4, CUDA_VISIBLE_DEVICES="") == [0]


@pytest.mark.slow
def test_a_host_that_waits_is_heard(tmp_path: Path) -> None:
    script = """
import warnings
x = torch.ones(3, device="cuda")
torch.cuda.set_sync_debug_mode("warn")
def waits(work):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        work()
    print(len(heard))
waits(lambda: x.sum().item())
waits(lambda: x[x > 0])
waits(lambda: x.cpu())
waits(lambda: torch.ones(3).pin_memory().cuda(non_blocking=True))
waits(lambda: torch.empty(3).pin_memory().copy_(x, non_blocking=True))
waits(lambda: (x * 2 + 1).sum().sqrt())
waits(lambda: torch.cuda.synchronize())
"""
    assert said(script, tmp_path) == [1, 1, 1, 0, 0, 0, 1]


def test_no_compiler_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_gpu, "BUILDS", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="there is no `cc` here: apt-get install gcc"):
        emulated_gpu.library.__wrapped__()
    assert list(tmp_path.iterdir()) == []
