"""Transfer learning: what is frozen stays to the last bit, what is loaded fits or is named, and it pays."""

from __future__ import annotations

import hashlib
import io
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import ResNet18_Weights

from lockstep.config.declared import read_config
from lockstep.config.run_directory import freeze
from lockstep.config.schema import to_yaml
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.models.resnet import build_model
from lockstep.recipe import Recipe
from lockstep.run import Run
from lockstep.training.optim import lr_factor
from recipes import ddp, transfer_learning
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.examples import example, write_text
from tests.helpers.harness import ROOT, assert_equal, command, compose_config, execute, lines, result, run_ranks
from tests.helpers.http_site import Site, serving
from tests.helpers.narrow_resnet import narrow_resnet18

pytestmark = pytest.mark.usefixtures("narrow")

DATA = ("global_batch_size=48", "epochs=2", "log_every=1", "max_steps=16")  # 14 steps per epoch of five digits
LOW, HIGH = "data.classes=[0,1,2,3,4]", "data.classes=[5,6,7,8,9]"
COMMANDS = (  # of docs/recipes.md; the last two differ in the backbone alone
    "python -m recipes.ddp data.classes=[0,1,2,3,4] model.norm=group optim=adamw epochs=8 out=base",
    "python -m recipes.transfer_learning resume=base freeze=[conv1.*,bn1.*,layer1.*,layer2.*,layer3.*] "
    "data.classes=[5,6,7,8,9] model.norm=group optim=adamw optim.warmup_steps=0 max_steps=14 out=transferred",
    "python -m recipes.ddp data.classes=[5,6,7,8,9] model.norm=group optim=adamw optim.warmup_steps=0 max_steps=14 "
    "out=scratch",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits 0 to 4, with a checkpoint at its end."""
    out = tmp_path_factory.mktemp("base") / "run"
    execute(ddp.train, out, 2, *DATA, LOW, "checkpoint.every=16", "checkpoint.best=true")
    return out


def weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def changed(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """The first part of the names of those tensors that are not the same to the last bit."""
    assert mine.keys() == theirs.keys()
    return {
        name.partition(".")[0]
        for name, tensor in theirs.items()
        if mine[name].shape != tensor.shape or not torch.equal(mine[name], tensor)
    }


@pytest.mark.slow_except("model.pt")
@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/step-00000016", "model.pt", "best.pt", "nested.pt"])
def test_only_the_head_changes_whatever_the_backbone_comes_from(source: str, base: Path, tmp_path: Path) -> None:
    """Through several evaluations, after each of which the loop calls model.train(); with other classes."""
    there = weights(base / ("best.pt" if source == "best.pt" else "model.pt"))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in there.items()}}, base / "nested.pt")
    execute(transfer_learning.train, tmp_path / "run", 2, *DATA, "data.classes=[7,8,9]", f"resume={base / source}")
    assert changed(weights(tmp_path / "run" / "model.pt"), there) == {"fc"}
    told = result(tmp_path / "run")
    assert (told["trainable_parameters"], told["resumed_from"]) == (3 * 33, str(base / source))
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 17))


@pytest.mark.slow
def test_what_the_patterns_leave_out_is_trained(base: Path, tmp_path: Path) -> None:
    words = (f"resume={base}", "freeze=[conv1.*,bn1.*,layer1.*,layer3.?.bn*]", "optim=adamw")
    execute(transfer_learning.train, tmp_path / "run", 2, *DATA, HIGH, *words)
    mine, there = weights(tmp_path / "run" / "model.pt"), weights(base / "model.pt")
    assert changed(mine, there) == {"layer2", "layer3", "layer4", "fc"}
    assert all(torch.equal(mine[name], there[name]) for name in mine if name.startswith("layer3") and ".bn" in name)


@pytest.mark.slow
def test_a_frozen_batchnorm_whose_weights_are_trained_is_not_frozen(base: Path, tmp_path: Path) -> None:
    execute(transfer_learning.train, tmp_path / "run", 1, *DATA, HIGH, f"resume={base}", "freeze=[bn1.weight]")
    mine, there = weights(tmp_path / "run" / "model.pt"), weights(base / "model.pt")
    assert torch.equal(mine["bn1.weight"], there["bn1.weight"])
    assert not torch.equal(mine["bn1.running_mean"], there["bn1.running_mean"])


@pytest.mark.slow
def test_a_second_start_goes_on_with_the_run_and_not_with_the_backbone(base: Path, tmp_path: Path) -> None:
    """And needs nothing of it: the checkpoint holds the frozen weights too. Cut before and after the unfreezing."""
    words = (
        *DATA,
        HIGH,
        f"resume={tmp_path / 'copy.pt'}",
        "unfreeze_epoch=1",
        "unfreeze_lr=0.01",
        "checkpoint.every=5",
    )
    shutil.copy(base / "model.pt", tmp_path / "copy.pt")
    execute(transfer_learning.train, tmp_path / "whole", 2, *words)
    execute(transfer_learning.train, tmp_path / "parts", 2, *words, "max_steps=10")
    there = weights(base / "model.pt")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in there.items()}, tmp_path / "copy.pt")
    execute(transfer_learning.train, tmp_path / "parts", 2, *words, "max_steps=15")
    execute(transfer_learning.train, tmp_path / "parts", 2, *words)
    assert result(tmp_path / "parts")["resumed_from"] == "checkpoints/step-00000015"
    assert_equal(weights(tmp_path / "parts" / "model.pt"), weights(tmp_path / "whole" / "model.pt"))
    assert changed(weights(tmp_path / "whole" / "model.pt"), there) > {"conv1", "bn1", "layer4"}
    assert "unfrozen after step 14" in (tmp_path / "whole" / "ranks" / "1.log").read_text()
    for run in ("whole", "parts"):
        told = result(tmp_path / run)
        assert told["trainable_parameters"] == told["parameters"]


# Equal --------------------------------------------------------------------------------------------------------------

PROOF = (*DATA, HIGH, "precision=fp64", "model.norm=group", "weights=random", "optim.warmup_steps=3")


def by_hand(world: World, config: str, out: str) -> dict[str, Tensor]:
    """The head alone for an epoch, then everything: a plain loop on one process, with nothing of the recipe's."""
    run = Run("transfer_learning", read_config(transfer_learning.train, config), world, Path(out))
    model = build_model(run.config.model).double()
    body = [tensor for name, tensor in model.named_parameters() if not name.startswith("fc.")]
    head = [*model.get_submodule("fc").parameters()]
    moments: dict[nn.Parameter, Tensor] = {}
    factor = lr_factor(run.config.optim, run.config.epochs * run.steps_per_epoch)
    for step, batch in enumerate(run.batches(0, run.total_steps)):
        loss = cross_entropy(model(batch.inputs), batch.targets)
        rates = dict.fromkeys(head, 0.02) | dict.fromkeys(body if step >= run.steps_per_epoch else [], 0.005)
        gradients = torch.autograd.grad(loss, list(rates))
        with torch.no_grad():
            for (parameter, rate), gradient in zip(rates.items(), gradients, strict=True):
                moments[parameter] = 0.9 * moments.get(parameter, 0) + gradient + 5e-4 * parameter
                parameter -= rate * factor(step) * moments[parameter]
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_head_first_then_everything_is_what_a_plain_loop_computes(ranks: int, tmp_path: Path) -> None:
    words = (*PROOF, "unfreeze_epoch=1", "unfreeze_lr=0.005")
    config = compose_config(transfer_learning.train, *words, f"out={tmp_path / 'hand'}")
    validate(config, transfer_learning.train, 1)
    out = freeze(config, "transfer_learning")
    theirs = run_ranks(by_hand, 1, to_yaml(config), str(out))[0]
    execute(transfer_learning.train, tmp_path / "run", ranks, *words)
    mine = weights(tmp_path / "run" / "model.pt")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).norm() <= 1e-10 * tensor.norm().clamp(min=1e-3), name


