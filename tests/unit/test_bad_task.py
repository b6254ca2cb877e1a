"""A task that cannot be trained is refused in one line that says what to change; nothing is created."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import ddp, single
from tests.helpers.command_line import assert_one_line, run_main

HEAD = """
from dataclasses import dataclass, field
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset


@dataclass
class Fine:
    hidden: int = 4
    kind: str = "a"

    def __post_init__(self):
        x = torch.arange(32.0).view(16, 2) / 32
        self.train_set = self.eval_set = TensorDataset(x, x.sum(1, keepdim=True))

    def build_model(self):
        return nn.Sequential(nn.Linear(2, self.hidden), nn.Linear(self.hidden, 1))

    def loss(self, outputs, targets):
        return mse_loss(outputs, targets)


class NoLoss:
    def build_model(self):
        pass


class NoData(Fine):
    def __post_init__(self):
        self.train_set = None


class NoLength(Fine):
    def __post_init__(self):
        class Rows:
            def __getitem__(self, index):
                return index
        self.train_set = Rows()


class Needs:
    def __init__(self, path):
        pass
    build_model = loss = lambda self: None


class Raises(Fine):
    def __post_init__(self):
        raise FileNotFoundError("no such table: rows.csv")


class NotOneNumber(Fine):
    def loss(self, outputs, targets):
        return (outputs - targets).square()


class Misfit(Fine):
    def loss(self, outputs, targets):
        return mse_loss(outputs @ outputs, targets)


class NoModel(Fine):
    def build_model(self):
        return list(super().build_model())


class NoGradient(Fine):
    def loss(self, outputs, targets):
        return mse_loss(outputs.detach(), targets)


class TooLate(Fine):
    def __post_init__(self):
        super().__post_init__()
        self.best, self.lower_is_better = "mae", ("mae",)


class Ragged(Fine):
    def __post_init__(self):
        self.train_set = [(torch.zeros(n % 3 + 1), torch.zeros(1)) for n in range(16)]


class NoTensor(Fine):
    def __post_init__(self):
        self.train_set = [("a word", torch.zeros(1)) for n in range(16)]


class OtherNames(Fine):
    def metrics(self, outputs, targets):
        return {f"of_{dist.get_rank()}": (outputs.sum(), len(outputs))}


class OtherData(Fine):
    def __post_init__(self):
        super().__post_init__()
        if dist.is_initialized() and dist.get_rank():
            self.train_set = TensorDataset(torch.ones(16, 2), torch.ones(16, 1))


class Averages(Fine):
    def torchmetrics(self):
        from torchmetrics import PearsonCorrCoef
        return {"r": PearsonCorrCoef()}


class CannotMake(Fine):
    def torchmetrics(self):
        from torchmetrics.classification import MulticlassAUROC
        return {"auroc": MulticlassAUROC(num_classes=-1)}


class Wraps(Fine):
    def torchmetrics(self):
        from torchmetrics import MeanSquaredError, MinMaxMetric
        return {"mse": MinMaxMetric(MeanSquaredError())}


class OtherWay(Fine):
    def torchmetrics(self):
        from torchmetrics import MeanSquaredError
        return {"mse": MeanSquaredError()}


class NoMetric(Fine):
    def torchmetrics(self):
        return {"mse": mse_loss}


class NoPictures(Fine):
    def mistakes(self, outputs, targets):
        return torch.stack([torch.arange(len(targets))], 1)

    def pictures(self, samples):
        return torch.zeros(len(samples), 28, 28)


class PicturesOfNothing(Fine):
    def pictures(self, samples):
        return torch.zeros(len(samples), 3, 28, 28, dtype=torch.uint8)


class NoRows(NoPictures):
    pictures = None


@dataclass
class Weights(Fine):
    weights: list[float] = field(default_factory=list)
    as_list: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.sample_weights = self.weights if self.as_list else torch.tensor(self.weights)


@dataclass
class Required(Fine):
    path: str = None
