"""Rules of the house: who may import whom, recipes that differ by their technique alone, a README that runs."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.harness import ROOT, clean_environment, command
from tests.ranks.test_transfer import COMMANDS

HEAVY = set("deepspeed hydra lightning matplotlib ray sklearn tensorboard torchmetrics torchvision wandb".split())
LOOP = [
    "for micro in micro_batches(batch, run.config.accumulate, model):",
    "scaler.scale(loss * micro.weight).backward()",
    "run.record(loss=loss, weight=micro.weight)",
]
LOSS = "loss = cross_entropy(model(micro.images), micro.labels)"
SCALER = ["scaler.step(optimizer)", "scaler.update()"]
# The lines of single.py that a technique replaces by its own; every other line of single.py stands in every recipe.
REPLACES: dict[str, list[str]] = {
    "data_parallel": [],
    "deepspeed_zero": [
        "for batch in run.steps(model=model, optimizer=optimizer):",
        LOSS,
        LOOP[1],
        *SCALER,
        "optimizer.zero_grad()",
    ],
    "ddp": [],
    "fsdp": ["model = run.place(build_model(run.config.model))", "with run.autocast():"],
    "grad_accumulation": LOOP,
    "lightning_fabric": ["scaler = run.scaler()", LOOP[0], "with run.autocast():", LOOP[1], *SCALER],
    "lightning_trainer": [
        "scaler = run.scaler()",
        "for batch in run.steps(model=model, optimizer=optimizer):",
        LOOP[0],
        "with run.autocast():",
        LOSS,
        LOOP[1],
        *SCALER,
        "optimizer.zero_grad()",
    ],
    "model_parallel": [LOSS],
    "pipeline_parallel": [
        "optimizer: Optimizer = SGD(model.parameters(), lr=optim.lr, momentum=optim.momentum, "
        "weight_decay=optim.weight_decay)",
        "optimizer = AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)",
        "for batch in run.steps(model=model, optimizer=optimizer):",
        LOOP[0],
        LOSS,
        *LOOP[1:],
    ],
    "sync_batchnorm": [],
    "transfer_learning": [
        "optimizer: Optimizer = SGD(model.parameters(), lr=optim.lr, momentum=optim.momentum, "
        "weight_decay=optim.weight_decay)",
        "optimizer = AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)",
    ],
}
TOOLS = {"verify", "compare", "doctor", "tune"}
DEMONSTRATIONS = {"checkpoint_resume"}  # single's loop several times over, taken apart


def imports(path: Path) -> set[str]:
    """The top-level names of all modules a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no Python: this test would check nothing"
    return files


def test_recipes_never_import_launchers() -> None:
    for path in python_files("recipes"):
        assert "launchers" not in imports(path), path


def test_launchers_import_nothing_of_training() -> None:
    own = {
        "torchrun.py": {"torch"},
        "children.py": {"torch"},
        "lightning_start.py": {"lightning"},
        "slurm.py": {"submitit"},
    }
    for path in python_files("launchers"):
        assert not imports(path) & ({"recipes", "torch", "lightning", "submitit"} - own.get(path.name, set())), path
        trained = re.findall(r"lockstep\.(run|data|models|metrics|app)", path.read_text())
        assert not trained, path


def test_the_library_imports_neither() -> None:
    for path in python_files("src/lockstep"):
        assert not imports(path) & {"recipes", "launchers"}, path


def test_a_recipe_loads_no_heavy_package_before_it_needs_one() -> None:
    """What `import recipes.ddp` loads is what every rank waits for."""
    unasked = HEAVY | {"lockstep.callbacks.profiler", "lockstep.callbacks.communication"}
    script = f"import sys, recipes.ddp; print(sorted({unasked!r} & set(sys.modules)))"
    said = command("-c", script)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr


def code_lines(name: str) -> list[str]:
    """A recipe's lines of code, unparsed, so that comments and layout do not count."""
    tree = ast.parse((ROOT / "recipes" / f"{name}.py").read_text())
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    # An import of more names is still the import that single.py has.
    statements = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [line.strip() for node in statements for line in ast.unparse(node).splitlines()]
    return [line for line in lines if line and not line.startswith("@recipe")]


@pytest.mark.parametrize("name", REPLACES)
def test_a_recipe_without_its_technique_is_single(name: str) -> None:
    base, mine = code_lines("single"), code_lines(name)
    assert len(base) >= 15
    rest = iter(mine)
    missing = [line for line in base if line not in mine]
    assert missing == REPLACES[name]
    # What is left of single.py stands in the recipe in the same order.
    assert all(any(line == other for other in rest) for line in base if line not in missing)
    assert len(mine) > len(base) - len(missing), "a technique adds something"


def test_every_recipe_is_compared() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("[!_]*.py")} - {"single"} - TOOLS - DEMONSTRATIONS
    assert recipes == set(REPLACES)
    assert recipes


def test_every_recipe_opens_with_command_expectation_and_source() -> None:
    for path in (ROOT / "recipes").glob("[!_]*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        for part in (f"python -m recipes.{path.stem}", "Expect: ", "Source: https://"):
            assert part in doc, f"{path.name} lacks {part!r}"


def readme_commands() -> list[str]:
    """Every command of the README's console blocks; `#` starts a comment."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(shlex.split(line[2:], comments=True)) for line in lines if line.startswith("$ ")]


TRAINS = "-m recipes."
SHORT = ["max_steps=2", "data.augment=false"]  # a README command trains for a minute; that it starts and ends is tested


# What every change is tried on; the other commands that train are `slow`: their techniques have tests of their own, and
# so has torchrun (tests/ranks/test_start_paths.py).
QUICK = {
    "python -m recipes.ddp",
    "python -m recipes.checkpoint_resume forget=optimizer",
    "python -m recipes.ddp +cluster=lightning",
}
# What goes together, or is minutes of work: tests/ranks/test_verify.py and tests/ranks/test_transfer.py run the very same.
ELSEWHERE = {"python -m recipes.verify"} | {shlex.join(shlex.split(line)) for line in COMMANDS}


def test_the_commands_named_here_are_in_the_readme() -> None:
    assert set(readme_commands()) >= ELSEWHERE | QUICK


def readme_cases() -> list[Any]:
    lines = [line for line in readme_commands() if not line.startswith("make ") and line not in ELSEWHERE]
    trains = [TRAINS in line and "--help" not in line and "--cfg" not in line for line in lines]
    return [
        pytest.param(line, marks=pytest.mark.slow if slow and line not in QUICK else [])
        for line, slow in zip(lines, trains, strict=True)
    ]


@pytest.mark.parametrize("line", readme_cases())
def test_every_command_of_the_readme_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    if TRAINS in line and "--help" not in words and "--cfg" not in words:
        words += SHORT
    if words[0] == "python":
        done = command(*words[1:], cwd=tmp_path, timeout=240)
    else:
        if words[0] == "slurm/box":
            words[0] = str(ROOT / words[0])
        environment = clean_environment()
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # an activated environment
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 0, done.stderr


def test_the_readme_s_make_targets_exist() -> None:
    makes = [line.split()[1] for line in readme_commands() if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(makes)
    for target in makes:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
