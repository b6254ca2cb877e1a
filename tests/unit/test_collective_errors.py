"""What torch's errors say of other ranks, in the words of torch's own libraries."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.distributed import DistBackendError

from lockstep.diagnose.stacks import crash_place
from lockstep.distributed.collective_errors import PEER_LOST, TIMED_OUT, lost_a_peer, timed_out

STACK = """Fatal Python error: Aborted

Thread 0x00007f (most recent call first):
  File "{torch}/torch/autograd/graph.py", line 841 in _engine_run_backward
  File "/home/me/train.py", line 3 in step
"""


@pytest.mark.parametrize(
    ("text", "lost", "late"),
    [
        ("NCCL communicator was aborted on rank 1.", True, False),
        ("NCCL communicator was aborted after a previous error", True, False),
        ("NCCL Async Error: remote process exited or there was a network error", True, False),
        ("NCCL error in: ProcessGroupNCCL.cpp:9, remote process exited, ncclRemoteError: A call failed", True, False),
        ("NCCL operation timed out", False, True),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 3000 ms", False, True),
        ("NCCL error in: NCCLUtils.cpp:9, invalid usage, Duplicate GPU detected : rank 0 and rank 1", False, False),
        ("[/pair.cc:578] Connection closed by peer [10.0.0.1]:4242", True, False),
        ("CUDA error: an illegal memory access was encountered", False, False),
    ],
)
def test_what_an_error_says_of_the_others(text: str, lost: bool, late: bool) -> None:
    error = DistBackendError(text)
    assert (lost_a_peer(error), timed_out(error)) == (lost, late)


def test_nccls_words_are_those_of_torch() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("torch is built without CUDA here")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        newer = (
            {"NCCL Async Error", "NCCL operation timed out"} if Version(torch.__version__) < Version("2.15") else set()
        )
        for words in {*PEER_LOST, *TIMED_OUT} - newer:
            if "nccl" in words.lower():
                assert content.find(words.encode()) >= 0, f"torch {torch.__version__} does not say {words!r}"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "[enforce fail at pair.cc:465] op.preamble.length <= op.nbytes. 2000 vs 1960",
            "in a collective of another size",
        ),
        (
            "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
            "ended by NCCL, which had waited",
        ),
        ("free(): invalid pointer", "Aborted"),
    ],
)
def test_a_process_is_aborted_for_the_reason_in_its_log(log: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "1.stack").write_text(STACK.format(torch=Path(torch.__file__).parents[1]))
    (tmp_path / "1.log").write_text(f"terminate called after throwing an instance\n{log}\n")
    assert crash_place(tmp_path / "1.stack").partition(", ")[2].startswith(said)
