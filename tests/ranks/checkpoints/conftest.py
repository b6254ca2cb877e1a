"""A run with checkpoints, for tests of what befalls its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpointed_run import cut_off_run, finished_run, undisturbed
from tests.helpers.fuzz.results import Result
from tests.helpers.fuzz.starts import warm


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    with warm():
        yield


@pytest.fixture(scope="module")
def whole() -> Result:
    return undisturbed()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def cut_off(finished: Path, tmp_path: Path) -> Path:
    return cut_off_run(finished, tmp_path / "out")
