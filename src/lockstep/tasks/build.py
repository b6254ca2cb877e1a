"""A task made from a config, and what can be said of it without training: its size, its model's names and shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.config.schema import Config, to_yaml
from lockstep.config.tasks import IMAGES, find_class, short_name, where
from lockstep.data.batch import describe, tree_tensors
from lockstep.data.loader import Samples, default_pair
from lockstep.data.streams import Stream, is_stream
from lockstep.errors import UserError
from lockstep.models.blocks import default_blocks
from lockstep.task import option
from lockstep.tasks.images import Images
from lockstep.training.handed_metrics import handed_in

OF_THE_CLASS = ("best", "lower_is_better", "unit", "defaults")


def build_task(config: Config) -> Any:
    """A task as `task.name` and its keys say. What it draws at random depends on `seed` alone.

    Raises:
        UserError: it cannot be made, or has no data to train on.
    """
    name, found = config.task.name, find_class(config.task.name)
    torch.manual_seed(config.seed)
    try:
        if hasattr(found, "from_config"):
            task = found.from_config(config)
        else:
            keys = [entry.name for entry in dataclasses.fields(config.task) if entry.name != "name"]
            task = found(**{key: getattr(config.task, key) for key in keys})
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        file = Path(str(getattr(sys.modules[found.__module__], "__file__", "")))
        raise UserError(f"task={short_name(name)}: cannot be made: {where(error, file.resolve())}") from None
    if name != IMAGES:
        check_class_attributes(task, short_name(name))
        check_data_sets(task, short_name(name))
        handed_in(task)  # refuses here what no evaluation could take
        check_first_model(task, short_name(name))
        check_first_loss(task, short_name(name))
    return task


def check_class_attributes(task: Any, name: str) -> None:
    """Hold what a task says of itself to its class, which is asked before there is a task.

    Raises:
        UserError: the task has another value than its class, which nobody would see.
    """
    for attribute in OF_THE_CLASS:
        there = getattr(type(task), attribute, None)
        if (here := getattr(task, attribute, there)) != there:
            raise UserError(
                f"task={name}: self.{attribute} = {here!r} comes too late; write it into the class, beside the methods: "
                f"{attribute} = {here!r}"
            )


def check_first_model(task: Any, name: str) -> None:
    """Have the first call of a task's `build_model` refuse what is no model.

    Raises:
        UserError: from that call.
    """

    def first() -> Any:
        del task.build_model
        found = task.build_model()
        if not isinstance(found, nn.Module):
            raise UserError(f"task={name}: build_model() gave {describe(found)}; allowed is a torch.nn.Module")
        return found

    with contextlib.suppress(AttributeError, TypeError):  # a class with slots has no place for it
        task.build_model = first


def check_first_loss(task: Any, name: str) -> None:
    """Have the first call of a task's `loss` say what does not fit, with the shapes; later ones are the task's own.

    Raises:
        UserError: from that call: it fails, or gives something else than one number.
    """

    def first(outputs: Any, targets: Any) -> Any:
        del task.loss
        shapes = f"outputs {describe(outputs)}, targets {describe(targets)}"
        try:
            found = task.loss(outputs, targets)
        except (UserError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            file = Path(str(getattr(sys.modules.get(type(task).__module__), "__file__", "")))
            said = where(error, file.resolve())
            raise UserError(f"task={name}: loss(outputs, targets) failed: {said}; {shapes}") from error
        if not isinstance(found, torch.Tensor) or found.dim():
            raise UserError(
                f"task={name}: loss(outputs, targets) gave {describe(found)}, and a loss is one number, a tensor "
                f"without dims: take its mean; {shapes}"
            )
        if (
            torch.is_grad_enabled()
            and not found.requires_grad
            and any(tensor.requires_grad for tensor in tree_tensors(outputs))
        ):
            raise UserError(
                f"task={name}: loss(outputs, targets) gave a number without a gradient; compute it from the outputs, "
                f"without detach, item, numpy or no_grad; {shapes}"
            )
        return found

    with contextlib.suppress(AttributeError, TypeError):  # a class with slots has no place for it
        task.loss = first


def check_data_sets(task: Any, name: str) -> None:
    """Hold a task's data sets to what a loader needs.

    Raises:
        UserError: there is none to train on, or it has no length.
    """
    if getattr(task, "train_set", None) is None:
        raise UserError(f"task={name}: has no train_set; set self.train_set to a dataset: index -> (inputs, targets)")
    for which in ("train_set", "eval_set"):
        dataset = option(task, which)
        if dataset is None or is_stream(dataset):
            continue
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method) and not (method == "__getitem__" and hasattr(dataset, "fetch")):
                raise UserError(
                    f"task={name}: its {which}, a {type(dataset).__name__}, has no {method}; a map-style dataset has "
                    "__len__ and __getitem__"
                )
    if not is_stream(task.train_set) and len(task.train_set) == 0:
        raise UserError(f"task={name}: its train_set is empty")
    _check_pictures(task, name)
    weights = option(task, "sample_weights")
    if weights is not None and is_stream(task.train_set):
        raise UserError(f"task={name}: sample_weights draw samples by their number, and a stream's have none")
    if weights is not None:
        _check_weights(weights, len(task.train_set), name)


def _check_pictures(task: Any, name: str) -> None:
    """They are wanted when training is over: too late to hear that they are none."""
    pictures, dataset = option(task, "pictures"), option(task, "eval_set")
    if not pictures or dataset is None:
        return
    if is_stream(dataset) or not option(task, "mistakes"):
        lacks = "its eval_set is a stream, whose samples have no number" if is_stream(dataset) else "it has no mistakes"
        raise UserError(f"task={name}: pictures(samples) shows what mistakes(outputs, targets) found, but {lacks}")
    found = pictures([0])
    if not (isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.shape[:2] == (1, 3)):
        raise UserError(
            f"task={name}: pictures([0]) gave {describe(found)}; allowed is uint8 [1, 3, H, W], for each sample a "
            "picture in red, green and blue, all of one size"
        )


def _check_weights(weights: Any, size: int, name: str) -> None:
    allowed = "allowed is a tensor with one number from 0 up for each sample, not all of them 0"
    if not isinstance(weights, torch.Tensor) or weights.shape != (size,):
        raise UserError(f"task={name}: sample_weights is {describe(weights)} for {size} samples; {allowed}")
    if bool((~torch.isfinite(weights)).any()) or bool((weights < 0).any()) or not bool(weights.any()):
        least, most = weights.min().item(), weights.max().item()
        raise UserError(f"task={name}: sample_weights has numbers from {least:g} to {most:g}; {allowed}")


@functools.lru_cache(maxsize=2)
def _known(text: str, process: int) -> Any:
    return _BUILDERS[text]()


_BUILDERS: dict[str, Any] = {}


def known_task(config: Config) -> Any:
    """`build_task`, once per process for the same task, model and data: for checks, which come several times."""
    parts = [to_yaml(each) for each in (config.task, config.model, config.data)]  # type: ignore[arg-type]
    text = f"{config.seed}\n{chr(10).join(parts)}"
    _BUILDERS[text] = lambda: build_task(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process whose OpenMP has started threads can start no ranks by forking
    try:
        return _known(text, os.getpid())
    finally:
        torch.set_num_threads(threads)


def one_sample(config: Config) -> tuple[Any, Any]:
    """(inputs, targets) of a batch of one sample, on the CPU, as the model takes it but for its dtype."""
    return sample_of(known_task(config), config.seed)


def sample_of(task: Any, seed: int) -> tuple[Any, Any]:
    """`one_sample` of a task that is built."""
    if hasattr(task, "example"):
        inputs, targets = task.example(1)
        return inputs, targets
    to_device = option(task, "to_device")
    if is_stream(task.train_set):
        inputs, targets = (option(task, "collate") or default_pair)(Stream(task.train_set, False, None).first(1))
        return to_device(inputs, targets) if to_device else (inputs, targets)
    batch = Samples(task.train_set, seed, option(task, "collate"), fixed=True)[0, torch.tensor([0])]
    return to_device(batch.inputs, batch.targets) if to_device else (batch.inputs, batch.targets)


def sketch(config: Config) -> nn.Module:
    """The model without memory, on the meta device: its names and shapes; with memory where it cannot be built so."""
    return sketch_of(Images(config) if config.task.name == IMAGES else known_task(config))


def sketch_of(task: Any) -> nn.Module:
    """`sketch` of a task that is built."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model: nn.Module = task.build_model()
        except (RuntimeError, NotImplementedError, TypeError):
            model = task.build_model()
    return model


