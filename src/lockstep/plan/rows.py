"""Which strategies are planned: recipes, and for each the meshes and settings that suit so many devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lockstep.config.copies import with_values
from lockstep.config.keys import AUTO, typed
from lockstep.config.schema import Config
from lockstep.errors import UserError
from lockstep.launch.validate import validate
from lockstep.plan.config import PlanConfig
from lockstep.plan.hardware import Hardware, OffloadHost
from lockstep.recipe import Recipe
from lockstep.registry import is_file

USUAL = (  # where none is named
    "single",
    "ddp",
    "zero1",
    "fsdp",
    "deepspeed_zero",
    "tensor_parallel",
    "context_parallel",
    "parallel_mesh",
    "pipeline_parallel",
    "expert_parallel",
    "comm_hooks",
)
WHEN_NAMED = ("sync_batchnorm", "lightning_fabric", "local_sgd")
PLANNED = (*USUAL, *WHEN_NAMED)
NOT_PLANNED = {
    "lora": "it begins with a trained model, of which a plan has no weights",
    "transfer_learning": "it begins with a trained model, of which a plan has no weights",
    "parallel_mesh pipeline=N": "a plan has stages of one rank each; plan recipes.pipeline_parallel",
}
OFFLOADING = ("fsdp", "deepspeed_zero")
AS_ISSUED = (
    "compile=true: planned as without it; the bytes that are sent are the same. Compiled, a step is shorter; by how much, "
    "and what it holds, is not known"
)
INSTEAD = {  # recipes that run several trainings, or a plain one by another name
    "grad_accumulation": "ddp with accumulate=N",
    "activation_checkpointing": "ddp with checkpoint_activations=full",
    "checkpoint_resume": "ddp",
    "data_parallel": "ddp",
    "lightning_trainer": "ddp",
    "model_parallel": "pipeline_parallel",
}
# What is planned, in place of the ranks that are here.
OF_PLANS = ("gpus", "hardware", "tokens", "price", "network", "interconnect", "curve", "scaling", "plot", "json")
PLAN_KEYS = {"recipes", *OF_PLANS, "check", "nproc", "out", "global_batch_size"}
PLENTY = 10**12  # samples: a plan asks no data set whether it has enough


@dataclass(frozen=True)
class PlanRow:
    """A recipe with its settings, on a number of devices.

    Attributes:
        words: what its command is told, beside the number of devices.
        own: those of them that make it another row than the recipe's first.
    """

    recipe: Recipe
    config: Config
    ranks: int
    words: tuple[str, ...]
    own: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`fsdp replicate=8`."""
        return " ".join([self.recipe.name, *self.own])