# A task of one's own -------------------------------------------------------------------------------------------------

SMALL = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

@dataclass
class Small:
    layer: str = "linear"
    def __post_init__(self):
        self.train_set = TensorDataset(torch.ones(96, 4), torch.ones(96, 4))
    def build_model(self):
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) if self.layer == "linear" else nn.Sequential(nn.LayerNorm(4))
    def loss(self, outputs, targets):
        return mse_loss(outputs, targets)
"""
OWN_BAD = {
    "weights=imagenet": ["weights=imagenet", "for task=images; task=Small takes resume=PATH"],
    "resume=auto": [
        "weights=null: there is nothing to transfer from; set resume=PATH (a run, a checkpoint or a file of "
    ],
    "weights=random task.layer=norm": ["Sequential: has no Linear and no Conv2d", "recipes.ddp resume=PATH"],
    "weights=random freeze=[conv1.*]": ["conv1.* matches no parameter; they are called 0.weight, 0.bias, 1.weight, "],
    "resume=WEIGHTS": ["holds no 0.bias", "or the keys of your task"],
}


@pytest.mark.parametrize("words", OWN_BAD)
def test_of_a_task_of_ones_own_it_says_in_one_line_what_it_needs(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    torch.save({"0.weight": torch.ones(4, 4)}, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    asked = f"task=small.py:Small {words.replace('WEIGHTS', 'weights.pt')}"
    refused(asked, transfer_learning.train, OWN_BAD[words], monkeypatch, capfd)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_the_head_of_a_gpt_of_ones_own_learns_another_text(tmp_path: Path) -> None:
    """Its last Linear is trained; the rest stays to the last bit. By pattern, all but the first block is."""
    task = (f"task={example('text_gpt.py:TextGpt')}", "task.width=16", "task.depth=2", "global_batch_size=12")
    short = (*task, "max_steps=3", "log_every=1", "optim=adamw", "optim.warmup_steps=0")
    execute(ddp.train, tmp_path / "base", 2, *short, f"task.file={write_text(tmp_path / 'one.txt')}")
    other = f"task.file={write_text(tmp_path / 'other.txt', mirrored=True)}"
    for pattern, left in (("null", {"output"}), ("[blocks.0.*]", {"blocks", "bytes", "norm", "output", "places"})):
        out = tmp_path / str(len(left))
        execute(transfer_learning.train, out, 2, *short, other, f"resume={tmp_path / 'base'}", f"freeze={pattern}")
        there, here = weights(tmp_path / "base" / "model.pt"), weights(out / "model.pt")
        assert changed(here, there) == left
        assert all(torch.equal(here[name], there[name]) for name in here if name.startswith("blocks.0."))
        assert "parameters; head: output.*" in (out / "ranks" / "0.log").read_text()


# What is refused ----------------------------------------------------------------------------------------------------

BAD = {
    "weights=random resume=BASE": ["one of them is too many"],
    "resume=BASE model.image_size=72": ["3 × 3 there and 7 × 7 here", "set model.image_size=64"],
    "resume=BASE model.norm=group": ["holds bn1.num_batches_tracked, which the model has not"],
    "resume=BASE model=resnet34": ["layer1.0.conv1.weight is [32, 64, 3, 3] there"],
    "resume=BASE freeze=[layer5.*]": ["freeze=[layer5.*]", "matches no parameter", "conv1.weight, bn1.weight"],
    "resume=BASE freeze=[layer1]": ["freeze=[layer1]", "layer1 matches no parameter", "* and ?"],
    "resume=BASE freeze=[*]": ["freeze=[*]", "nothing to train"],
    "resume=BASE freeze=[] unfreeze_epoch=1": ["unfreeze_epoch=1", "nothing is frozen"],
    "resume=BASE unfreeze_epoch=15": ["unfreeze_epoch=15", "epochs=15", "below"],
    "resume=BASE unfreeze_epoch=0": ["unfreeze_epoch=0", "from 1 up"],
    "resume=BASE unfreeze_lr=0.1": ["unfreeze_lr=0.1", "set unfreeze_epoch"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_one_line(
    words: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(words.replace("BASE", str(base)), transfer_learning.train, BAD[words], monkeypatch, capfd)
    assert list(tmp_path.iterdir()) == [], "nothing may be created"


def refused(
    words: str,
    recipe: Recipe,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_main(recipe, words.split(), monkeypatch) == 2
    assert_one_line(capfd, parts)


def test_a_damaged_checkpoint_is_named(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "base"
    shutil.copytree(base, run)
    (run / "model.pt").unlink()
    part = next((run / "checkpoints" / "step-00000016").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    config = compose_config(transfer_learning.train, *DATA, HIGH, f"resume={run}")
    with pytest.raises(UserError, match=r"checkpoints/step-00000016: not intact \(__0_0.distcp has \d+ of"):
        validate(config, transfer_learning.train, 2)


# torchvision's weights ----------------------------------------------------------------------------------------------

IMAGENET = ("weights=imagenet", "model.image_size=72", "global_batch_size=4", "max_steps=2", "eval_every=0", HIGH)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A narrow ResNet of 1000 classes where torchvision believes its own are; torch.hub's folder is an empty one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    buffer = io.BytesIO()
    torch.save(narrow_resnet18(1000, nn.BatchNorm2d).state_dict(), buffer)
    name = f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    with serving(buffer.getvalue()) as site:
        url = f"http://127.0.0.1:{site.server_port}/{name}"
        monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
        yield site


@pytest.mark.slow
def test_torchvision_s_weights_are_fetched_once_before_any_rank_starts(published: Site, tmp_path: Path) -> None:
    for number in range(2):
        execute(transfer_learning.train, tmp_path / str(number), 2, *IMAGENET)
    assert len(published.asked) == 1
    (file,) = (tmp_path / "torch" / "hub" / "checkpoints").iterdir()
    assert changed(weights(tmp_path / "0" / "model.pt"), weights(file)) == {"fc"}
    assert result(tmp_path / "0")["resumed_from"] == "imagenet"


def test_what_is_not_torchvision_s_file_is_refused_and_can_be_fetched_again(
    published: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    good = published.archive
    assert good is not None
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for bad in (good[:-1], b"<html>Please log in</html>", None):
        published.archive = bad
        parts = [ResNet18_Weights.IMAGENET1K_V1.url, "could not be fetched", str(tmp_path / "torch"), "resume=FILE"]
        refused(" ".join(IMAGENET), transfer_learning.train, parts, monkeypatch, capfd)
        assert not list(here.iterdir())
    published.archive = good
    execute(transfer_learning.train, tmp_path / "run", 1, *IMAGENET)


def test_without_a_network_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The address is torchvision's own, the way there is closed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", "/tmp/lockstep-no-such-folder")
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and not listening
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        parts = ["https://download.pytorch.org/models/resnet18-f37072fd.pth could not be fetched", "resume=FILE"]
        refused(" ".join(IMAGENET), transfer_learning.train, parts, monkeypatch, capfd)
    assert not list(tmp_path.iterdir())


# What it is good for ------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_documented_commands_beat_training_from_scratch(tmp_path: Path) -> None:
    """On five digits that the backbone has never seen, equal steps: over four seeds 0.66 to 0.75 against 0.20."""
    page = " ".join((ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ").split())
    for line in COMMANDS:
        assert f"$ {line} " in page
        done = command(*shlex.split(line)[1:], cwd=tmp_path, timeout=500)
        assert done.returncode == 0, done.stderr
    found, scratch = (result(tmp_path / run)["eval_accuracy"] for run in ("transferred", "scratch"))
    assert found >= scratch + 0.25
