"""What a task says of a mixture of experts, held to its model before anything starts.

    def expert_parallel_modules(self, model):
        return ["layers.*.moe.experts"]

names the modules that hold all experts of a layer, as in `named_modules()`, with `*` for any one part. Each of them

- has parameters [E, …] alone: expert by expert along the first dim;
- is called as `module(rows, counts)`, rows [n, width] sorted by expert, counts int64 [E] how many of them each gets, n in
  all, and gives [n, …] in the same order; it reads the number of experts off `counts`, because a rank has some of them;
- treats each row by itself.

Routing, weighing and balance lie outside: every rank does them for its own tokens. lockstep.models.experts is an example.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lockstep.errors import UserError
from lockstep.parallel.task_plans import fitting_modules
from lockstep.task import option
from lockstep.utils.text import divisors


def expert_modules(task: Any, name: str, model: nn.Module, expert: int) -> list[str]:
    """The names of the modules whose experts are cut over ranks.

    Args:
        name: the task's, for errors.
        model: on any device, the meta device too.
        expert: ranks that share the experts.

    Raises:
        UserError: the task says nothing, or what does not fit the model, or the experts do not divide.
    """
    given = option(task, "expert_parallel_modules")
    if given is None:
        raise UserError(
            f"task={name}: says nothing of experts; give the task expert_parallel_modules(model) -> names of the modules "
            "that hold them, as task=language has it; or use recipes.fsdp, which trains any model"
        )
    modules = dict(model.named_modules())
    found: list[str] = []
    for pattern in given(model):
        found += fitting_modules(modules, pattern, name, "expert_parallel_modules")
    found = list(dict.fromkeys(found))
    if not found:
        raise UserError(
            f"task={name}: expert_parallel_modules names no module, and a dense model has no experts to cut; name those "
            "that hold them, or use recipes.ddp"
        )
    for each in found:
        _check_experts(name, each, modules[each], expert)
    return found


def _check_experts(name: str, module_name: str, module: nn.Module, expert: int) -> None:
    shapes = {each: list(parameter.shape) for each, parameter in module.named_parameters()}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) != 1 or 0 in counts:
        shown = ", ".join(f"{each} {shape}" for each, shape in shapes.items()) or "none"
        raise UserError(
            f"task={name}: expert_parallel_modules names {module_name}, whose parameters are {shown}; allowed are [E, …] "
            "for all of them, E experts along the first dim"
        )
    count = counts.pop()
    if count % expert:
        raise UserError(
            f"expert={expert}: does not divide the {count} experts of {module_name}; allowed are {divisors(count)}"
        )
