"""`recipes.verify` says that every recipe computes what `single` does, and says so of a broken one by its name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from lockstep.data import sampler
from lockstep.distributed.sync_batchnorm import SyncBatchNorm
from lockstep.verify.museum.of_tutorials import TUTORIALS
from lockstep.verify.report import verify_tables
from lockstep.verify.rows import VerifyRow, rounding_of
from lockstep.verify.trace import Trace, angle, difference, smooth_relu
from recipes import verify
from tests.helpers.changed_recipe import put_changed_recipe
from tests.helpers.harness import command, execute, preload, verify_rows

pytestmark = pytest.mark.usefixtures("narrow")

PROVEN = [
    "activation_checkpointing",
    "activation_checkpointing",
    "activation_checkpointing",
    "comm_hooks",
    "context_parallel",
    "context_parallel by=ulysses",
    "data_parallel",
    "ddp",
    "deepspeed_zero",
    "expert_parallel",
    "expert_parallel balance=bias",
    "fsdp",
    "grad_accumulation",
    "lightning_fabric",
    "lightning_fabric",
]
PROVEN += [
    "lightning_trainer",
    "lightning_trainer",
    "local_sgd",
    "lora",
    "model_parallel",
    "parallel_mesh",
    "parallel_mesh tensor=1 context=2",
    "pipeline_parallel",
    "sync_batchnorm",
]
PROVEN += ["tensor_parallel", "tensor_parallel sequence_parallel=true", "transfer_learning", "transfer_learning"]
PROVEN += ["zero1", "zero1"]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_recipe_is_proven_by_the_command(tmp_path: Path) -> None:
    done = command("-m", "recipes.verify", "out=run", cwd=tmp_path, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    check_rows(tmp_path / "run")


@pytest.mark.slow
def test_every_recipe_is_proven(tmp_path: Path) -> None:
    """As the command does it, on a narrow model."""
    for package in ("deepspeed_zero", "lightning_trainer"):
        preload(importlib.import_module(f"recipes.{package}").train)
    execute(verify.train, tmp_path / "run", 2, timeout=300)
    check_rows(tmp_path / "run")


def check_rows(out: Path) -> None:
    rows = verify_rows(out)
    unable = [row for row in rows if row["verdict"].startswith("not run")]
    assert [(row["recipe"], row["precision"]) for row in unable] == [("deepspeed_zero", "fp64")]
    rows = [row for row in rows if row not in unable]
    proofs = [row for row in rows if not row["verdict"].startswith("differs")]
    second = (
        "context_parallel by=ulysses",
        "expert_parallel balance=bias",
        "parallel_mesh tensor=1 context=2",
        "tensor_parallel sequence_parallel=true",
    )
    precisions = {"deepspeed_zero": ["fp32"]} | {name: ["fp64"] for name in second}
    expected = [
        (name.partition(" ")[0], precision) for name in PROVEN for precision in precisions.get(name, ["fp64", "fp32"])
    ]
    assert [(row["recipe"], row["precision"]) for row in proofs] == expected
    assert all(row["verdict"] == "equal" for row in proofs)
    assert all(row["weights"] <= 1e-10 and row["loss"] <= 1e-10 for row in proofs if row["precision"] == "fp64")
    rounded = [row for row in proofs if row["precision"] == "fp32"]
    # How much depends on the processor's instructions: max pooling may choose another of two nearly equal numbers.
    assert all(row["loss"] <= row["allowed"]["loss"] <= 1e-4 for row in rounded)
    assert all(row["weights"] <= row["allowed"]["weights"] <= 1e-2 for row in rounded)
    assert [row["weights"] <= 1e-5 for row in rounded if row["recipe"] == "deepspeed_zero"] == [True]
    measured = [row for row in rows if row not in proofs]
    names = [
        "activation_checkpointing",
        "comm_hooks",
        "data_parallel",
        "ddp",
        "deepspeed_zero",
        "fsdp",
        "grad_accumulation",
        "local_sgd",
        "pipeline_parallel",
        "zero1",
    ]
    assert [row["recipe"] for row in measured] == names
    assert all(row["loss"] > 1e-3 for row in measured), "a batch norm that does differ: the comparison can see it"


FOUR = "ddp,zero1,comm_hooks,local_sgd,lora,tensor_parallel,grad_accumulation,activation_checkpointing"


@pytest.mark.slow_except("3")
@pytest.mark.soak_for(f"4-{FOUR}")
@pytest.mark.parametrize(
    ("world_size", "names", "words"),
    [
        (3, "ddp,sync_batchnorm", ()),
        (4, "pipeline_parallel,fsdp,context_parallel,expert_parallel", ("replicate=2",)),
        (4, "parallel_mesh", ("replicate=2",)),
        (4, FOUR, ("task=language", "threads=1")),
    ],
)
def test_on_other_numbers_of_ranks(world_size: int, names: str, words: tuple[str, ...], tmp_path: Path) -> None:
    all_words = (f"recipes=[{names}]", "max_steps=2", "precision=fp64", *words)
    execute(verify.train, tmp_path / "run", world_size, *all_words, timeout=400)
    rows = verify_rows(tmp_path / "run")
    assert {row["recipe"] for row in rows} == set(names.split(","))
    assert all((row["verdict"], row["ranks"]) == ("equal", world_size) for row in rows)


def test_a_recipe_that_these_ranks_cannot_run_is_named_and_not_called_equal(tmp_path: Path) -> None:
    execute(verify.train, tmp_path / "run", 1, "recipes=[pipeline_parallel]")
    rows = verify_rows(tmp_path / "run")
    assert all(row["verdict"].startswith("not run: stages=2") for row in rows)


def test_a_precision_that_a_recipe_lacks_is_not_called_equal(tmp_path: Path) -> None:
    execute(verify.train, tmp_path / "run", 2, "recipes=[deepspeed_zero]", "precision=fp64")
    rows = verify_rows(tmp_path / "run")
    assert [row["verdict"][:24] for row in rows] == ["not run: precision=fp64:"]


def test_the_next_run_says_what_has_changed_since(tmp_path: Path) -> None:
    words = ("recipes=[ddp]", "max_steps=1", "precision=fp64")
    execute(verify.train, tmp_path / "before", 2, *words)
    record = json.loads((tmp_path / "before" / "verify.json").read_text())
    (host,) = record["hosts"].values()
    assert (host["packages"]["torch"], host["python"]) == (metadata.version("torch"), platform.python_version())
    assert (record["training"]["ranks"], record["rows"][0]["seconds"] > 0) == (2, True)
    host["packages"]["torch"], record["rows"][0]["verdict"] = "1.0", "OFF: loss"
    (tmp_path / "old.json").write_text(json.dumps(record))
    execute(verify.train, tmp_path / "run", 2, *words, f"against={tmp_path}/old.json")
    found = json.loads((tmp_path / "run" / "verify.json").read_text())["against"]
    assert found["facts"] == [["torch", "1.0", metadata.version("torch")]]
    assert found["rows"] == ["was OFF, is equal: ddp in fp64 (model.norm=group)"]
    said = (tmp_path / "run" / "verify.txt").read_text()
    assert "in fp64, trains correctly here: ddp\n" in said
    assert found["rows"][0] in said


# Broken on purpose


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a changed copy of a recipe in its place, for this process and the ranks it forks."""

    return partial(put_changed_recipe, monkeypatch)