def variants(recipe: Recipe, ranks: int, per_node: int) -> Iterator[dict[str, Any]]:
    """The settings of a recipe that are worth a row each on so many devices."""
    yield {}
    if is_file(recipe.target):
        return
    if recipe.name == "fsdp":
        yield {"reshard_after_forward": False}
        if ranks > per_node and ranks % per_node == 0:
            yield {"replicate": ranks // per_node}
    if recipe.name in ("ddp", "fsdp"):
        yield {"checkpoint_activations": "full"}
    if recipe.name == "deepspeed_zero":
        yield {"stage": 1}
        yield {"stage": 3}
    if recipe.name == "pipeline_parallel":
        for stages in (4, 8):
            if stages <= ranks:
                yield {"stages": stages, "micro_batches": 2 * stages}
    if recipe.name == "expert_parallel" and per_node <= ranks:
        yield {"expert": per_node}
    if recipe.name == "parallel_mesh":
        yield from meshes(ranks, per_node)
    if recipe.name == "tensor_parallel":
        for tensor in (4, 8):
            if tensor <= min(per_node, ranks):
                yield {"tensor": tensor}
        yield {"sequence_parallel": True}


def meshes(ranks: int, per_node: int) -> Iterator[dict[str, Any]]:
    """Meshes of copies × shards × sequences × layers besides the recipe's own: what sends most stays in a node."""
    if 2 < per_node <= ranks:
        yield {"tensor": per_node}
    if ranks > per_node and ranks % per_node == 0:
        yield {"replicate": ranks // per_node}
    if ranks >= 4:
        yield {"context": 2}
        yield {"tensor": 1, "context": 2}


def plan_rows(
    config: PlanConfig, tool: Recipe, recipes: list[Recipe], ranks: int, hardware: Hardware
) -> tuple[list[PlanRow], list[str]]:
    """(the rows, a line for each that cannot be)."""
    rows, left_out = [], []
    for recipe in recipes:
        base: Config | None = None
        words: list[str] = []
        for own in variants(recipe, ranks, hardware.per_node):
            label = " ".join([recipe.name, *(typed(*pair) for pair in own.items())])
            try:
                if base is None:
                    words = row_words(config, tool, recipe)
                    base = base_config(config, recipe, words, hardware)
                if any(value == own_value(base, key) or is_set(base, recipe, key) for key, value in own.items()):
                    continue
                number = recipe.ranks or ranks
                each = made_valid(with_values(base, own), recipe, number, hardware)
                told = tuple(typed(*pair) for pair in own.items())
                rows.append(PlanRow(recipe, each, number, (*words, *told), told))
            except UserError as error:
                left_out.append(f"{label}: {error}")
                if not own:
                    break
    return rows, left_out


def beyond_the_table() -> list[str]:
    """A line for each thing that recipes can do and the table of all strategies has no row for."""
    return [
        *(f"not planned: {what}: {why}" for what, why in NOT_PLANNED.items()),
        *(f"not in the table: {name}; plan {instead}" for name, instead in INSTEAD.items()),
        *(f"not in the table: {name}; it has a row with recipes=[{name}]" for name in WHEN_NAMED),
    ]


def own_value(config: Config, key: str) -> Any:
    return getattr(config, key, None)


def is_set(config: Config, recipe: Recipe, key: str) -> bool:
    """Whether the command says what this key is: then it is not another row's to choose."""
    return bool(own_value(config, key) != own_value(recipe.config(), key))


def row_words(config: PlanConfig, tool: Recipe, recipe: Recipe) -> list[str]:
    """The overrides that all rows of a recipe have in common."""
    from lockstep.config.compose import overrides

    return overrides(tool, config, recipe, PLAN_KEYS)


def base_config(config: PlanConfig, recipe: Recipe, words: list[str], hardware: Hardware) -> Config:
    """A recipe's config as its command would have it on this hardware."""
    from lockstep.config.compose import compose_another

    base = compose_another(recipe, words)
    if base.task.name != config.task.name:
        raise UserError(f"trains a task of its own; set task={base.task.name.rpartition('/')[2]} for all rows")
    return replace(on_hardware(base, hardware), global_batch_size=config.global_batch_size)


def on_hardware(config: Config, hardware: Hardware) -> Config:
    """The same without what says how real ranks are started, in the precision that it would have on this hardware."""
    config = replace(config, nproc=None, cluster=None, device="cpu", backend="auto")
    if config.precision == AUTO:
        config.precision = "bf16" if hardware.device != "cpu" else "fp32"
    return config


def planned_config(recipe: Recipe, words: list[str], ranks: int, hardware: Hardware) -> Config:
    """The config of one command, as a plan takes its steps.

    Raises:
        UserError: it cannot be planned.
    """
    from lockstep.config.compose import compose_another

    if recipe.name not in PLANNED and not is_file(recipe.target):
        raise UserError(f"is not planned: {NOT_PLANNED.get(recipe.name) or f'plan {INSTEAD[recipe.name]}'}")
    config = on_hardware(compose_another(recipe, words), hardware)
    return made_valid(config, recipe, ranks, hardware)


def made_valid(config: Config, recipe: Recipe, ranks: int, hardware: Hardware) -> Config:
    """The same, held to what its command would be held to, with a batch that the ranks can share.

    Raises:
        UserError: it cannot be run, or not be planned.
    """
    refuse_unplanned(config, recipe, hardware)
    config.global_batch_size = whole_batch(config, ranks)
    validate(config, recipe, ranks, (config.data.num_classes or 10, PLENTY))
    return config


def whole_batch(config: Config, ranks: int) -> int:
    """The global batch, or the next larger one that the ranks can share."""
    if config.global_batch_size == AUTO:
        raise UserError("global_batch_size=auto: is found by trials, and a plan makes none; set a number")
    shards = max(1, ranks // config.model_parallel_size) * max(config.accumulate, config.pipeline_micro_batches)
    return -(-int(config.global_batch_size) // shards) * shards


def why_not(error: Exception) -> str:
    """Why a row cannot be planned, in a line."""
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, DynamicOutputShapeException | DataDependentOutputException):
        return f"the model asks for numbers, and a plan has none: {said} makes shapes or values of them"
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"


def refuse_unplanned(config: Config, recipe: Recipe, hardware: Hardware) -> None:
    """What a plan does not reckon with."""
    if config.shares_activations and config.pipeline_stages > 1:
        raise UserError(
            f"pipeline={config.pipeline_stages}: a plan has stages of one rank each; plan recipes.pipeline_parallel, or a "
            "mesh with pipeline=1"
        )
    if getattr(config, "offload", False) and recipe.name not in OFFLOADING:
        raise UserError(f"offload=true: is planned of {' and '.join(OFFLOADING)} alone")
    if getattr(config, "offload", False) and hardware.device != "cpu" and hardware.offload is None:
        keys = ", ".join(each.name for each in fields(OffloadHost))
        raise UserError(
            f"offload=true: {hardware.name}: its profile does not know the host; give it offload: {{{keys}}}"
        )
    if config.memory:
        raise UserError("memory=report: is for real steps")
