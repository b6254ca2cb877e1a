"""What a task says of how ranks may share its model's layers, held to the model before anything starts.

    def tensor_parallel_plan(self, model):
        return {"layers.*.up": "columns", "layers.*.down": "rows", "layers.*.norm": "whole"}

Names are those of `named_modules()`, with `*` for any one part. Between layers each rank has the same activations (or,
with `sequence_parallel=true`, each its slice of the sequence, dim 1). The words:

    embedding   an nn.Embedding; each rank has some rows, of some tokens, and the sum over the ranks is everyone's output
    gather      a module that begins with columns and ends with rows, such as attention: its input is made whole once
    columns     an nn.Linear; each rank has some of its outputs, and goes on with them by itself
    rows        an nn.Linear that takes what `columns` gave; the sum over the ranks is everyone's output
    whole       nn.LayerNorm, nn.RMSNorm or nn.Linear that every rank has whole, which sees each position by itself
    output      the last nn.Linear, of which each rank has some outputs (logits), equally many or not
    causal      of the model itself, "": an output depends on no later position, so sequences may be filled up

Between `columns` and `rows` the model computes on a part of the features: what it does there must not mix them, and
must not know how many there are (attention reads the number of heads off its projections). A dropout there would have
to differ between ranks; there must be none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lockstep.errors import UserError
from lockstep.parallel.task_plans import fitting_modules, require_same_samples
from lockstep.task import option

LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "embedding": (nn.Embedding,),
    "gather": (nn.Module,),
    "columns": (nn.Linear,),
    "rows": (nn.Linear,),
    "whole": (nn.LayerNorm, nn.RMSNorm, nn.Linear),
    "output": (nn.Linear,),
    "causal": (nn.Module,),
}
HELP = (
    "give the task tensor_parallel_plan(model) -> {module: embedding, gather, columns, rows, whole or output}, as "
    "task=language has it; or use recipes.fsdp, which cuts any model"
)


def tensor_parallel_plan(task: Any, name: str, model: nn.Module, tensor: int, sequence: bool) -> dict[str, str]:
    """{name of a module: a word of the plan}, for every module that the task's plan names.

    Args:
        name: the task's, for errors.
        model: on any device, the meta device too.
        tensor: ranks that share a model.
        sequence: whether they have slices of the sequence between layers.

    Raises:
        UserError: there is no plan, or it does not fit the model, or the model so many ranks.
    """
    given = option(task, "tensor_parallel_plan")
    if given is None:
        raise UserError(f"task={name}: says nothing of how ranks could share its model's layers; {HELP}")
    require_same_samples(task, name, tensor, "a model")
    modules = dict(model.named_modules())
    plan: dict[str, str] = {}
    for pattern, word in given(model).items():
        fitting = fitting_modules(modules, pattern, name, "tensor_parallel_plan")
        if word not in LAYERS:
            raise UserError(
                f"task={name}: tensor_parallel_plan says {word} of {pattern}; allowed are {', '.join(LAYERS)}"
            )
        plan |= dict.fromkeys(fitting, word)
    for each, word in plan.items():
        if not isinstance(modules[each], LAYERS[word]):
            allowed = ", ".join(kind.__name__ for kind in LAYERS[word])
            raise UserError(
                f"task={name}: tensor_parallel_plan says {word} of {each}, a {type(modules[each]).__name__}; allowed "
                f"for it is {allowed}"
            )
    _check_parameters(name, model, plan)
    _check_dropouts(name, modules, plan)
    if sequence and not {"embedding", "output"} <= set(plan.values()):
        raise UserError(
            f"sequence_parallel=true: needs a tensor_parallel_plan with an embedding, where the sequence is cut, and an "
            f"output, where it is put together; task={name} has {', '.join(dict.fromkeys(plan.values()))}"
        )
    gathered = tuple(f"{each}." for each, word in plan.items() if word == "gather")
    outside = [each for each, word in plan.items() if word == "columns" and not each.startswith(gathered)]
    if sequence and outside:
        raise UserError(
            f"sequence_parallel=true: {outside[0]} needs the whole sequence; name the module around it and its rows in "
            f"task={name}'s tensor_parallel_plan: gather"
        )
    _check_sizes(task, model, plan, tensor)
    return plan


def local_shape(name: str, shape: tuple[int, ...], plan: Mapping[str, str], ranks: int) -> tuple[int, ...]:
    """What the first rank has of a parameter whose layer ranks share."""
    word, mine = plan.get(name.rpartition(".")[0]), list(shape)
    if word in ("embedding", "columns", "output"):
        mine[0] = -(-mine[0] // ranks)
    if word == "rows" and len(mine) > 1:
        mine[1] = -(-mine[1] // ranks)
    return tuple(mine)


def _check_parameters(name: str, model: nn.Module, plan: Mapping[str, str]) -> None:
    """Each parameter belongs to one layer of the plan, and to one only."""
    owners: dict[int, str] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        layer = parameter_name.rpartition(".")[0]
        if id(parameter) not in owners and plan.get(layer, "gather") in ("gather", "causal"):
            raise UserError(
                f"task={name}: tensor_parallel_plan leaves out {layer or 'the model itself'}, which has "
                f"{parameter_name}; say {', '.join(word for word in LAYERS if word not in ('gather', 'causal'))}"
            )
        if id(parameter) in owners:
            raise UserError(
                f"task={name}: {owners[id(parameter)]} and {parameter_name} are one tensor, which tensor parallelism "
                "would make two of; untie them, or use recipes.ddp"
            )
        owners[id(parameter)] = parameter_name


def _check_dropouts(name: str, modules: Mapping[str, nn.Module], plan: Mapping[str, str]) -> None:
    gathered = [f"{each}." for each, word in plan.items() if word == "gather"]
    for each, module in modules.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and each.startswith(tuple(gathered)):
            raise UserError(
                f"task={name}: {each} drops activations of which each rank has a part, where all would drop the same; "
                "set its p to 0, or move it behind the module's rows"
            )


def _check_sizes(task: Any, model: nn.Module, plan: Mapping[str, str], tensor: int) -> None:
    """Each rank has equally much of what is cut; of a vocabulary, at least something."""
    counts: dict[str, int] = dict((option(task, "tensor_parallel_counts") or (lambda model: {}))(model))
    vocabularies: dict[str, int] = {}
    for each, word in plan.items():
        layer: Any = model.get_submodule(each)
        if word in ("columns", "rows"):
            name = each if word == "columns" else f"{each}'s inputs"
            size = layer.out_features if word == "columns" else layer.in_features
            if size not in counts.values():  # one line, not one a block
                counts[name] = size
        elif word in ("embedding", "output"):
            vocabularies[each] = layer.num_embeddings if word == "embedding" else layer.out_features

    def works(ranks: int) -> bool:
        return all(size % ranks == 0 for size in counts.values()) and all(
            math.ceil(size / ranks) * (ranks - 1) < size for size in vocabularies.values()
        )

    if works(tensor):
        return
    limit = min([*counts.values(), *vocabularies.values()])
    allowed = ", ".join(str(ranks) for ranks in range(1, limit + 1) if works(ranks))
    wrong = [f"{name}={size}" for name, size in counts.items() if size % tensor]
    why = (
        f"does not divide {wrong[0]}"
        if wrong
        else f"leaves a rank without any of the {min(vocabularies.values())} tokens"
    )
    raise UserError(f"tensor={tensor}: {why}; allowed for this model are {allowed}")
