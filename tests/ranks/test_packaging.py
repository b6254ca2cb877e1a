"""What a wheel installs, and that it runs beside whatever a user's own folders are called; recipes listed and copied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from lockstep.config.schema import Config
from lockstep.launch.launcher import launcher_module, list_launchers, load_launcher
from lockstep.recipe import Recipe
from lockstep.registry import get_recipe, list_recipes
from lockstep.utils.places import folder
from tests.helpers.harness import clean_environment, command
from tests.helpers.warm_interpreter import ROOT

SHORT = ["max_steps=2", "global_batch_size=16", "eval_batch_size=360"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the repository as `pip wheel . --no-deps` does, with the build backend that is installed."""
    where = tmp_path_factory.mktemp("wheel")
    words = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(where)]
    pip(*words)
    (built,) = where.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and with the packages of this one but not its lockstep."""
    where = tmp_path_factory.mktemp("environment")
    venv.create(where)
    python = where / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = (where / "lib").glob("python3*/site-packages")
    # A folder named in a .pth file: the .pth files in it, among them that of an editable lockstep, are not read.
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As a user of the environment would: nothing leads to the repository."""
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    return subprocess.run([python, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder whose owner has things by the names that lockstep's own folders have."""
    for name in ("conf", "recipes", "launchers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a user\\'s own')\n")
    (tmp_path / "conf.py").write_text("raise SystemExit('a user\\'s own')\n")
    (tmp_path / "conf" / "base.yaml").write_text("nonsense: true\n")
    for name in ("recipes/ddp.py", "launchers/torchrun.py"):
        (tmp_path / name).write_text("nonsense = True\n")
    return tmp_path


def test_the_wheel_installs_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"lockstep", f"lockstep-{wheel.name.split('-')[1]}.dist-info"}
    inside = {name.removeprefix("lockstep/") for name in names}
    for part in ("conf", "recipes", "launchers"):
        files = [file for file in (ROOT / part).rglob("*") if file.suffix in (".py", ".yaml")]
        assert {str(file.relative_to(ROOT)) for file in files} <= inside
    assert not [name for name in names if "__pycache__" in name]


def test_a_copied_recipe_runs_from_the_wheel_beside_folders_of_those_names(installed: Path, crowded: Path) -> None:
    copied = run(installed, "-m", "lockstep", "new", "my", cwd=crowded)
    assert copied.returncode == 0, copied.stderr
    done = run(installed, "my.py", *SHORT, "out=run", cwd=crowded)
    assert done.returncode == 0, done.stderr
    result = json.loads((crowded / "run" / "result.json").read_text())
    assert (result["recipe"], result["status"]) == ("my", "finished")
    assert "python -m lockstep.recipes.single" in done.stdout, "what is suggested next can be typed here"
    assert str(ROOT) not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_file_of_the_wheel_copied_by_hand_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    source = run(installed, "-c", "import lockstep; print(lockstep.__path__[0])", cwd=tmp_path).stdout.strip()
    (tmp_path / "my.py").write_text(Path(source, "recipes", "ddp.py").read_text())
    done = run(installed, "my.py", *SHORT, "start=spawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_a_recipe_of_the_wheel_is_a_module(installed: Path, crowded: Path) -> None:
    for start in ("fork", "spawn"):
        done = run(installed, "-m", "lockstep.recipes.ddp", *SHORT, f"start={start}", f"out={start}", cwd=crowded)
        assert done.returncode == 0, done.stderr
    words = ["--standalone", "--nproc-per-node=2", "-m", "lockstep.recipes.ddp", *SHORT, "out=torchrun"]
    done = run(installed, "-m", "torch.distributed.run", *words, cwd=crowded)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_command_of_the_wheel_answers_in_its_own_names(installed: Path, crowded: Path) -> None:
    done = run(installed, "-m", "lockstep.recipes.single", "nproc=2", cwd=crowded)
    assert done.returncode == 2
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    listed = run(installed, "-m", "lockstep", "recipes", cwd=crowded)
    assert "python -m lockstep.recipes.NAME" in listed.stdout
    assert all(f"  {name} " in listed.stdout for name in list_recipes())


def test_a_recipe_is_one_module_under_both_names() -> None:
    import launchers.slurm
    import lockstep.launchers.slurm
    import lockstep.recipes.ddp
    import recipes.ddp
    from recipes import ddp

    assert recipes.ddp is lockstep.recipes.ddp is ddp
    assert launchers.slurm is lockstep.launchers.slurm
    assert get_recipe("ddp") is ddp.train
    assert ddp.train.target == "lockstep.recipes.ddp"


def test_importing_lockstep_imports_nothing_heavy() -> None:
    heavy = ["torch", "hydra", "omegaconf", "numpy", "recipes", "launchers", "conf"]
    names = "import lockstep, lockstep.registry, lockstep.launch.launcher, lockstep.__main__"
    script = f"import sys; {names}; print([name for name in {heavy} if name in sys.modules], 'Run' in dir(lockstep))"
    said = command("-c", script, fresh=True)
    assert said.stdout.strip() == "[] True", said.stdout + said.stderr


def test_what_lockstep_exports() -> None:
    import lockstep

    assert lockstep.Run.__module__ == "lockstep.run"
    assert lockstep.Recipe is Recipe
    assert {name for name in lockstep.__all__ if hasattr(lockstep, name)} == set(lockstep.__all__)
    with pytest.raises(AttributeError, match="module 'lockstep' has no attribute 'nothing'"):
        lockstep.nothing  # noqa: B018

    @lockstep.recipe(ranks=1)
    def train(run: lockstep.Run) -> None: ...

    assert (train.ranks, train.config) == (1, Config)


def test_launchers_have_short_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list_launchers() == ["lightning", "slurm", "torchrun"]
    assert launcher_module("slurm") == "lockstep.launchers.slurm"
    assert load_launcher("launchers.torchrun").__name__ == "lockstep.launchers.torchrun", "as older configs have it"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "slurm.py").write_text("def launch(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_launcher("mine.slurm").__name__ == "mine.slurm"


def test_the_recipes_are_listed_without_torch(tmp_path: Path) -> None:
    said = command("-m", "lockstep", "recipes", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout == command("-m", "recipes", cwd=tmp_path).stdout
    assert "  ddp                       DistributedDataParallel: " in said.stdout
    assert {file.stem for file in folder("recipes").glob("[!_]*.py")} == {
        line.split()[0] for line in said.stdout.splitlines() if line.startswith("  ") and line[2] != " "
    }


def test_a_recipe_is_copied_to_start_from(tmp_path: Path) -> None:
    done = command("-m", "lockstep", "new", "mine", "--from", "fsdp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine.py: a copy of recipes/fsdp.py. Run it with: python mine.py\n"
    text = (tmp_path / "mine.py").read_text()
    assert text.replace("mine.py", "-m recipes.fsdp") == (ROOT / "recipes" / "fsdp.py").read_text()
    said = command("mine.py", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "python mine.py " in said.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["new", "taken"], ["taken.py: is there already", "not overwritten"]),
        (["new", "mine", "--from", "dpp"], ["--from dpp: no such recipe; did you mean ddp?", "single, "]),
        (["new", "a/b"], ["a/b: no name of a Python module", "my_ddp"]),
        (["new", "json"], ["json: json.py would hide the module of that name", "my_ddp"]),
        (["new"], ["NAME", "--help"]),
        (["knew"], ["knew", "recipes", "new"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_copied_is_refused_in_one_line(words: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken.py").write_text("mine = True\n")
    done = command("-m", "lockstep", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in parts), done.stderr
    assert os.listdir(tmp_path) == ["taken.py"]
    assert (tmp_path / "taken.py").read_text() == "mine = True\n"
