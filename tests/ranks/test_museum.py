"""The museum of silent bugs: each breaks its recipe, and verify names it by the number that it is said to be seen by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.config.declared import read_config
from lockstep.config.schema import to_yaml
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.models.gpt import GPT_SIZES, GPTConfig
from lockstep.registry import get_recipe
from lockstep.run import Run
from lockstep.verify.museum.bug import REFUSED, Bug, broken, sound
from lockstep.verify.museum.page import written
from lockstep.verify.museum.table import BUGS, find_bug
from lockstep.verify.proofs import References, proof_cases, verify_case
from lockstep.verify.rows import VerifyRow
from recipes import verify
from tests.helpers.harness import ROOT, command, compose_config, execute, run_ranks, verify_rows

pytestmark = pytest.mark.usefixtures("narrow")


def alike(bug: Bug) -> str:
    """What bugs have in common that are shown beside the same two trainings: the reference's, and the sound recipe's."""
    return str((bug.recipe, bug.settings, bug.own, bug.prepare, bug.task, bug.interrupt, bug.row == REFUSED))


@pytest.fixture(autouse=True)
def _narrow_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPT_SIZES, "nano", GPTConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=32))


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, VerifyRow]]:
    """Rows by bug, "" for the sound recipe's, by what bugs have in common: they are computed together."""
    return {}


def rows_of(world: World, names: list[str], config: str, out: str) -> dict[str, VerifyRow]:
    """The row of the recipe as it is, and of each copy that has a bug; all against the same reference."""
    references = References()
    found = {}
    for name in ["", *names]:
        bug = find_bug(name or names[0])
        recipe = (broken if name else sound)(bug, get_recipe(bug.recipe))
        folder = Path(out, name or "sound")
        (folder / "ranks").mkdir(parents=True, exist_ok=True)
        run = Run("verify", read_config(verify.train, config), world, folder, quiet=True)
        (case,) = proof_cases([recipe], run.config, "cpu")
        found[name] = verify_case(run, replace(case, interrupt=bug.interrupt), get_recipe("single"), references)
    return found


@pytest.mark.slow_except("ranks-weigh-alike", "recomputed-batches-count-twice")
@pytest.mark.parametrize("name", [bug.name for bug in BUGS if bug.row != REFUSED])
def test_a_bug_is_seen_by_its_number_and_is_the_only_cause(
    name: str, known: dict[str, dict[str, VerifyRow]], tmp_path: Path
) -> None:
    bug = find_bug(name)
    if (key := alike(bug)) not in known:
        names = [each.name for each in BUGS if alike(each) == key]
        config = compose_config(verify.train, "precision=fp64", f"max_steps={bug.steps}")
        validate(config, verify.train, 2)
        known[key] = run_ranks(rows_of, 2, names, to_yaml(config), str(tmp_path), timeout=120)[0]
    assert known[key][""].verdict == "equal"
    verdict, _, numbers = known[key][name].verdict.partition(": ")
    assert verdict == "OFF"
    assert bug.row in numbers.split(", ")
    if bug.row == "evaluation":
        assert numbers == "evaluation"


def test_the_command_shows_a_bug_and_fails(tmp_path: Path) -> None:
    bug = find_bug("ranks-weigh-alike")
    with pytest.raises(AssertionError, match=f"museum={bug.name}: is found in ddp in fp64 .*the gradient of"):
        execute(verify.train, tmp_path / "run", 2, f"museum={bug.name}", "max_steps=2")
    (row,) = verify_rows(tmp_path / "run")
    assert row["verdict"] == "OFF: loss, gradients, weights, evaluation"
    said = (tmp_path / "run" / "ranks" / "0.log").read_text()
    assert bug.story in said
    assert bug.links[0] in said
    assert "- scaler.scale(loss * micro.weight).backward()" in said
    assert "+ scaler.scale(loss).backward()" in said


@pytest.mark.slow
def test_an_optimizer_of_other_tensors_is_refused(tmp_path: Path) -> None:
    (bug,) = [each for each in BUGS if each.row == REFUSED]
    with pytest.raises(
        AssertionError, match=f"museum={bug.name}: is stopped by an error: .*not the model's parameters"
    ):
        execute(verify.train, tmp_path / "run", 2, f"museum={bug.name}", "max_steps=2")


@pytest.mark.slow
def test_a_recipe_that_is_cut_off_and_resumed_is_equal(tmp_path: Path) -> None:
    words = ("recipes=[fsdp,zero1,local_sgd]", "precision=fp64", "max_steps=3", "interrupt=2")
    execute(verify.train, tmp_path / "run", 2, *words)
    rows = verify_rows(tmp_path / "run")
    assert {row["verdict"] for row in rows} == {"equal"}
    folders = [path for path in (tmp_path / "run").iterdir() if (path / "checkpoints").is_dir()]
    assert sorted({path.name.partition("-")[0] for path in folders}) == ["fsdp", "local_sgd", "zero1"]


def test_the_list_has_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose_config(verify.train, "museum=list")
    assert verify.train.alone(config) == 0
    listed = capsys.readouterr().out
    assert all(f"{bug.name} " in listed for bug in BUGS)


def test_a_name_that_is_not_in_it_is_refused_with_all_names() -> None:
    unknown = command("-m", "recipes.verify", "museum=no-such-bug")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: museum=no-such-bug: no such bug; allowed are list, ")
    assert unknown.stderr.count("\n") == 1
    assert all(bug.name in unknown.stderr for bug in BUGS)


@pytest.mark.parametrize(
    ("words", "ranks", "said"),
    [
        (("museum=ddp-bypassed", "recipes=[fsdp]"), 2, "leave recipes out"),
        (("museum=ddp-bypassed", "interrupt=2"), 2, "leave interrupt out"),
        (("museum=ddp-bypassed", "task=language"), 2, "leave task out"),
        (("museum=ddp-bypassed",), 1, "among several ranks, and here is 1; set nproc=2"),
        (("museum=schedule-begins-anew", "max_steps=3"), 2, "is seen later; allowed is 4 or more"),
        (("interrupt=3",), 2, "the shortest proof has 3 steps; allowed are 1…2, or a larger max_steps"),
    ],
)
def test_what_contradicts_it_is_refused(words: tuple[str, ...], ranks: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        validate(compose_config(verify.train, *words), verify.train, ranks)


def test_an_honest_run_never_loads_the_museum() -> None:
    script = "import sys; from recipes import verify; verify.shown_bug(verify.VerifyConfig()); "
    script += "print([name for name in sys.modules if 'museum' in name])"
    assert command("-c", script).stdout.strip() == "[]"


def test_the_page_is_what_the_table_says() -> None:
    written_now = written()
    assert (ROOT / "docs" / "museum.md").read_text() == written_now, (
        "python -m lockstep.verify.museum.page > docs/museum.md"
    )
    assert len(BUGS) == len({bug.name for bug in BUGS}) >= 20


def test_each_mutant_still_fits_its_recipe() -> None:
    for bug in BUGS:
        assert broken(bug, get_recipe(bug.recipe)).train is not get_recipe(bug.recipe).train
