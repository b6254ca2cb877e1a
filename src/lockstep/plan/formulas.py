"""The bytes that a technique must send in a step, by formula, to hold against those that were counted.

Of W bytes of weights, on n ranks:

- ddp: an all-reduce of the gradients, W; and a broadcast of the model's buffers, in their own precisions.
- zero1: the same, and a broadcast of the weights that each rank has updated, W in all.
- local_sgd: W in one of `period` steps, so W / period.
- fsdp: every block's weights are gathered for its forward and again for its backward; what is in no block once. Their
  gradients are reduced and scattered. Each tensor's first dim is filled up to a multiple of n. Several copies of the
  model (replicate=R) are n / R ranks each, and all-reduce their gradients' parts.

- pipeline: a stage sends its outputs for every micro-batch, and their gradients come back. The rank that sends most.
- expert_parallel: copies of tokens go to their experts and back, in forward and in backward, and how many they are; the
  mean over the ranks. The gradients of all else are all-reduced, those of experts among the copies of them.
- tensor_parallel: an activation is all-reduced behind the embedding and each half block, and in front of each half block
  and of the output; three numbers per token for the loss. Copies all-reduce their gradients.
- parallel_mesh: what tensor does, on a rank's samples and positions; what fsdp does, on what tensor leaves a rank of each
  weight; keys and values go around among those that share a sequence.
- deepspeed_zero: none here; DeepSpeed's own engine is counted.

A task that counts its own items, such as tokens, has its loader all-reduce one number more.
Source: the recipes' own pages; https://arxiv.org/abs/1910.02054 (ZeRO)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.config.schema import Config
from lockstep.data.batch import map_tensors, tree_tensors
from lockstep.models.experts import MixtureOfExperts
from lockstep.parallel.compressed_gradients import sent_numbers
from lockstep.parallel.expert_plan import expert_modules
from lockstep.parallel.partition import choose_cuts, crossings, split
from lockstep.parallel.tensor_plan import local_shape, tensor_parallel_plan
from lockstep.task import option
from lockstep.tasks.build import blocks_of_task, known_task, sample_of, sketch
from lockstep.training.precision import AUTOCAST, DTYPES, autocast

OVERFLOWED = 4  # bytes of the number by which ranks agree whether a gradient of fp16 has overflowed
COUNTED_ITEMS = 8  # bytes of the number by which ranks agree how many items, such as tokens, a global batch has


def expected_traffic(name: str, config: Config, ranks: int) -> dict[str, int] | None:
    """{kind: bytes per step} of a recipe by formula; None where there is none for it or for these settings."""
    found = technique_traffic(name, config, ranks)
    if found is None:
        return None
    shared = ranks // config.model_parallel_size > 1
    told = COUNTED_ITEMS if shared and option(known_task(config), "weigh") is not None else 0
    told += OVERFLOWED if config.precision == "fp16" and ranks > 1 else 0
    if told:
        found["all-reduce"] = found.get("all-reduce", 0) + told
    return found


def technique_traffic(name: str, config: Any, ranks: int) -> dict[str, int] | None:
    """`expected_traffic` of the technique alone."""
    model = sketch(config)
    if config.accumulate != 1 or not all(each.requires_grad for each in model.parameters()):
        return None
    item = DTYPES[config.precision].itemsize
    if name in ("ddp", "zero1"):
        weights = item * sum(each.numel() for each in model.parameters())
        half = getattr(config, "comm", "fp32") != "fp32"
        buffers = sum(each.numel() * (item if each.is_floating_point() else each.itemsize) for each in model.buffers())
        sent = {"all-reduce": weights // 2 if half else weights}
        if given := buffers + (weights if name == "zero1" else 0):
            sent["broadcast"] = given
        return sent
    if name == "comm_hooks":
        return compressed_traffic(model, config, item)
    if name == "local_sgd":
        return {"all-reduce": round(item * sum(each.numel() for each in model.parameters()) / config.period)}
    if name == "fsdp":
        return sharded_traffic(model, config, ranks // config.replicate, item)
    if name == "pipeline_parallel":
        return staged_traffic(config, ranks, item)
    if name == "expert_parallel":
        return expert_traffic(model, config, ranks, item)
    if name in ("tensor_parallel", "parallel_mesh"):
        return mesh_traffic(model, config, ranks, item)
    return None


def staged_traffic(config: Any, ranks: int, item: int) -> dict[str, int]:
    """`expected_traffic` of the rank of a pipeline that sends most."""
    count, stages, copies = config.parts, config.stages, ranks // config.stages
    task, pieces = known_task(config), config.micro_batches
    inputs = sample_of(task, config.seed)[0]
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        model = task.build_model().to(DTYPES[config.precision])
        blocks = blocks_of_task(task, model)
        parts = split(model, choose_cuts(model, config.cut, count, None, blocks), blocks)
        piece = int(config.global_batch_size) // copies // pieces
        with autocast(config.precision, torch.device("cpu")):
            crossing = crossings(
                parts[:-1], tree_tensors(map_tensors(lambda x: whole_batch_of(x, piece, model), inputs))
            )
        # Of what crosses each cut: the bytes on the way there, and of the gradients on the way back.
        there = [sum(x.nbytes for x in each["output_args"]) for each in crossing]
        back = [sum(x.nbytes for x in each["output_args"] if x.requires_grad) for each in crossing]
    found = []
    for rank in range(stages):
        mine = range(rank, count, stages)
        sent = sum(there[stage] for stage in mine if stage < count - 1) + sum(
            back[stage - 1] for stage in mine if stage
        )
        weights = sum(p.numel() for stage in mine for p in parts[stage].parameters())
        traffic = {"send": pieces * sent} if stages > 1 else {}
        found.append(traffic | ({"all-reduce": item * weights} if copies > 1 else {}))
    return max(found, key=lambda each: sum(each.values()))


def whole_batch_of(sample: Tensor, count: int, model: nn.Module) -> Tensor:
    """A batch of so many samples without numbers, as a model of this precision takes it."""
    dtype = next(model.parameters()).dtype if sample.is_floating_point() else sample.dtype
    return torch.empty((count, *sample.shape[1:]), dtype=dtype)


def expert_traffic(model: nn.Module, config: Any, ranks: int, item: int) -> dict[str, int] | None:
    """`expected_traffic` of experts on ranks of their own, the mean over the ranks."""
    task, mixtures = known_task(config), [each for each in model.modules() if isinstance(each, MixtureOfExperts)]
    plain = config.precision not in AUTOCAST and config.checkpoint_activations == "none"
    if not mixtures or not plain or any(each.capacity is not None for each in mixtures):
        return None
    modules = expert_modules(task, config.task.name, model, config.expert)
    shared = {id(p) for name in modules for p in model.get_submodule(name).parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in shared)
    cut = sum(p.numel() for p in model.parameters() if id(p) in shared) // config.expert
    tokens = int(config.global_batch_size) // ranks * task.tokens_per_sample
    copies = ranks // config.expert
    found = {"all-reduce": item * (dense + (cut if copies > 1 else 0))}
    experts = [len(each.router.weight) for each in mixtures]
    if config.balance == "bias":
        found["all-reduce"] += 8 * sum(experts)
    if config.expert > 1:
        widths = [each.router.weight.shape[1] * each.per_token for each in mixtures]
        found["all-to-all"] = 4 * item * tokens * sum(widths) + 8 * sum(experts)
    return found


def mesh_traffic(model: nn.Module, config: Any, ranks: int, item: int) -> dict[str, int] | None:
    """`expected_traffic` where ranks share layers, and in a mesh also sequences and shards."""
    sharded = config.model_parallel_key != "tensor"
    context = config.context if sharded else 1
    plain = config.precision not in AUTOCAST and config.checkpoint_activations == "none"
    task = known_task(config)
    if config.pipeline_stages > 1:
        return None
    if not plain or getattr(config, "sequence_parallel", False) or (context > 1 and config.by != "ring"):
        return None
    plan = (
        tensor_parallel_plan(task, config.task.name, model, config.tensor, sequence=False) if config.tensor > 1 else {}
    )
    found: dict[str, int] = {}
    copies = ranks // config.tensor // context
    length = task.tokens_per_sample
    if length % context:
        return None
    tokens = int(config.global_batch_size) // copies * length // context
    sizes = {id(p): local_shape(name, tuple(p.shape), plan, config.tensor) for name, p in model.named_parameters()}
    if config.tensor > 1:
        widths = [width_of(model.get_submodule(name), word) for name, word in plan.items()]
        found["all-reduce"] = tokens * (item * sum(widths) + 3 * max(4, item))
    if context > 1:
        heads = model.config.heads, model.config.kv_heads  # type: ignore[union-attr]
        keys = tokens * model.config.width * heads[1] // heads[0] * item  # type: ignore[union-attr]
        found["send"] = len(blocks_of_task(task, model)) * (context - 1) * 6 * keys // config.tensor
    if sharded:
        for kind, size in (
            sharded_traffic(model, config, copies // config.replicate * context, item, sizes) or {}
        ).items():
            found[kind] = found.get(kind, 0) + size
    elif copies > 1:
        found["all-reduce"] += item * sum(math.prod(shape) for shape in sizes.values())
    return found


def width_of(module: nn.Module, word: str) -> int:
    """Numbers per token that a layer of the plan has all-reduced, in forward or in backward."""
    if word == "embedding":
        return module.embedding_dim  # type: ignore[return-value]
    if word == "gather":
        return next(each.in_features for each in module.modules() if isinstance(each, nn.Linear))
    wanted = {"rows": "out_features", "output": "in_features"}.get(word)
    return int(getattr(module, wanted)) if wanted else 0


def compressed_traffic(model: nn.Module, config: Any, item: int) -> dict[str, int] | None:
    """`expected_traffic` of DDP with PowerSGD; rounded buckets are filled up by numbers that only DDP knows."""
    if config.compress != "powersgd" or config.start_step or any(True for _ in model.buffers()):
        return None
    return {"all-reduce": item * sum(sent_numbers(each, config.matrix_rank) for each in model.parameters())}


def sharded_traffic(
    model: nn.Module, config: Any, shards: int, item: int, sizes: dict[int, tuple[int, ...]] | None = None
) -> dict[str, int] | None:
    """`expected_traffic` of FSDP.

    Args:
        sizes: what a rank has of each parameter before it is sharded, by its id; None: all of it.
    """
    narrow = config.precision in AUTOCAST
    if narrow and any(isinstance(each, _BatchNorm) for each in model.modules()):
        return None  # these are gathered apart, in fp32
    blocks = blocks_of_task(known_task(config), model)
    inside = [p for name in blocks for p in model.get_submodule(name).parameters()]
    known = {id(each) for each in inside}
    outside = [each for each in model.parameters() if id(each) not in known]
    gathered = AUTOCAST[config.precision].itemsize if narrow else item
    averaged = gathered if narrow and getattr(config, "reduce", "fp32") == "bf16" else item
    again = 2 if getattr(config, "reshard_after_forward", True) else 1

    def padded(parameters: list[nn.Parameter]) -> int:
        return sum(padded_size((sizes or {}).get(id(each), tuple(each.shape)), shards) for each in parameters)

    within, beside = padded(inside), padded(outside)
    found: dict[str, int] = {}
    if shards > 1:
        found = {"all-gather": gathered * (again * within + beside), "reduce-scatter": averaged * (within + beside)}
    if config.replicate > 1:
        found["all-reduce"] = averaged * (within + beside) // shards
    return found


def padded_size(shape: tuple[int, ...], shards: int) -> int:
    """Numbers of a tensor whose first dim is filled up to a multiple of `shards`."""
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:]) if shape else shards
