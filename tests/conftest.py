"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torchvision.models import resnet

from tests.helpers.narrow_resnet import narrow_resnet18

# A file is one worker's: begun last, one of these would keep that worker busy long after the others have ended.
LONGEST_FIRST = "test_slurm test_house test_preemption test_checkpoint_faults test_verify test_failures".split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run wherever a GPU is found, and are left out by name, not silently passed, where none is."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Ranks are forked from this process, and a fork must not inherit a running thread pool.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Make `model=resnet18` one that trains in milliseconds. Ranks are forked, so they inherit it; commands do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "resnet18", narrow_resnet18)
        yield
