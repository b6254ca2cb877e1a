"""ARCHITECTURE.md is true: it names every room, and imports go down its floors."""

from __future__ import annotations

import re

from tests.helpers.harness import ROOT
from tests.unit.test_house import import_graph, room

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
FLOORS = {
    name: int(row[1])
    for row in re.finditer(r"^\| (\d+) \| ([^|]+) \|", TEXT, re.M)
    for name in re.findall(r"`(\w+)`", row[2])
}


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in (ROOT / "src" / "lockstep").iterdir() if not path.name.startswith("_")}
    assert rooms - {"py"} == FLOORS.keys(), "the table's rooms and those of src/lockstep"


def test_imports_go_down_the_floors() -> None:
    """But for the package's own front door, `lockstep/__init__.py` and `__main__.py`, which hand out what is above."""
    graph = {module: others for module, others in import_graph().items() if module.count(".") and "__" not in module}
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others & graph.keys())
        if home(module) != home(other) and FLOORS[home(module)] <= FLOORS[home(other)]
    ]
    assert len(graph) > 50
    assert not wrong, "\n".join(wrong)


def home(module: str) -> str:
    return room(module).rpartition(".")[2]


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT):
        assert (ROOT / name).exists() or (ROOT / "src" / "lockstep" / name).exists(), name


def test_it_fits_a_screen_or_two() -> None:
    assert len(TEXT.splitlines()) <= 64
