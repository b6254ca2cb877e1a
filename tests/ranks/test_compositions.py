"""Techniques go together: what docs/compositions.md says is proven is, and what it says is refused says so."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from lockstep.config.declared import read_config
from lockstep.config.schema import to_yaml
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.models.gpt import GPT_SIZES, GPTConfig
from lockstep.recipe import Proof
from lockstep.registry import get_recipe
from lockstep.run import Run
from lockstep.verify.compositions import (
    REFUSALS,
    TECHNIQUES,
    Composition,
    Refusal,
    compositions,
    compositions_page,
    refuses,
)
from lockstep.verify.proofs import ProofCase, References, verify_case
from lockstep.verify.rows import VerifyRow
from recipes import verify
from tests.helpers.harness import ROOT, compose_config, run_ranks

ALL = {each.name: each for each in compositions()}
QUICK = ("fsdp + tensor", "tensor + context + clipping", "ddp + pipeline + clipping", "fsdp + context + accumulation")
QUICK += ("tensor + pipeline + clipping",)
# A pipeline on a mesh is proven by its pairs, and clipped by one norm; the rest of it takes a minute more.
LONG = [
    name
    for name, each in ALL.items()
    if each.recipe == "parallel_mesh" and "pipeline" in name and (each.ranks == 8 or name.endswith(("bf16", "pointed")))
]
COMPARED = ("loss", "gradients", "weights", "buffers", "evaluation")


@pytest.fixture(autouse=True)
def _narrow_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPT_SIZES, "nano", GPTConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=32))


@pytest.fixture(scope="module")
def known() -> dict[str, VerifyRow]:
    """Rows by name; those on as many ranks are computed together, by the same processes."""
    return {}


def rows_of(world: World, names: list[str], config: str, out: str) -> dict[str, VerifyRow]:
    references = References()
    run = Run("verify", read_config(verify.train, config), world, Path(out), quiet=True)
    found = {}
    for name in names:
        each = ALL[name]
        proof = Proof(each.settings, each.own)
        case = ProofCase(replace(get_recipe(each.recipe), proof=proof), proof, each.precision, each.settings)
        found[name] = verify_case(run, case, get_recipe("single"), references)
    return found


def rows_on(ranks: int, names: list[str], folder: Path) -> dict[str, VerifyRow]:
    """The rows of these compositions, all on one set of ranks."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and over it again. " * 16)
    (folder / "run" / "ranks").mkdir(parents=True)
    words = ("task=language", "task.data=text", f"task.text={folder}/text.txt", "task.sequence_length=16")
    words += ("task.samples=0", "task.kv_heads=2", "global_batch_size=16", "max_steps=2", "threads=1")
    config = compose_config(verify.train, *words)
    validate(config, verify.train, ranks)
    return run_ranks(rows_of, ranks, names, to_yaml(config), str(folder / "run"), timeout=400)[0]


def assert_equal(each: Composition, row: VerifyRow) -> None:
    assert row.verdict == "equal"
    figures = {name: figure for name in COMPARED if (figure := getattr(row, name)) is not None}
    assert figures.keys() >= {"loss", "gradients", "weights"}
    if each.precision == "fp64":
        assert all(figure <= 1e-10 for figure in figures.values()), figures
    else:
        assert all(figure <= row.allowed[name] < 1 for name, figure in figures.items() if figure), (
            figures,
            row.allowed,
        )


def test_some_train_what_one_process_trains(tmp_path: Path) -> None:
    rows = rows_on(4, list(QUICK), tmp_path)
    for name, row in rows.items():
        assert_equal(ALL[name], row)


@pytest.mark.slow
@pytest.mark.soak_for(*LONG)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ALL)
def test_they_train_what_one_process_trains(name: str, known: dict[str, VerifyRow], tmp_path: Path) -> None:
    each = ALL[name]
    if name not in known:
        alike = [
            other for other in ALL.values() if other.ranks == each.ranks and (other.name in LONG) == (name in LONG)
        ]
        known |= rows_on(each.ranks, [other.name for other in alike], tmp_path)
    assert_equal(each, known[name])


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: "-".join(refusal.techniques))
def test_what_is_refused_says_why(refusal: Refusal) -> None:
    recipe = get_recipe(refusal.recipe)

    def command() -> None:
        words = ("task=language", "global_batch_size=16", *refusal.words.split())
        validate(compose_config(recipe, *words), recipe, refusal.ranks)

    with pytest.raises(UserError) as raised:
        command()
    assert str(raised.value) == refusal.said
    assert raised.value.exit_code == 2


def test_every_pair_is_proven_or_refused_and_none_is_both() -> None:
    assert len(ALL) == len(compositions()) >= 30
    for pair in combinations(TECHNIQUES, 2):
        assert any({*pair} <= {*each.techniques} for each in ALL.values()) != refuses(pair), pair


def test_the_page_is_what_the_table_says() -> None:
    now = compositions_page()
    assert (ROOT / "docs" / "compositions.md").read_text() == now, (
        "python -m lockstep.verify.compositions > docs/compositions.md"
    )
