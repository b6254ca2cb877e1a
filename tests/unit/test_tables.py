"""What is shown as a table reads well in any terminal: no line is too long, and no name, number or verdict is cut."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lockstep.callbacks.memory_report import memory_tables
from lockstep.compare.figures import ComparisonRow
from lockstep.compare.tables import comparison_tables
from lockstep.diagnose.bandwidth import LABELS, SIZES, bandwidth_plot, bandwidth_tables
from lockstep.diagnose.findings import Findings, findings_table
from lockstep.diagnose.memory_account import sharding_tables
from lockstep.launch.run_records import RunRecord, show_sweep
from lockstep.memory.tracker import LayerMemory
from lockstep.utils.tables import folded_table, terminal_tables
from lockstep.verify.first_difference import Difference, Parting
from lockstep.verify.judge import ProgramRow, ProgramVerdict, program_tables
from lockstep.verify.parting_report import parting_tables
from lockstep.verify.report import verify_tables
from lockstep.verify.rows import VerifyRow
from tests.helpers.harness import ROOT

WIDTHS = (60, 80, 120, 200)
LONG = "activation_checkpointing"  # the longest name of a recipe


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def shown(width: int, *tables: Table | str) -> str:
    """What a terminal without colours shows, none of its lines wider than it is."""
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(*tables, sep="\n", markup=not isinstance(tables[0], str))
    assert max(map(len, file.getvalue().splitlines())) <= width
    assert "…" not in file.getvalue()
    return file.getvalue()


def test_nothing_of_a_wide_table_is_cut(width: int) -> None:
    numbers = {f"column {number}": [f"{number}.{row:06}" for row in range(3)] for number in range(12)}
    columns = {"recipe": [LONG, "ddp", "single"], **numbers, "verdict": ["equal", "OFF: weights, evaluation", "equal"]}
    said = shown(width, *terminal_tables("a title", columns, text=("recipe", "verdict")))
    words = said.split()
    assert all(cell in words for cells in numbers.values() for cell in cells)
    tables = words.count("single")
    assert words.count(LONG) == tables, "each part of the table says which row is whose"
    assert (tables == 1) == (width == 200)
    assert "OFF: weights, evaluation" in " ".join(words)


def test_texts_are_folded_between_words_and_numbers_are_whole(width: int) -> None:
    prose = "a sentence of many words that says what a run was given, one word after another"
    said = shown(
        width, folded_table("a title", {"run": ["1"], "settings": [prose], "loss": ["0.123456"]}, ("settings",))
    )
    assert "0.123456" in said.split()
    assert prose in " ".join(said.replace("0.123456", "").replace("loss", "").split()).partition("1 ")[2]


ROWS = [
    VerifyRow("ddp", "fp64", 2, 5, 7e-16, 2e-16, 2e-15, 0.0, 2e-16),
    VerifyRow(
        LONG, "bf16", 2, 3, 7e-2, 2e-1, 2e-2, 0.0, 2e-3, variant="checkpoint_activations=full", verdict="OFF: loss"
    ),
]
PARTING = Parting(
    Difference(1, "backward", "layers.11.attention.projection.lora", "weight", 0.5),
    "Linear",
    "the product",
    [Difference(1, "backward", "layers.11.attention.projection.lora", "gradient of its weight", 0.5)] * 3,
    off=3,
    compared=9,
    steps=1,
    allowed=1e-10,
)
PROGRAM = ProgramVerdict(
    [
        ProgramRow("start", ranks=0.0, weights=0.0),
        ProgramRow("1", 1e-9, 0.0, 1e-8, 1e-9, 0.0, {"loss": "a", "grads": "b"}),
    ],
    "fp32",
    dict.fromkeys(("loss", "ranks", "grads", "weights", "buffers"), 1e-5),
    "",
    "",
    [],
)
FOUND = Findings("collectives on GPUs")
FOUND.ok("all-reduce of 2 ranks 1.5 GB/s")
FOUND.fails("rank 1 of node2 has no GPU, and its neighbours have", "ask the scheduler for one: --gpus-per-node=2")
LAYERS = [LayerMemory("layers.11.attention.projection", "MultiHeadAttention", [96, 512, 768], *[123456789] * 4)]
LINKS: dict[str, Any] = {
    name: [{"bytes": size, "seconds": 1e-3 * size, "bandwidth": 1.234e9 + size} for size in SIZES] for name in LABELS
}


def comparison(label: str) -> ComparisonRow:
    return ComparisonRow(
        LONG, label, 2, 2, 3, 1234.5, 1200.0, 1300.0, 0.0123, 0.0234, against="ddp", speedup=0.9, speedup_from=0.8,
        speedup_to=1.0, communication_seconds=0.01, exposed_seconds=0.005, exposed_share=0.4, memory_bytes=[1e9, 1e9],
        state_bytes=[5e8, 5e8], reached=0.97,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: verify_tables(ROWS), [LONG, "checkpoint_activations=full", "equal", "OFF", "7e-16", "bf16"]),
        (lambda: parting_tables(PARTING), ["backward", "5e-01"]),
        (
            lambda: program_tables(PROGRAM, *[SimpleNamespace(ranks=2)] * 2),  # type: ignore[list-item]
            ["start", "equal", "OFF: loss, grads", "1e-08"],
        ),
        (
            lambda: [findings_table(FOUND, "would a run work here?")],
            ["collectives on GPUs", "fails", "→ ask the scheduler for one: --gpus-per-node=2"],
        ),
        (
            lambda: memory_tables(LAYERS, "MiB of a model"),
            ["MultiHeadAttention", "96 × 512 × 768", "117.74", "all layers"],
        ),
        (
            lambda: sharding_tables({"DDP": dict.fromkeys("abcd", 2**30), "FSDP": dict.fromkeys("abcd", 2**29)}, 2),
            ["1,024.00"],
        ),
        (lambda: bandwidth_tables(LINKS, 2), ["256 KiB", "16 MiB", "1.23"]),
        (lambda: [bandwidth_plot(LINKS)], ["GB/s", "1 KiB", "p pair, * several"]),
        (lambda: comparison_tables("a", [comparison("ddp 2"), comparison("long words")]), [LONG, "1,234"]),
    ],
    ids="verify parting program findings memory sharding bandwidth plot compare".split(),
)
def test_names_numbers_and_verdicts_are_whole(build: Any, words: list[str], width: int) -> None:
    said = " ".join(re.sub(r"[─━│]", " ", shown(width, *build())).split())
    assert [word for word in words if word not in said] == []


def test_a_sweep_s_table_fits(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"status": "finished", "eval_loss": 0.123456, "eval_accuracy": 0.98}
    records = [
        RunRecord(tmp_path / "0", good),
        RunRecord(tmp_path / "1", {"status": "failed"}, "rank 1: out of memory"),
    ]
    show_sweep(["optim.lr=0.1 seed=1", "optim.lr=0.25 seed=12345"], records, "eval_accuracy")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    assert {"0.1235", "98.00%", "optim.lr=0.25", "finished"} <= set(said.split())


def test_no_table_is_built_elsewhere() -> None:
    """Then what is tested here holds for every table that there will be."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    assert [
        path.name for path in files if "rich.table import Table" in path.read_text() and "Table(" in path.read_text()
    ] == ["tables.py"]
