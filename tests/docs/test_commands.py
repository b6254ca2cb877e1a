"""Every command that the README and the pages of docs/ show runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.harness import ROOT, clean_environment, command
from tests.ranks.test_transfer import COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> list[str]:
    """Every command of a page's console blocks; `#` starts a comment."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(shlex.split(line[2:], comments=True)) for line in lines if line.startswith("$ ")]


def documented_commands() -> list[str]:
    """Those of all pages, each once."""
    return list(dict.fromkeys(line for page in PAGES for line in commands_of(page)))


TRAINS = "-m recipes."
MEASURES = "recipes.doctor hardware"
SHORT = [
    "max_steps=2",
    "data.augment=false",
]  # a documented command trains for a minute; that it starts and ends is tested

REAL = "python -m recipes.ddp"  # with the network that it says; in the other commands a narrow one stands for it
# The other commands that train are `slow`: their techniques have tests of their own, and so has torchrun
# (tests/ranks/test_start_paths.py).
QUICK = {"python -m recipes.ddp", "python -m recipes.ddp +cluster=lightning"}
# What goes together, or is minutes of work: other tests in tests/ranks run the very same.
ELSEWHERE = {
    "python -m recipes.verify",  # test_verify.py
    f"python -m {MEASURES} +cluster=slurm cluster.nodes=2 cluster.tasks_per_node=8 out=ours",  # test_hardware_profile.py
    "python -m recipes.plan hardware=ours/hardware.yaml gpus=64 task=language model=1b",  # test_hardware_profile.py
    "python -m mlperf_logging.compliance_checker --ruleset 4.0.0 outputs/mine/mllog.txt",  # test_mllog.py
    "python -m recipes.ddp out=outputs/mine logger=mllog logger.mlperf.submission_benchmark=resnet "
    "logger.mlperf.submission_division=open logger.mlperf.submission_status=research "
    "logger.mlperf.submission_org=us logger.mlperf.submission_platform=laptop",  # test_mllog.py
    "eval '$(python -m lockstep completion)'",  # unit/test_completion.py
    "python -m recipes.verify against=archive/verify.json",  # test_verify.py
    "python -m recipes.verify task=examples/tabular.py:Diabetes",  # test_own_tasks_in_tools.py
    "python -m recipes.verify 'recipes=[my_recipe.py]'",  # test_own_tasks_in_tools.py
    "python examples/two_optimizers.py",  # test_examples.py
    "python -m recipes.compare outputs/ddp/A outputs/fsdp/B",  # unit/test_finished_runs.py
    "python examples/by_hand.py",  # test_by_hand.py
    "torchrun --nproc-per-node=2 examples/by_hand.py --checkpoint two.pt",  # test_by_hand.py
    shlex.join(
        shlex.split(
            "python -m recipes.verify program='torchrun --nproc-per-node=2 train.py' against='python train.py --single'"
        )
    ),  # test_your_program.py
} | {shlex.join(shlex.split(line)) for line in COMMANDS}  # test_transfer.py


def test_the_commands_named_here_are_documented() -> None:
    assert set(documented_commands()) >= ELSEWHERE | QUICK


def test_the_readme_is_short() -> None:
    """A screen and a half: what does not fit is a page of docs/."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


def test_the_korean_readme_shows_the_same() -> None:
    """Commands, code and recipes to the character; its links are the English one's, and those to the two languages."""
    english, korean = ((ROOT / name).read_text() for name in ("README.md", "README.ko.md"))
    blocks = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    assert blocks.findall(korean) == blocks.findall(english)
    rows = re.compile(r"^\| \[`\w+`\]\(\S+\)", re.MULTILINE)
    assert rows.findall(korean) == rows.findall(english)
    for link in re.findall(r"\]\(([^)#]+)", korean):
        assert (ROOT / link).exists(), link


def is_long(line: str) -> bool:
    """Whether it is a minute's work also with two steps: many runs, a plan of many rows, a cluster's preflight, a profile."""
    return any(f"recipes.{tool}" in line for tool in ("compare", "doctor +cluster", "doctor hardware", "plan", "tune"))


def command_cases() -> list[Any]:
    lines = [line for line in documented_commands() if not line.startswith("make ") and line not in ELSEWHERE]
    trains = [TRAINS in line and "--help" not in line and "--cfg" not in line for line in lines]
    return [
        pytest.param(
            line, marks=[] if line in QUICK or not slow else pytest.mark.soak if is_long(line) else pytest.mark.slow
        )
        for line, slow in zip(lines, trains, strict=True)
    ]


@pytest.mark.parametrize("line", command_cases())
def test_every_command_of_the_documents_runs(line: str, tmp_path: Path) -> None:
    words = [word.replace("task=examples/", f"task={ROOT}/examples/") for word in shlex.split(line)]
    if "task=" in line:  # its data are its own
        words.append(SHORT[0])
    elif TRAINS in line and MEASURES not in line and "--help" not in words and "--cfg" not in words:
        words += SHORT[1:] if "profile=" in line else SHORT  # what is profiled must be less than the run
        words += ["tune.trials=2"] if "tune.trials=" in line else []  # each is a training
    if words[0] == "python":
        if TRAINS in line and line != REAL and "--help" not in words and "--cfg" not in words:
            words[1:2] = ["-m", "tests.helpers.quick"]
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
    if line == REAL:  # without out= the folder is named by recipe and time, and the summary says so
        (run,) = (tmp_path / "outputs" / "ddp").iterdir()
        assert f"outputs/ddp/{run.name}" in done.stdout
        assert (run / "model.pt").is_file()


def test_the_make_targets_exist() -> None:
    makes = [line.split()[1] for line in documented_commands() if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(makes)
    for target in makes:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def code_of_the_readme(name: str) -> str:
    """The Python block in which `name` is defined."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if name in block)


def test_the_loop_of_the_readme_is_ddp_s() -> None:
    def lines(text: str) -> list[str]:
        return [line.partition("  #")[0].rstrip() for line in text.splitlines() if line.startswith("    ")]

    whole = (ROOT / "recipes" / "ddp.py").read_text()
    theirs = [line for line in lines(whole[whole.index("def train(") :]) if line.strip()]
    hook = ["    if run.config.comm in COMPRESS:", "        model.register_comm_hook(None, COMPRESS[run.config.comm])"]
    mine = [line for line in lines(code_of_the_readme("def train")) if line.strip()]
    assert mine == [line for line in theirs if line not in hook and line != "    train.main()"]


def test_the_task_of_the_readme_trains(tmp_path: Path) -> None:
    head = "import torch\nfrom dataclasses import dataclass\nfrom torch import Tensor, nn\n"
    head += "from torch.nn import functional as F\nfrom torch.utils.data import TensorDataset\n\n"
    (tmp_path / "mine.py").write_text(head + code_of_the_readme("class MyTask"))
    words = ["task=mine.py:MyTask", "task.hidden=128", "max_steps=2", "out=run"]
    done = command("-m", "recipes.ddp", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.pt").is_file()
