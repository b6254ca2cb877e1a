"""Ranks that would not do the same work are named before the first step."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from lockstep import Run
from lockstep.config.declared import read_config
from lockstep.config.schema import to_yaml
from lockstep.distributed.consistency import first_difference
from lockstep.distributed.process_group import World
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from recipes import ddp
from tests.helpers.harness import compose_config, run_ranks

OPTIONS = ["data=imagefolder", "data.root=images", "data.workers=0", "model.image_size=8", "model.norm=group"]
STEPS = ["global_batch_size=2", "max_steps=1", "checkpoint.every=100"]
HERE = socket.gethostname()


def begin(world: World, homes: list[Path], config: str) -> str:
    """What a run says that finds data.root=images in a folder of this rank's own."""
    os.chdir(homes[world.rank])
    (Path("run") / "ranks").mkdir(parents=True)
    try:
        ddp.train(Run("ddp", read_config(ddp.train, config), world, Path("run"), quiet=True))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow_except("a name")
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("train/cat/1.png", f"has 5 images to train on, and rank 0 ({HERE}) has 6; data.root=images must be the same"),
        ("val/cat/1.png", f"has 5 images to evaluate, and rank 0 ({HERE}) has 6; data.root=images must be the same"),
        (
            "a name",
            f"has other images to train on than rank 0 ({HERE}); data.root=images must be the same on all hosts",
        ),
        ("", ""),
    ],
)
def test_a_rank_whose_files_differ_is_named_before_the_first_step(damage: str, words: str, tmp_path: Path) -> None:
    homes = [tmp_path / "node1", tmp_path / "node2"]
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (homes[0] / "images" / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (20, 20), (number * 40, 80, 90)).save(
                    homes[0] / "images" / part / name / f"{number}.png"
                )
    shutil.copytree(homes[0], homes[1])
    one = homes[1] / "images" / damage
    if damage == "a name":
        (homes[1] / "images/train/cat/1.png").rename(homes[1] / "images/train/cat/11.png")
    elif damage:
        one.unlink()
    with chdir(homes[0]):
        config = compose_config(ddp.train, *OPTIONS, *STEPS)
        validate(config, ddp.train, 2)
    for said in run_ranks(begin, 2, homes, to_yaml(config)):
        assert said.startswith(f"rank 1 ({HERE}) {words}" if words else "")
        assert bool(said) == bool(words)


def test_of_many_ranks_the_first_is_named_and_the_others_are_counted() -> None:
    everyone = [{"images to train on": 100 - (rank > 5)} for rank in range(16)]
    hosts = [f"node{rank // 8}" for rank in range(16)]
    assert first_difference(everyone, hosts) == (
        "rank 6 (node0) has 99 images to train on, and rank 0 (node0) has 100 (10 ranks differ from it)"
    )
    assert first_difference(everyone[:5], hosts) == ""