@pytest.mark.slow_except(
    "one all-reduce left out", "a stage's gradient of the wrong size", "BatchNorm left unsynchronised"
)
@pytest.mark.parametrize("mistake", TUTORIALS)
def test_a_broken_recipe_is_named(mistake: str, replace: Any, tmp_path: Path) -> None:
    name, old, new = TUTORIALS[mistake]
    replace(name, old, new)
    precision = "fp32" if name == "deepspeed_zero" else "fp64"
    with pytest.raises(AssertionError, match=f"not the training that recipes.single computes: {name} in {precision}"):
        execute(verify.train, tmp_path / "run", 2, f"recipes=[{name}]", "max_steps=2", f"precision={precision}")
    rows = verify_rows(tmp_path / "run")
    assert any(row["verdict"].startswith("OFF: ") for row in rows)


@pytest.mark.slow
def test_synchronising_in_evaluation_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forward = SyncBatchNorm.forward

    def always_training(self: SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
        mode, self.training = self.training, True
        y = forward(self, x)
        self.training = mode
        return y

    monkeypatch.setattr(SyncBatchNorm, "forward", always_training)
    with pytest.raises(AssertionError, match="sync_batchnorm in fp64"):
        # Equal evaluation batches on both ranks: with unequal ones this mistake hangs, which is how it is usually met.
        execute(
            verify.train,
            tmp_path / "run",
            2,
            "recipes=[sync_batchnorm]",
            "precision=fp64",
            "max_steps=2",
            "eval_batch_size=180",
        )


def test_padded_evaluation_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def padded(self: sampler.EvalSampler) -> Iterator[tuple[int, torch.Tensor]]:
        for number in self.numbers():  # the last batch filled up from the start, as DistributedSampler does
            yield number, torch.arange(number * self.batch_size, (number + 1) * self.batch_size) % self.size

    monkeypatch.setattr(sampler.EvalSampler, "__iter__", padded)
    with pytest.raises(AssertionError, match="ddp in fp64: RuntimeError: evaluation counted 384 samples of 360"):
        execute(verify.train, tmp_path / "run", 2, "recipes=[ddp]", "max_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_may_differ_by_what_rounding_explains(precision: str, replace: Any, tmp_path: Path) -> None:
    words = ("recipes=[ddp]", "max_steps=2", f"precision={precision}")
    execute(verify.train, tmp_path / "sound", 2, *words)
    replace("ddp", "scaler.scale(loss * micro.weight)", "scaler.scale(loss * micro.weight * 0.7)")
    with pytest.raises(AssertionError, match=f"ddp in {precision} .*the gradient of"):
        execute(verify.train, tmp_path / "broken", 2, *words)
    (sound,), (broken,) = (verify_rows(tmp_path / name) for name in ("sound", "broken"))
    assert sound["verdict"] == "equal"
    assert sound["weights"] <= sound["allowed"]["weights"] <= 0.4
    verdict, _, numbers = broken["verdict"].partition(": ")
    assert verdict == "OFF"
    assert {"gradients", "weights"} <= set(numbers.split(", "))


def test_a_model_that_cannot_compute_in_fp64_is_held_to_a_fixed_bound() -> None:
    row = VerifyRow("ddp", "fp32", 2, 3)
    row.allow_rounding({})
    assert row.allows("weights") == 1e-2
    row.allow_rounding({"loss": 0.0, "weights": 2e-5})
    assert row.allows("loss") == pytest.approx(4 * 2**-23), "the last bit of a number"
    assert row.allows("weights") == pytest.approx(8e-5)


def test_a_loss_that_is_exact_by_chance_is_allowed_what_its_weights_explain() -> None:
    start, whole = {"a": torch.zeros(2)}, {"a": torch.tensor([3.0, 4.0])}
    exact = Trace([3.0, 2.0], {}, whole, {}, {"eval_loss": 1.5}, start)
    rounded = Trace([3.0, 2.0], {}, {"a": whole["a"] + torch.tensor([0.0, 5e-3])}, {}, {"eval_loss": 1.5}, start)
    found = rounding_of(rounded, exact, "fp16")
    assert found["weights"] == pytest.approx(1e-3, rel=1e-2)
    assert found["loss"] == found["evaluation"] == pytest.approx(1e-3, rel=1e-2), "from 3 to 1.5, as much as is left"
    found = rounding_of(rounded, exact, "fp32")
    assert found["loss"] == found["evaluation"] == 4 * 2**-23, "of what was not measured, so many bits at most"
    found = rounding_of(rounded, Trace([3.0, 3.0], {}, whole, {}, {"eval_loss": 3.0}, start), "fp32")
    assert found["evaluation"] == 0.5, "what is measured, where it is more"


def test_relu_is_smooth_within_and_itself_after() -> None:
    x = torch.linspace(-2, 2, 5)
    with smooth_relu():
        assert all(torch.equal(each, functional.silu(x)) for each in (torch.nn.ReLU()(x), functional.relu(x), x.relu()))
    assert torch.equal(torch.nn.ReLU()(x), x.clamp(min=0))


def test_differences_see_what_is_missing_or_not_a_number() -> None:
    ones, twos = {"a": torch.ones(3)}, {"a": torch.ones(3) * 2}
    assert difference(ones, ones) == 0
    assert difference(twos, ones) == pytest.approx(1.0)
    assert difference({}, ones) == difference({"a": torch.full((3,), float("nan"))}, ones) == float("inf")
    assert angle(twos, ones) == pytest.approx(1.0), "the same direction, and twice as long"
    assert angle(ones, ones) == pytest.approx(0.0, abs=1e-12)
    assert angle({"a": -torch.ones(3)}, ones) == pytest.approx(2.0)


@pytest.mark.soak
def test_every_recipe_is_proven_with_clipped_gradients(tmp_path: Path) -> None:
    """All keys go to both sides; the gradients' norm is above this limit in each step."""
    for package in ("deepspeed_zero", "lightning_trainer"):
        preload(importlib.import_module(f"recipes.{package}").train)
    execute(verify.train, tmp_path / "run", 2, "gradients.clip_norm=0.3", "gradients.log=true", timeout=400)
    check_rows(tmp_path / "run")


def test_the_table_shows_a_proof_s_settings_with_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """They look like rich's markup, which would swallow them."""
    row = VerifyRow("transfer_learning", "fp64", 2, 5, loss=0.0, variant="freeze=[layer1.*]")
    console = Console(width=80)
    for table in verify_tables([row]):
        console.print(table)
    assert "freeze=[layer1.*]" in capsys.readouterr().out
