"""The blocks of a model: the modules that are sharded, checkpointed or cut between, one by one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def default_blocks(model: nn.Module) -> list[str]:
    """What the ModuleList or Sequential that holds most parameters is made of, and those beside it; by the names of
    `named_modules()`. None where there is no such list.

    A list of equals within one of them is taken apart too, such as features.1 of a ConvNeXt. Anything else in it is one
    block, whatever it is made of.
    """
    lists = {name: module for name, module in model.named_modules() if _is_list(module) and any(module.children())}
    if not lists:
        return []
    # Of equally many parameters the outermost: a list within a list holds no more than that.
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    if not largest:
        return list(_taken_apart("", model))
    parent = largest.rpartition(".")[0]
    beside = model.get_submodule(parent).named_children()
    prefix = f"{parent}." if parent else ""
    return [block for name, child in beside if _is_list(child) for block in _taken_apart(f"{prefix}{name}.", child)]


def _taken_apart(prefix: str, module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList) and len({type(each) for each in child.children()}) == 1:
            yield from _taken_apart(f"{prefix}{name}.", child)
        else:
            yield f"{prefix}{name}"


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)
