"""All that can be checked of a config before anything is created: each value, and whether they fit each other."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lockstep.checkpoint.weights import is_foreign, load_weights
from lockstep.config.check import check_values
from lockstep.config.keys import AUTO
from lockstep.config.packages import require
from lockstep.config.run_directory import checkpoint_folder, config_of, refuse_other_plan
from lockstep.config.schema import NO_SOURCE, RESNETS, Config
from lockstep.config.tasks import IMAGES, unit_of
from lockstep.data.batches import train_size
from lockstep.data.image_files import check_data
from lockstep.distributed.cores import check_threads
from lockstep.distributed.interfaces import check_interfaces
from lockstep.errors import UserError
from lockstep.launch.launcher import list_launchers, load_launcher
from lockstep.memory.usage import free_bytes
from lockstep.models.resnet import SMALL_IMAGE
from lockstep.models.torchvision_models import check_model
from lockstep.tasks.build import blocks_of_task, has_batchnorm, known_task, sketch
from lockstep.training.activation_checkpointing import check_blocks
from lockstep.training.clip import limits
from lockstep.training.optim import check_optimizer
from lockstep.training.timing import warm_up
from lockstep.utils.text import count, mebibytes

if TYPE_CHECKING:
    from lockstep.recipe import Recipe

MANY_CLASSES = 100_000  # from here on the last layer is the larger part of the model


def validate(config: Config, recipe: Recipe, world_size: int, counted: tuple[int, int] | None = None) -> None:
    """Check all that can be checked before anything is created, and fill in what follows from the data set.

    Args:
        counted: what `count_samples` has already found.

    Raises:
        UserError: a package is missing, or a value is out of its range, does not fit another one, or is not supported
            yet.
    """
    check_package(recipe)
    check_values(config)
    check_threads(config.threads, os.environ)
    check_optimizer(config.optim)
    chooses = recipe.batch if config.global_batch_size == AUTO else None
    if chooses:
        config.global_batch_size = chooses(sys.maxsize, world_size)  # a stream may be counted in batches
    refuse_auto(config)
    if config.logger.wandb:
        require("wandb", "logger=wandb")
    if config.logger.mllog:
        require("mlperf_logging", "logger=mllog", "mllog")
    if config.loss_scale != Config().loss_scale and config.precision != "fp16":
        raise UserError(
            f"loss_scale={config.loss_scale:g}: precision={config.precision} scales no loss; "
            "set precision=fp16, or leave it out"
        )
    if recipe.ranks not in (None, world_size):
        raise UserError(
            f"recipes.{recipe.name} runs on {recipe.ranks} rank, not {world_size}; "
            f"set nproc={recipe.ranks}, or --nproc-per-node={recipe.ranks}"
        )
    if config.nproc not in (None, world_size):
        raise UserError(
            f"nproc={config.nproc}: {world_size} ranks were started by hand; leave nproc out, or start as many"
        )
    if config.memory and config.compile:
        raise UserError(f"memory={config.memory}: counts layer by layer, and compile=true melts them; leave one out")
    if config.record_tensors and config.compile:
        raise UserError(
            f"record_tensors={config.record_tensors}: records layer by layer, and compile=true melts them; leave one out"
        )
    check_batch(config, world_size)
    classes, samples = counted or count_samples(config)
    unit = unit_of(config)
    if chooses:
        config.global_batch_size = chooses(samples, world_size)
    if config.global_batch_size > samples:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: the training set has only {samples} {unit}; "
            f"allowed are 1…{samples}"
        )
    if config.profile and not recipe.several:  # recipes.compare profiles as many as there are
        steps = min(config.epochs * (samples // config.global_batch_size), config.max_steps or math.inf)
        most = int(steps) - warm_up(int(steps)) - 1
        if config.profile > most:
            raise UserError(
                f"profile={config.profile}: the run's {count(int(steps), 'step')} must be more than these and the "
                f"warm-up's {warm_up(int(steps))}; allowed are 0…{max(0, most)}, or more steps"
            )
    if config.task.name == IMAGES:
        fill_in_images(config, classes)
    if config.cluster is None:  # else it will run on another machine
        if config.launcher not in list_launchers():
            load_launcher(config.launcher)  # also where the ranks have been started, and it is not needed
        check_memory(config)
        check_interfaces(os.environ, nccl=config.backend != "gloo" and torch.cuda.is_available())
    if config.resume_prefix is not None and config.resume in NO_SOURCE:
        raise UserError(
            f"resume_prefix={config.resume_prefix}: is for the names in a file of weights; set resume=FILE, or leave it out"
        )
    if config.resume not in NO_SOURCE and not recipe.backbone:
        check_source(config, planned="build_scheduler" in vars(sys.modules[recipe.train.__module__]))
    if config.checkpoint_activations != "none":
        check_blocks(blocks_of_task(known_task(config), sketch(config)), config.checkpoint_activations)
    if config.gradients.clip_value:
        limits(config.gradients, [name for name, _ in sketch(config).named_parameters()])
    share = config.global_batch_size // (world_size // config.model_parallel_size)
    if not recipe.has_global_batchnorm(config) and config.task.name == IMAGES:
        check_batchnorm(config, share)
    if recipe.check:
        recipe.check(config, share)


def count_samples(config: Config) -> tuple[int, int]:
    """(classes, samples to train on) of the data, checked; classes are 0 where the task is not `images`.

    Raises:
        UserError: the data are missing, or not what they should be.
    """
    if config.task.name != IMAGES:
        return 0, train_size(known_task(config), config)
    if len(config.data.mean) != 3 or len(config.data.std) != 3:
        raise UserError("data.mean and data.std: allowed are 3 numbers each, one a channel")
    return check_data(config.data)


def fill_in_images(config: Config, classes: int) -> None:
    """What follows from a set of images of so many classes for the model; raises UserError where it does not fit."""
    if config.data.num_classes not in (None, classes):
        where = "data.classes" if config.data.classes else config.data.name
        raise UserError(f"data.num_classes={config.data.num_classes}: {where} has {classes}; leave it out")
    config.data.num_classes = classes
    config.model.num_classes = config.model.num_classes or classes
    if config.model.num_classes < classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}: {config.data.name} has {classes} classes; "
            f"allowed are numbers from {classes} up"
        )
    config.model.image_size = config.model.image_size or config.data.image_size
    check_model(config.model)


def check_memory(config: Config) -> None:
    """Refuse what this machine has no memory for whatever else is set: images that are made in it, and a last layer.

    Raises:
        UserError: with what it would take and what is there.
    """
    if config.task.name != IMAGES:
        return
    free, who = free_bytes(torch.device("cpu"))
    side, size = config.data.image_size, config.data.size
    needed = 5 * 3 * side**2 * size // 4  # a quarter as many again to evaluate on
    if config.data.name == "synthetic" and needed > free:
        raise UserError(
            f"data.size={size} data.image_size={side}: such images take {mebibytes(needed, 0)} MiB of memory, and "
            f"{who} has {mebibytes(free, 0)}; set smaller ones"
        )
    if (classes := config.model.num_classes or 0) > MANY_CLASSES:
        needed = sum(each.numel() * each.element_size() for each in sketch(config).parameters())
        if needed > free:
            raise UserError(
                f"model.num_classes={classes}: the model's weights take {mebibytes(needed, 0)} MiB of memory, and {who} "
                f"has {mebibytes(free, 0)}; set fewer"
            )


def check_package(recipe: Recipe) -> None:
    """Hold a recipe to the package it cannot do without; raises UserError as `require` does."""
    if recipe.needs:
        require(recipe.needs, f"recipes.{recipe.name}")


def check_source(config: Config, planned: bool) -> None:
    """Hold resume=PATH to what can be started from: a run, a checkpoint, or a file of weights that fit the model.

    Args:
        planned: whether the recipe's learning rate is that of `optim.schedule`.

    Raises:
        UserError: it is none of them.
    """
    path = Path(config.resume).expanduser()
    if path.is_dir() and not is_foreign(path):
        folder, _ = checkpoint_folder(path)
        before = config_of(folder.parent)
        if before and planned:
            refuse_other_plan(config, before, folder.parent)
        if config.resume_prefix is not None:
            raise UserError(
                f"resume_prefix={config.resume_prefix}: resume={config.resume} is a run of lockstep's, whose names are "
                "the model's; leave it out"
            )
        return
    if not path.exists() or not (path.is_file() or path.is_dir()):
        raise UserError(
            f"resume={config.resume}: no such file or folder; allowed are auto, last, never, or a path that exists"
        )
    load_weights(path, sketch(config).state_dict(), config.resume_prefix)


def check_batch(config: Config, world_size: int) -> None:
    """Hold the global batch to the ranks, pipelines and micro-batches it is cut into.

    Raises:
        UserError: it does not divide, or a share is smaller than its number of micro-batches.
    """
    size, key = config.model_parallel_size, config.model_parallel_key
    copies = "pipelines" if key == "stages" else "copies"
    if world_size % size:
        shared = "each sequence" if config.shares_sequences else "a copy of the model"
        each = "a pipeline takes a rank for each stage" if key == "stages" else f"{size} ranks share {shared}"
        raise UserError(
            f"{key}={size}: {each}, and {count(world_size, 'rank')} cannot be divided into such {copies}; "
            f"set nproc to a multiple of {key}"
        )
    shards = world_size // size
    pieces = shards * config.pipeline_micro_batches
    if config.global_batch_size % pieces:
        below = config.global_batch_size // pieces * pieces
        nearest = ", ".join(str(size) for size in (below, below + pieces) if size)
        what = f"{shards} ranks" if size == 1 else f"{shards} {copies}"
        if config.pipeline_micro_batches > 1:
            what += f" × micro_batches={config.pipeline_micro_batches}"
        raise UserError(
            f"global_batch_size={config.global_batch_size}: the global batch must divide by {what}; nearest that do: {nearest}"
        )
    share = config.global_batch_size // shards
    if config.accumulate > share:
        raise UserError(
            f"accumulate={config.accumulate}: a rank's share is only {share} {unit_of(config)}; allowed are 1…{share}"
        )


def check_batchnorm(config: Config, share: int) -> None:
    """BatchNorm has nothing to average over one image once that is down to one pixel; say so before it does."""
    size = config.model.image_size or 0
    pixels = math.ceil(size / (8 if size <= SMALL_IMAGE and config.model.name in RESNETS else 32))
    largest = math.ceil(share / max(config.accumulate, config.pipeline_micro_batches))
    smallest = share % largest or largest  # chunk's last piece is the ragged one
    if pixels == 1 and smallest == 1 and config.model.norm != "group" and has_batchnorm(config):
        raise UserError(
            f"global_batch_size={config.global_batch_size}: leaves a forward with a single image, whose last layers are one pixel: "
            "BatchNorm has nothing to average; set a larger global_batch_size, fewer micro-batches, or model.norm=group"
        )


def refuse_auto(config: Config) -> None:
    """Where the ranks will be somewhere else, or were started already, no batch can be tried; raises UserError."""
    if config.global_batch_size == AUTO:
        raise UserError(
            "global_batch_size=auto: is found by a command that starts its ranks on its own machine; find it there first with "
            "python -m recipes.doctor memory recipes=[NAME] global_batch_size=auto nproc=RANKS (on a cluster after srun "
            "--nodes=1 --ntasks=1), and set global_batch_size to that number times the machines"
        )
