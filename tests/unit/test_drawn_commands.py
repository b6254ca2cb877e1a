"""Commands drawn at random: every key of every recipe and tool, with values that a tired person, a script or a shell's
quoting may give it. Each is answered by one line and exit code 2, with no file made, or by a run that would start.

In this process, as the command itself does it, up to where a launcher would start ranks. A failure names the command;
`DRAWN=SEED pytest tests/unit/test_drawn_commands.py` draws others.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.config.keys import walk
from lockstep.config.schema import ClusterConfig
from lockstep.config.tasks import with_task
from lockstep.launch import batch_size
from lockstep.launchers import lightning, slurm, torchrun
from lockstep.recipe import Recipe
from lockstep.registry import first_lines, get_recipe
from tests.helpers.harness import command

SEED = int(os.environ.get("DRAWN", "0"))
# recipes.plan starts no ranks: it would compute whole plans here.
RECIPES: list[Recipe] = [get_recipe(name) for name in first_lines() if name != "plan"]
NUMBERS = (
    "0 1 2 3 7 -1 0.5 1.5 1e3 1e-300 1e300 -1e300 1e400 nan inf -inf 4096 16385 99999999999 2147483647 2147483648 "
    "99999999999999999999 -99999999999999999999 18446744073709551616 0x10 1_000 ٣"
).split()
TEXTS = [
    *(
        "",
        "true",
        "false",
        "null",
        "none",
        "auto",
        "x",
        "ünï",
        "字",
        "a b",
        "os",
        "os:path",
        "x.py",
        "x.py:Y",
        "images",
    ),
    *("'", '"', "''", "'1'", "\\", "a\nb", "\t", "#", "@x", "a:b", "a=b", "=", "~", "~/x", "x" * 300, "--help", "-m"),
    *(".", "..", "../x", "/dev/null", "/dev/null/x", "/proc/x", "${x}", "${seed}", "${oc.env:HOME}", "${", "$(x)"),
]
TREES = ["[]", "{}", "[", "]", "{", "(1)", "f(x)", "choice(1)", "[1]", "[null]", "[a,null]", "[[1]]", "[1,2,3]"]
TREES += ["{a: 1}", "{a:{b:1}}", "{1:2}", "{null:1}", "{a:null}", "1,2", "a,b", "1,", ",", "range(3)", "[ddp]"]
GROUPS = ("model", "data", "optim", "logger", "+debug", "+cluster", "task", "tune")
# A tool looks at a few recipes, and not at all of them again for each command.
FEW = {"compare": "recipes=[single,ddp]", "verify": "recipes=[ddp]"}

# What another machine would do, or this one only in many minutes.
LONG = re.compile(r"cluster|image_size|compile|timeout_seconds|4096|(^| )-m( |$)")


def keys_of(recipe: Recipe, task: str | None) -> list[str]:
    return [name for name, _, _ in walk(with_task(recipe.config, task)())]


def draw(source: random.Random, recipe: Recipe) -> list[str]:
    """The words of one command."""
    task = source.choice([None, None, None, "language"])
    cluster = source.choice([None] * 8 + ["slurm", "lightning"])
    names = keys_of(recipe, task)
    if cluster:
        names += [f"cluster.{name}" for name, _, _ in walk(ClusterConfig())] * 2
    words = [f"task={task}"] * bool(task) + [f"+cluster={cluster}"] * bool(cluster)
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        name = source.choice(names) if source.random() < 0.9 else source.choice(GROUPS)
        value = source.choice(source.choice([NUMBERS, TEXTS, TREES]))
        shape = source.choice(["{}={}"] * 12 + ["+{}={}", "++{}={}", "~{}", "~{}={}", "{}", "{}.x={}", "{}@x={}"])
        words.append(shape.format(name, value))
    if source.random() < 0.06:
        words.append("-m")
    few = FEW.get(recipe.name)
    if few and not any("recipes" in word for word in words):
        words.append(few)
    return words


@pytest.fixture
def unstarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, in which launchers start nothing."""
    for launcher in (torchrun, lightning):
        monkeypatch.setattr(launcher, "launch", lambda *_, **__: 0)
    monkeypatch.setattr(slurm, "submit", lambda *_, **__: [])
    monkeypatch.setattr(slurm, "dry_run", lambda *_, **__: None)
    monkeypatch.setattr(slurm, "announce", lambda *_, **__: None)
    monkeypatch.setattr(batch_size, "attempt", lambda *_: batch_size.Trial(True, 1, 2))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    return here


def answer(recipe: Recipe, words: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """(a command's exit code, what is wrong with its answer: nothing where nothing is)."""
    for folder in (here.parent, here.parents[1] / "home"):
        shutil.rmtree(folder, ignore_errors=True)
    here.mkdir(parents=True)
    os.chdir(here)
    capfd.readouterr()
    sys.argv = [recipe.name, *words]
    try:
        recipe.main()  # type: ignore[attr-defined]
        return None, "came back"
    except SystemExit as leaving:
        code = leaving.code
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    said = capfd.readouterr()
    made = [path for path in here.parents[1].rglob("*") if path.is_file()]
    problem = ""
    if code == 0:
        problem = "" if made or "+cluster=slurm" in words else f"0, and nothing made: {said}"
    elif code != 2:
        problem = f"exit code {code}: {said.err}"
    elif made:
        problem = f"refused, and made {made}: {said.err}"
    elif said.out or said.err.count("\n") != 1 or not said.err.startswith("error: "):
        problem = f"not one line: {said.out}{said.err}"
    elif not says_what_to_do(said.err):
        problem = f"says neither a key nor what is allowed: {said.err}"
    return code, problem


def says_what_to_do(line: str) -> bool:
    """Whether a line names a key, or a word of the command, and what is allowed or to be changed."""
    remedy = (
        r"allowed|set |leave|write|name|did you mean|unknown key|cannot be|not |no |must|needs|has only|own keys are"
    )
    key = r"unknown key \S|[\w.'\"\])]+[=:]|[~-]\w"
    return bool(re.search(key, line.removeprefix("error: ")) and re.search(remedy, line))


def check(seed: int, count: int, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = random.Random(seed)
    wrong = []
    before, path = list(sys.argv), list(sys.path)
    for number in range(count):
        recipe = RECIPES[number % len(RECIPES)]
        words = draw(source, recipe)
        if problem := answer(recipe, words, here, capfd)[1]:
            wrong.append(f"{recipe.name} {shlex.join(words)}\n    {problem}")
    sys.argv, sys.path[:] = before, path
    with contextlib.suppress(OSError):
        os.chdir(here.parents[1])
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


def test_a_drawn_command_is_refused_in_one_line_or_would_run(
    unstarted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check(SEED, 60, unstarted, capfd)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_so_are_many(seed: int, unstarted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(SEED + seed, 300, unstarted, capfd)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_some_of_those_that_would_run_do(
    unstarted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps each. A run may end with a line that says what is wrong, such as weights that are NaN, and no page."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    source, recipe, ran, wrong = random.Random(SEED), get_recipe("ddp"), 0, []
    while ran < 16:
        words = draw(source, recipe)
        if LONG.search(" ".join(words)) or answer(recipe, words, unstarted, capfd)[0] != 0:
            continue
        ran += 1
        place = tmp_path / f"run{ran}"
        place.mkdir()
        done = command("-m", "recipes.ddp", *words, "max_steps=2", "eval_batch_size=360", cwd=place)
        if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr or done.stderr.count("error: ") > 1:
            wrong.append(f"{shlex.join(words)}: {done.returncode}\n{done.stderr[-2000:]}")
    assert not wrong, "\n".join(wrong)