def has_batchnorm(config: Config) -> bool:
    """Whether the model normalises by its batch."""
    return any(isinstance(module, _BatchNorm) for module in sketch(config).modules())


def require_batchnorm(config: Config, setting: str) -> None:
    """Refuse to synchronise layers that are not there.

    Args:
        setting: what asks for it.

    Raises:
        UserError: the model has no BatchNorm.
    """
    if has_batchnorm(config):
        return
    if config.task.name == IMAGES and config.model.norm == "group":
        raise UserError(f"{setting}model.norm={config.model.norm} holds no BatchNorm; set model.norm=batch")
    images = config.task.name == IMAGES
    what = f"model={config.model.name}" if images else f"task={short_name(config.task.name)}"
    raise UserError(f"{setting}{what} holds no BatchNorm to synchronise; use recipes.ddp")


def blocks_of_task(task: Any, model: nn.Module) -> Sequence[str]:
    """The modules of a model that are sharded, checkpointed or cut between: the task's `blocks`, or `default_blocks`.

    Raises:
        UserError: the task names one that is not there.
    """
    own = option(task, "blocks")
    if own is not None:
        names = list(own(model))
        known = dict(model.named_modules())
        if wrong := [name for name in names if name not in known]:
            raise UserError(
                f"the task's blocks(model) names {wrong[0]}, which the model has not; names are as in named_modules()"
            )
        return names
    return default_blocks(model)
