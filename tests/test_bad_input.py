"""Every bad input: one line that names the value, what is allowed and what to change; exit code 2; nothing created."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from recipes import compare, ddp, doctor, single, tune, verify
from tests.harness import command

NO_GPU = not torch.cuda.is_available()

BAD = {
    "bacth_size=3": ["unknown key bacth_size", "did you mean batch_size?"],
    "optim.lrr=3": ["unknown key optim.lrr", "did you mean optim.lr?"],
    "lr=0.1": ["unknown key lr", "optim.lr"],
    "+foo=1": ["unknown key foo", "--help"],
    "+optim.lrr=1": ["unknown key optim.lrr", "optim.lr"],
    "batch_size=abc": ["batch_size=abc", "whole numbers from 1 up, or auto"],
    "batch_size=null": ["batch_size=None", "whole numbers from 1 up, or auto"],
    "batch_size=1.5": ["batch_size=1.5", "whole numbers from 1 up, or auto"],
    "batch_size=true": ["batch_size=True", "whole numbers from 1 up, or auto"],
    "batch_size=auto accumulate=2000": ["accumulate=2000", "718 images"],
    "batch_size=auto memory_fraction=0": ["memory_fraction=0.0", "above 0, up to 1"],
    "batch_size=auto epochs=0": ["epochs=0", "from 1 up"],
    "batch_size=auto +cluster=slurm cluster.nodes=2": ["batch_size=auto", "srun", "python -m recipes.doctor memory"],
    "memory=all": ["memory=all", "allowed are report"],
    "memory=report compile=true": ["memory=report", "compile=true"],
    "recipes=[ddp]": ["recipes=['ddp']", "recipes.ddp does not use it", "doctor"],
    "compile=maybe": ["compile=maybe", "bool"],
    "optim.lr=fast": ["optim.lr=fast", "Float"],
    "optim.lr=-1": ["optim.lr=-1", "from 0 up"],
    "epochs=0": ["epochs=0", "from 1 up"],
    "max_steps=0": ["max_steps=0", "from 1 up"],
    "timeout_seconds=0": ["timeout_seconds=0", "from 1 up"],
    "batch_size=0": ["batch_size=0", "from 1 up"],
    "seed=-1": ["seed=-1", "from 0 up"],
    "seed=4294967296": ["seed=4294967296", "2**32"],
    "optim.lr=nan": ["optim.lr=nan", "finite"],
    "optim.lr=inf": ["optim.lr=inf", "finite"],
    "data.std=[0,0,0]": ["data.std=", "above 0"],
    "data.num_classes=5": ["data.num_classes=5", "digits has 10"],
    "data.image_size=16": ["data.image_size=16", "8 × 8", "model.image_size"],
    "batch_size=2": ["batch_size=2", "BatchNorm", "model.norm=group"],
    "accumulate=49": ["accumulate=49", "48 images", "1…48"],
    "cut=layer2": ["cut=layer2", "recipes.ddp does not use it", "model_parallel"],
    "stages=2": ["stages=2", "recipes.ddp does not use it", "pipeline_parallel"],
    "nproc=0": ["nproc=0", "from 1 up"],
    "model=resnet19": ["model=resnet19", "allowed are resnet18, resnet34, resnet50, resnet101, resnet152"],
    "data=mnist": ["data=mnist", "digits", "cifar10"],
    "tune=asha": ["tune", "only recipes.tune"],
    "tune.trials=3": ["tune.trials=3", "recipes.ddp does not use it"],
    "optim=adam": ["optim=adam", "sgd", "adamw"],
    "monitor=tb": ["monitor=tb", "csv", "tensorboard"],
    "+debug=all": ["debug=all", "smoke"],
    "+cluster=nowhere": ["cluster=nowhere", "slurm"],
    "cluster=slurm": ["cluster=slurm", "+cluster=slurm"],
    "cluster.nodes=2": ["cluster.nodes=2", "+cluster=slurm"],
    "precision=fp15": ["precision=fp15", "fp32, bf16, fp16, fp64"],
    "model.norm=layer": ["model.norm=layer", "batch, group"],
    "model.init=zero": ["model.init=zero", "kaiming, xavier"],
    "model.num_classes=9": ["model.num_classes=9", "digits has 10 classes", "from 10 up"],
    "model.image_size=4": ["model.image_size=4", "from 8 up"],
    "optim.schedule=step": ["optim.schedule=step", "constant, cosine"],
    "batch_size=33": ["batch_size=33", "2 ranks", "32, 34"],
    "nproc=5": ["batch_size=96", "5 ranks", "95, 100"],
    "batch_size=2000": ["batch_size=2000", "1437"],
    "backend=nccl device=cpu": ["backend=nccl", "gloo"],
    "backend=mpi": ["backend=mpi", "gloo, nccl"],
    "device=tpu": ["device=tpu", "auto, cpu, cuda"],
    "data.mean=[0.5]": ["data.mean", "3 numbers"],
    "data=cifar10": ["data=cifar10", "data.root"],
    "data=cifar10 data.root=nowhere": ["data.root=nowhere", "no such folder"],
    "data=cifar10 data.root=.": ["data.root=.", "cifar-10-batches-bin", "data.download=true"],
    "data=imagefolder data.root=.": ["train", "no such folder", "data.root"],
    "out=/proc/nowhere/run": ["out=/proc/nowhere/run", "cannot be made"],
    "launcher=launchers.magic": ["launcher=launchers.magic", "launchers.torchrun"],
    "batch_size=8,16": ["batch_size=8,16", "--multirun"],
    "batch_size": ["batch_size", "missing EQUAL"],
    "--config-dir=nowhere": ["nowhere", "not found"],
    "resume=somewhere": ["resume=somewhere", "no such file or folder"],
    "resume=.": ["resume=.", "holds no checkpoint"],
    "resume=/dev/null": ["resume=/dev/null", "no such file or folder"],
    "checkpoint.every=0": ["checkpoint.every=0", "from 1 up"],
    "checkpoint.keep=0": ["checkpoint.keep=0", "from 1 up"],
    "patience=0": ["patience=0", "from 1 up"],
    "metric=speed": ["metric=speed", "eval_accuracy, eval_loss, eval_f1"],
    "loss_scale=0.5": ["loss_scale=0.5", "from 1 up"],
    "loss_scale=1024": ["loss_scale=1024", "precision=fp32 scales no loss", "set precision=fp16"],
    "max_restarts=-1": ["max_restarts=-1", "from 0 up"],
    "start=magic": ["start=magic", "auto, spawn, fork"],
    "start=fork +cluster=slurm": ["start=fork", "srun starts"],
    "monitor=[csv,tb]": ["monitor=tb", "csv, wandb, tensorboard"],
    "monitor.images=65": ["monitor.images=65", "0…64"],
    "monitor.histograms=-1": ["monitor.histograms=-1", "from 0 up"],
    "gradients.clip_norm=0": ["gradients.clip_norm=0", "above 0"],
    "gradients.clip_norm=-1": ["gradients.clip_norm=-1", "above 0"],
    "gradients.clip_norm=nan": ["gradients.clip_norm=nan", "finite"],
    "gradients.warn_above=0": ["gradients.warn_above=0", "above 0"],
    "gradients.clip_value=3": ["gradients.clip_value=3", "{fc.*: 0.1}"],
    "gradients.clip_value={fc.*:0}": ["gradients.clip_value.fc.*=0", "above 0"],
    "gradients.clip_value={fc.*:nan}": ["gradients.clip_value.fc.*=nan", "finite"],
    "gradients.clip_value={fc.*:a}": ["gradients.clip_value.fc.*=a", "above 0"],
    "gradients.clip_value={head.*:1}": ["gradients.clip_value.head.*", "none", "conv1.weight", "fc.bias"],
    "+cluster=slurm cluster.partitoin=gpu": ["unknown key cluster.partitoin", "did you mean cluster.partition?"],
    "+cluster=slurm cluster.nodes=0": ["cluster.nodes=0", "from 1 up"],
    "+cluster=slurm nproc=2": ["nproc=2", "cluster.tasks_per_node"],
    "+cluster=slurm cluster.nodes=5": ["batch_size=96", "5 ranks", "95, 100"],
    "+cluster=slurm cluster.gpus_per_node=2 cluster.tasks_per_node=4": ["cluster.tasks_per_node=4", "1…2"],
    "+cluster=slurm device=cpu backend=nccl": ["backend=nccl", "gloo"],
}
if NO_GPU:
    BAD["device=cuda"] = ["device=cuda", "no CUDA device", "device=cpu"]


def run_main(recipe, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:  # type: ignore[no-untyped-def]
    """The exit code of `python -m recipes.NAME WORDS`, in this process: it ends before any rank is started."""
    monkeypatch.setattr(sys, "argv", [recipe.name, *words])
    with pytest.raises(SystemExit) as leaving:
        recipe.main()
    return int(leaving.value.code)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_one_line(words, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert run_main(ddp.train, words.split(), monkeypatch) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    for part in BAD[words]:
        assert part in said.err
    assert list(tmp_path.iterdir()) == [], "nothing may be created"


TUNE = {
    "tune.recipe=ddpp": ["tune.recipe=ddpp", "allowed are", "grad_accumulation"],
    "tune=bayes": ["tune=bayes", "asha, optuna"],
    "tune.search=grid": ["tune.search=grid", "random, optuna"],
    "tune.trials=0": ["tune.trials=0", "from 1 up"],
    "tune.trails=4": ["unknown key tune.trails", "did you mean tune.trials?"],
    "tune.space.optim.lrr=uniform(0,1)": ["unknown key optim.lrr in tune.space", "did you mean optim.lr?"],
    "tune.space.optim.lr=normal(0,1)": ["tune.space.optim.lr=normal(0,1)", "loguniform", "choice"],
    "tune.space.optim.lr=uniform(-1,1)": ["optim.lr=-1.0", "from 0 up"],
    "tune.space.model.norm=choice(batch,layer)": ["model.norm=layer", "batch, group"],
    "tune.space.batch_size=choice(48,49)": ["tune.space can draw", "batch_size=49", "2 ranks", "48, 50"],
    "tune.space.eval_batch_size=choice(big)": ["batch_size=big", "Integer"],
    "tune.space.epochs=choice(1,2)": ["tune.space.epochs", "same for all trials"],
    "tune.space.out=choice(a,b)": ["tune.space.out", "same for all trials"],
    "tune.space.stages=choice(2)": ["stages=2", "recipes.ddp does not use it"],
    "~tune.space.optim ~tune.space.batch_size": ["tune.space", "is empty", "tune=asha"],
    "batch_size=auto": ["batch_size=auto"],
    "zero.stage=3": ["zero.stage=3", "recipes.tune does not use it"],
    "tune.nproc=5": ["tune.space can draw", "5 ranks"],
    "tune.recipe=single tune.nproc=2": ["recipes.single runs on 1 rank, not 2"],
    "tune.address=ray://head:10001": ["tune.address=ray://head:10001", "auto", "HOST:PORT"],
    "tune.address=127.0.0.1:1": ["tune.address=127.0.0.1:1", "ray start --head"],
}


@pytest.mark.parametrize("words", TUNE)
def test_a_search_is_refused_before_ray_starts(words, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert run_main(tune.train, [tune.quoted(word) for word in words.split()], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert all(part in said for part in TUNE[words]), said
    assert list(tmp_path.iterdir()) == []
    assert "ray" not in sys.modules or "tests.test_tune" in sys.modules


def test_the_number_of_ranks_is_part_of_a_recipe(tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert run_main(single.train, ["nproc=2"], monkeypatch) == 2
    assert capfd.readouterr().err == "error: recipes.single runs on 1 rank, not 2; set nproc=1, or --nproc-per-node=1\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["memroy"], ["check=memroy", "allowed are memory"]),
        (["memory", "recipes=[fsdp,ddp]"], ["recipes=[fsdp,ddp]", "one recipe at a time"]),
        (["memory", "recipes=[none]"], ["recipes=[none]", "no such recipe"]),
        (["memory", "recipes=[fsdp]", "fsdp.replicas=3"], ["fsdp.replicas=3", "allowed are 1, 2"]),
        (["memory", "zero.stage=3"], ["zero.stage=3", "deepspeed_zero"]),
        (["memory", "batch_size=33"], ["batch_size=33", "32, 34"]),
    ],
)
def test_the_doctor_refuses_in_one_line(words, parts, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert run_main(doctor.train, words, monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert all(part in said for part in parts), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tool", "instead"),
    [(verify.train, "set a number"), (compare.train, "set a number"), (tune.train, "tune.space.batch_size")],
)
def test_a_tool_of_many_trainings_has_no_one_batch(tool, instead, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert run_main(tool, ["batch_size=auto"], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: batch_size=auto: ")
    assert instead in said


def test_a_directory_that_holds_something_is_never_written_to(tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "kept").write_text("mine")
    assert run_main(ddp.train, [f"out={tmp_path}"], monkeypatch) == 2
    assert f"out={tmp_path}: not empty" in capfd.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "mine")]


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK"]),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK=one", "whole numbers"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "70000"}, ["MASTER_PORT=70000", "65535"]),
    ],
)
def test_half_an_environment_is_refused(variables, parts, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_main(ddp.train, [], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said


def test_the_exit_code_is_the_process_s(tmp_path: Path) -> None:
    """One of the table, as a user starts it."""
    done = command("-m", "recipes.ddp", "bacth_size=3", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_ranks_started_by_hand_refuse_it_too(tmp_path: Path) -> None:
    words = ["--nproc-per-node=2", "--master-port=0", "-m", "recipes.ddp", "batch_size=33", "out=run"]
    done = command("-m", "torch.distributed.run", "--standalone", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "error: batch_size=33: the global batch must divide by 2 ranks" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_image_found_while_training_is_named_in_one_line(tmp_path: Path) -> None:
    """Its first and last bytes are right, so only decoding can tell."""
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (20, 20), (number * 40, 80, 90)).save(
                    tmp_path / "images" / part / name / f"{number}.jpg"
                )
    bad = tmp_path / "images" / "train" / "dog" / "2.jpg"
    bad.write_bytes(b"\xff\xd8" + b"no image" * 20 + b"\xff\xd9")
    words = ["data=imagefolder", "data.root=images", "model.image_size=16", "batch_size=8", "epochs=1", "out=run"]
    done = command("-m", "recipes.ddp", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(bad.relative_to(tmp_path)) in done.stderr
