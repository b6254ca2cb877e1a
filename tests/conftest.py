"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torchvision.models import resnet

from tests.helpers import gpus
from tests.helpers.narrow_resnet import narrow_resnet18

gpus.hide()

# A file is one worker's: begun last, one of these would keep that worker busy long after the others have ended.
LONGEST_FIRST = (
    "test_slurm test_slurm_trouble test_preemption test_commands test_resume test_start_paths test_tune "
    "test_lightning_launcher test_accuracy test_fuzz test_checkpoint_faults test_full_disks test_verify test_examples "
    "test_activation_checkpointing test_precision test_fsdp"
).split()

NO_SUCH_CASE = pytest.StashKey[
    list[str]
]()  # what `slow_except` and `soak_for` name in vain; tests/unit/test_house.py looks at it


@pytest.hookimpl(tryfirst=True)  # before pytest selects by `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests into tiers. GPU tests run wherever a GPU is found, and are left out by name where none is."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    named: dict[tuple[str, str], set[str]] = {}  # cases that markers name and that have not been seen yet
    for item in items:
        if item.get_closest_marker("gpu") and not gpus.own_gpus():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
        for marker in item.iter_markers("soak_for"):
            if is_among(item, marker, named):
                item.add_marker("soak")
        if quick := item.get_closest_marker("slow_except"):
            mine = is_among(item, quick, named)
            if not mine and not item.get_closest_marker("soak"):
                item.add_marker("slow")
    if not any("::" in word for word in config.args):  # else only some cases of a test may be here
        config.stash[NO_SUCH_CASE] = [f"{place}: {missing}" for place, missing in named.items() if missing]


def is_among(item: pytest.Item, marker: pytest.Mark, named: dict[tuple[str, str], set[str]]) -> bool:
    """Whether a marker names this case of its test; what it names is taken out of `named`."""
    assert isinstance(item, pytest.Function)
    case = item.callspec.id
    mine = {each for each in marker.args if case == each or case.startswith(f"{each}-")}
    missing = named.setdefault((str(item.path), f"{item.originalname} {marker.name}"), set(marker.args))
    missing -= mine
    return bool(mine)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Ranks are forked from this process, and a fork must not inherit a running thread pool.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _gpus_for_who_means_them(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus.own_gpus()))


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Make `model=resnet18` one that trains in milliseconds. Ranks are forked, so they inherit it; commands do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "resnet18", narrow_resnet18)
        yield
