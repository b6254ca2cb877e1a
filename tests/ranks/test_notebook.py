"""A recipe started from Python: in a script, and in a real Jupyter kernel, where neither recipe nor task has a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from lockstep.errors import UserError
from lockstep.launch.recipe_process import RecipeFailed
from recipes import ddp, single
from tests.helpers.harness import ROOT, clean_environment

CELLS = [
    """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset
from torch.nn.parallel import DistributedDataParallel
from lockstep import Run, recipe
from lockstep.recipes import single
from lockstep.training.optim import build_optimizer

@dataclass
class Sums:
    hidden: int = 8

    def __post_init__(self):
        x = torch.rand(48, 4, generator=torch.Generator().manual_seed(0))
        self.train_set = TensorDataset(x, x.sum(1))
        self.eval_set = self.train_set

    def build_model(self):
        return nn.Sequential(nn.Linear(4, self.hidden), nn.Linear(self.hidden, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return mse_loss(outputs, targets)

@recipe
def mine(run: Run):
    model = DistributedDataParallel(run.place(run.task.build_model()))
    optimizer = build_optimizer(run.config.optim, model)
    for batch in run.steps(model=model, optimizer=optimizer):
        loss = run.task.loss(model(batch.inputs), batch.targets)
        loss.backward()
        run.record(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
""",
    "torch.ones(512, 512) @ torch.ones(512, 512)  # this process has threads now, and could start no ranks by forking",
    """
words = dict(task=Sums, global_batch_size=12, epochs=20, precision="fp64")
found = mine.run("task.hidden=4", nproc=2, **words)
alone = single.train.run("task.hidden=4", "optim.warmup_steps=0", "optim.schedule=constant", **words)
print("RESULT", found["eval_loss"], alone["eval_loss"], len(found.metrics), found["world_size"])
""",
    """
try:
    mine.run(task=Sums, global_batch_size=7, nproc=2)
except Exception as error:
    print("REFUSED", type(error).__name__, error)
try:
    mine.main()
except Exception as error:
    print("NO FILE", error)
""",
]


@pytest.mark.slow
def test_a_recipe_and_a_task_of_a_notebook_s_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks, from a kernel that has threads; its loss is the command's; nothing is left running."""
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        "".join(each.get("text", "") for each in cell.outputs if each.output_type == "stream")
        for cell in notebook.cells
    ]
    numbers = next(line for line in said[2].splitlines() if line.startswith("RESULT")).split()[1:]
    assert float(numbers[0]) < 0.5
    assert float(numbers[0]) == pytest.approx(float(numbers[1]), rel=1e-9)
    assert numbers[3] == "2"
    assert "mine: 2 ranks on 1 host" in said[2]
    assert "step 80/80" in said[2], "it shows how far it is"
    assert "REFUSED UserError global_batch_size=7: the global batch must divide by 2 ranks" in said[3]
    assert "NO FILE mine: is defined in a notebook's cell, and has no file; start it with mine.run()" in said[3]
    assert not [line for line in processes() if str(tmp_path) in line]


def processes() -> list[str]:
    """The environments' working folders and command lines of all processes of this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append(f"{os.readlink(folder / 'cwd')} {(folder / 'cmdline').read_text()}")
        except OSError:
            continue
    return found


def test_a_run_from_a_script_returns_its_result_and_raises_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words: dict[str, Any] = {"data": "synthetic", "model.image_size": 8, "global_batch_size": 8, "max_steps": 2}
    found = single.train.run("data.size=16", out=str(tmp_path / "run"), **words)
    assert found.out == tmp_path / "run"
    assert found["steps"] == 2
    assert dict(found)["status"] == "finished"
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.weights().values())
    with pytest.raises(UserError, match="max_steps=abc"):
        ddp.train.run(max_steps="abc")
    with pytest.raises(UserError, match="name the class"):
        ddp.train.run(task=object())
    (tmp_path / "broken.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Broken:\n"
        "    train_set = torch.utils.data.TensorDataset(torch.zeros(8, 2), torch.zeros(8))\n"
        "    def build_model(self):\n"
        "        return nn.Linear(2, 1)\n"
        "    def loss(self, outputs, targets):\n"
        "        raise KeyError('a mistake of its own')\n"
    )
    with pytest.raises(RecipeFailed, match="a mistake of its own"):
        single.train.run(task=f"{tmp_path}/broken.py:Broken", global_batch_size=4, epochs=1)
