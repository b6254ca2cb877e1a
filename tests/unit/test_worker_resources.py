"""DataLoader workers that want for a resource end the run with one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.data.loader import Samples, build_loader
from lockstep.data.sampler import EvalSampler
from lockstep.errors import UserError


class Unsendable(Tensor):
    """What cannot be sent to another process, for want of what `reason` says."""

    reason = ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OSError(self.reason)


class Pictures:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(2), torch.tensor(index)


def unsendable(samples: list[Any]) -> tuple[Any, Any]:
    return [Unsendable(2)], torch.zeros(len(samples))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("AF_UNIX path too long", "set TMPDIR to a shorter path"),
        ("[Errno 24] Too many open files", "ulimit -n"),
        ("unable to resize file </torch_1>: No space left on device (28)", "--shm-size"),
        ("something else", "see what it says"),
    ],
)
def test_a_batch_that_cannot_be_sent_is_the_run_s_error(
    reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being told, a DataLoader waits for it for ever."""
    monkeypatch.setattr(Unsendable, "reason", reason)
    batches = build_loader(Samples(Pictures(), 0, unsendable), EvalSampler(4, 2, 0, 1), 1, pin_memory=False)
    with pytest.raises(UserError, match=r"data\.workers=1: a DataLoader worker failed") as caught:
        next(iter(batches))
    assert reason in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