"""
SHORT = ("global_batch_size=4", "max_steps=1", "data.workers=0")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tasks") / "my_tasks.py"
    found.write_text(HEAD)
    (found.parent / "broken.py").write_text("import torch\n\nnothing = undefined\n")
    return found


BEFORE: dict[str, tuple[list[str], list[str]]] = {
    "no file": (["task=nowhere.py:Fine"], ["nowhere.py:Fine: no such file", "FILE.py:Class"]),
    "no class": (["task=FILE:Fin"], ["has no class Fin", "Fine"]),
    "no class named": (["task=FILE"], ["names no class; write task=", ":Fine"]),
    "no module": (["task=no_such_package.module:Fine"], ["no module no_such_package"]),
    "not a task": (["task=langage"], ["task=langage: did you mean language?"]),
    "an error in the file": (["task=BROKEN:Fine"], ["cannot be imported: NameError", "broken.py, line 3"]),
    "no loss": (["task=FILE:NoLoss"], ["NoLoss has no method loss"]),
    "no data": (["task=FILE:NoData"], ["task=NoData: has no train_set"]),
    "no length": (["task=FILE:NoLength"], ["its train_set, a Rows, has no __len__"]),
    "arguments": (["task=FILE:Needs"], ["Needs(path) takes arguments that no key can set; make it a dataclass"]),
    "its own error": (["task=FILE:Raises"], ["cannot be made: FileNotFoundError: no such table: rows.csv", "line"]),
    "a metric that is not exact": (
        ["task=FILE:Averages"],
        ["torchmetrics()['r']: PearsonCorrCoef reduces its state", "allowed are sum from zero, cat, min and max"],
    ),
    "a metric that cannot be made": (["task=FILE:CannotMake"], ["torchmetrics() failed: ValueError: ", "num_classes"]),
    "a metric of metrics": (["task=FILE:Wraps"], ["['mse']: MinMaxMetric wraps other metrics; hand in each of those"]),
    "a metric's direction": (
        ["task=FILE:OtherWay"],
        ["['mse']: MeanSquaredError is better when smaller; add it to the task's lower_is_better"],
    ),
    "no metric": (["task=FILE:NoMetric"], ["torchmetrics()['mse'] is function; allowed is a torchmetrics.Metric"]),
    "no pictures": (
        ["task=FILE:NoPictures"],
        ["pictures([0]) gave float32 [1, 28, 28]; allowed is uint8 [1, 3, H, W]"],
    ),
    "pictures of nothing": (
        ["task=FILE:PicturesOfNothing"],
        ["mistakes(outputs, targets) found, but it has no mistakes"],
    ),
    "said by the instance": (
        ["task=FILE:TooLate"],
        ["task=TooLate: self.best = 'mae' comes too late; write it into the class", "best = 'mae'"],
    ),
    "too few weights": (
        ["task=FILE:Weights", "task.weights=[1,2]"],
        ["task=Weights: sample_weights is float32 [2] for 16 samples; allowed is a tensor with one number from 0 up"],
    ),
    "a list of weights": (["task=FILE:Weights", "task.as_list=true"], ["sample_weights is [] for 16 samples"]),
    "a negative weight": (
        ["task=FILE:Weights", f"task.weights={[-1.0] + 15 * [2.0]}".replace(" ", "")],
        ["sample_weights has numbers from -1 to 2; allowed"],
    ),
    "no weight": (
        ["task=FILE:Weights", f"task.weights={16 * [0.0]}".replace(" ", "")],
        ["sample_weights has numbers from 0 to 0; allowed", "not all of them 0"],
    ),
    "another type": (["task=FILE:Fine", "task.hidden=wide"], ["task.hidden", "'wide'", "Integer"]),
    "a misspelt field": (["task=FILE:Fine", "task.hiden=8"], ["unknown key task.hiden; did you mean task.hidden?"]),
    "another task's model": (
        ["task=FILE:Fine", "model=resnet50"],
        ["model=resnet50: model belongs to task=images", "task.hidden, task.kind"],
    ),
    "a batch too large": (["task=FILE:Fine", "global_batch_size=17"], ["has only 16 samples; allowed are 1…16"]),
}


@pytest.mark.parametrize("name", BEFORE)
def test_it_is_refused_before_anything_starts(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, parts = BEFORE[name]
    monkeypatch.chdir(tmp_path)
    words = [word.replace("FILE", str(file), 1).replace("BROKEN", str(file.with_name("broken.py"))) for word in words]
    words = [*(word for word in SHORT if word.partition("=")[0] not in "".join(words)), *words]
    assert run_main(single.train, words, monkeypatch) == 2
    assert_one_line(capfd, parts)
    assert not list(tmp_path.iterdir())


AT_FIRST: dict[str, tuple[str, list[str]]] = {
    "NotOneNumber": (
        "nproc=2",
        ["gave float32 [2, 1], and a loss is one number", "take its mean", "outputs float32 [2, 1]"],
    ),
    "Misfit": (
        "nproc=2",
        ["loss(outputs, targets) failed: RuntimeError", "outputs float32 [2, 1], targets float32 [2, 1]"],
    ),
    "NoModel": ("nproc=2", ["build_model() gave [Linear, Linear]", "allowed is a torch.nn.Module"]),
    "NoGradient": ("nproc=2", ["gave a number without a gradient", "without detach", "outputs float32 [2, 1]"]),
    "Ragged": ("nproc=2", ["these samples cannot be stacked into a batch", "collate(samples)"]),
    "NoTensor": ("nproc=2", ["the inputs hold no tensor"]),
    "OtherNames": ("eval_batch_size=4", ["rank 1's metrics are of_1 []", "rank 0's of_0 []", "the same on all ranks"]),
    "NoRows": (
        "nproc=2",
        ["mistakes(outputs, targets) gave int64 [16, 1]; allowed is int64 [N, 3]", "-1 if it is right"],
    ),
    "OtherData": ("nproc=2", ["rank 1", "has other samples to train on than rank 0", "must be the same on all hosts"]),
}


@pytest.mark.slow_except("Misfit")
@pytest.mark.parametrize("name", AT_FIRST)
def test_what_only_training_shows_is_one_line_too(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    word, parts = AT_FIRST[name]
    words = [*SHORT, word, f"task={file}:{name}", f"out={tmp_path / 'run'}"]
    assert run_main(ddp.train, words, monkeypatch) == 2
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    for part in parts:
        assert part in errors[0], said
