"""The mutants' own code: what stands in the place of ours while a bug is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import checkpoint

from lockstep.data import loader, sampler
from lockstep.data.sampler import EvalSampler, StepSampler, rank_slice, sample_uniform
from lockstep.distributed.dtensor import is_sharded, local_shard
from lockstep.loop import training_loop
from lockstep.models import experts, gpt
from lockstep.models.lora import LoraConv2d, LoraLinear
from lockstep.parallel import outer_optimizer
from lockstep.parallel.context import ContextShare
from lockstep.parallel.experts import average_over_ranks
from lockstep.parallel.outer_optimizer import OuterOptimizer
from lockstep.parallel.tensor import SlicedDropout, complete_gradients
from lockstep.run import Run
from lockstep.tasks.language import IGNORED
from lockstep.training import activation_checkpointing, clip
from lockstep.training.accumulate import MicroBatch
from lockstep.training.optim import build_optimizer
from lockstep.verify.museum.bug import Patch, swapped

# Data -----------------------------------------------------------------------------------------------------------------


def everyone_reads_rank_0_s(run: Run[Any]) -> AbstractContextManager[None]:
    def same(order: Any, step: int, batch_size: int, rank: int, world_size: int) -> Tensor:
        return rank_slice(order, step, batch_size, 0, world_size)

    return swapped(sampler, "rank_slice", same)


def every_epoch_is_the_first(run: Run[Any]) -> AbstractContextManager[None]:
    order = StepSampler.order
    return swapped(StepSampler, "order", lambda self, epoch: order(self, 0))


def all_samples_draw_alike(run: Run[Any]) -> AbstractContextManager[None]:
    def same(seed: int, epoch: int, samples: Tensor, draws: int) -> Tensor:
        return sample_uniform(seed, epoch, samples[:1].expand_as(samples), draws)

    return swapped(loader, "sample_uniform", same)


# Evaluation -----------------------------------------------------------------------------------------------------------


class Padded(EvalSampler):
    """The set filled up from its start, until it divides into batches; the copies count."""

    def __init__(self, sound: EvalSampler) -> None:
        self.real = sound.size
        whole = sound.batches() * sound.batch_size
        super().__init__(whole, sound.batch_size, sound.rank, sound.world_size)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return ((number, samples % self.real) for number, samples in super().__iter__())


def padded_evaluation(run: Run[Any]) -> AbstractContextManager[None]:
    sound = run.data.eval_sampler
    return swapped(run.data, "eval_sampler", lambda: Padded(sound()))


def batches_weigh_alike(run: Run[Any]) -> AbstractContextManager[None]:
    """What a batch counts in an evaluation: 1, whatever its size."""
    return swapped(run.data.task, "weigh", lambda targets: torch.ones((), dtype=torch.int64))


def eval_does_nothing(run: Run[Any]) -> AbstractContextManager[None]:
    return swapped(nn.Module, "eval", lambda self: self)


def of_first_rank(loss: Tensor) -> Tensor:
    found = loss.detach().clone()
    dist.broadcast(found, src=0)
    return found


# Resuming -------------------------------------------------------------------------------------------------------------


def starts_at(place: Callable[[int, int], int]) -> Patch:
    """A run that is resumed at a step reads its data from another one: place(step, steps per epoch)."""

    def patch(run: Run[Any]) -> AbstractContextManager[None]:
        batches = run.data.train_batches

        def moved(start: int, stop: int) -> Any:
            first = place(start, run.steps_per_epoch) if start else 0
            return batches(first, first + stop - start)

        return swapped(run.data, "train_batches", moved)

    return patch


def schedule_begins_anew(run: Run[Any]) -> AbstractContextManager[None]:
    return swapped(training_loop, "go_to_step", lambda scheduler, step: None)


# Gradients ------------------------------------------------------------------------------------------------------------


def own_norm(tensors: Iterable[Tensor], stages: Any = None) -> Tensor:
    """Of what this rank holds alone."""
    norms = [torch.linalg.vector_norm(local_shard(tensor)).double() for tensor in tensors]
    return torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)


def norm_with_copies(tensors: Iterable[Tensor], stages: Any = None) -> Tensor:
    """Over all ranks, each with all that it holds, what others hold as well included."""
    squares = own_norm(tensors).square()
    dist.all_reduce(squares)
    return squares.sqrt()


def clips_by(norm: Any) -> Patch:
    return lambda run: swapped(clip, "total_norm", norm)


def keep_partial_gradients(model: nn.Module) -> None:
    """Of weights that each rank has whole, take its addend of a gradient for the sum."""
    for parameter in model.parameters():
        gradient, wanted = cast(Any, parameter.grad), cast(Any, parameter)
        if is_sharded(parameter) and gradient is not None and all(each.is_replicate() for each in wanted.placements):
            parameter.grad = DTensor.from_local(gradient.to_local(), wanted.device_mesh, wanted.placements)
    complete_gradients(model)


@torch.no_grad()
def sum_experts_gradients(model: nn.Module, mesh: Any) -> None:
    """Those of experts are sums over the ranks that share them, and not means."""
    average_over_ranks(model, mesh)
    for parameter in model.parameters():
        if is_sharded(parameter) and parameter.grad is not None:
            local_shard(parameter.grad).mul_(mesh["expert"].size())


def leave_routers_apart(model: nn.Module, mesh: Any) -> None:
    """All gradients are averaged but the routers'."""
    own = {p: p.grad.clone() for name, p in model.named_parameters() if "router" in name and p.grad is not None}
    average_over_ranks(model, mesh)
    for parameter, gradient in own.items():
        parameter.grad = gradient


def alpha_not_divided(run: Run[Any]) -> AbstractContextManager[None]:
    prepare = cast(Any, run.prepare)

    def scaled(model: nn.Module) -> None:
        prepare(model)
        for layer in model.modules():
            if isinstance(layer, LoraLinear | LoraConv2d):
                layer.lora_scale *= run.config.r

    return swapped(run, "prepare", scaled)


def balance_teaches_nothing(run: Run[Any]) -> AbstractContextManager[None]:
    sound = experts.unevenness
    return swapped(experts, "unevenness", lambda shares, chosen: sound(shares, chosen).detach())


def recomputed_dropout_is_another(run: Run[Any]) -> AbstractContextManager[None]:
    forgetful = partial(checkpoint.checkpoint, preserve_rng_state=False)
    return swapped(activation_checkpointing, "checkpoint", forgetful)


def recomputed_batches_count_twice(run: Run[Any]) -> AbstractContextManager[None]:
    def plain(block: nn.Module) -> tuple[Any, Any]:
        return contextlib.nullcontext(), contextlib.nullcontext()

    return swapped(activation_checkpointing, "recompute_contexts", plain)


# Sequences ------------------------------------------------------------------------------------------------------------


def one_mask_for_all_slices(run: Run[Any]) -> AbstractContextManager[None]:
    return swapped(SlicedDropout, "forward", nn.Dropout.forward)


def positions_from_0(run: Run[Any]) -> AbstractContextManager[None]:
    """Each rank turns its tokens as if they began the sequence."""
    rotation = gpt.rotation

    def local(positions: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return rotation(torch.arange(len(positions), device=positions.device), *others)

    return swapped(gpt, "rotation", local)


def without_last_target(share: ContextShare, micro: MicroBatch) -> MicroBatch:
    """Targets as they are where inputs are cut first and shifted then: a part's last token has no successor."""
    part = share.part(micro)
    if share.place == share.size - 1:
        return part
    targets = part.targets.clone()
    targets[:, -1] = IGNORED
    return part._replace(targets=targets)


# Optimizers -----------------------------------------------------------------------------------------------------------


def build_with_a_step_made(config: Any, model: nn.Module) -> Optimizer:
    """After a step with gradients of zero that changes no weight, made to allocate the state; it is counted."""
    optimizer = build_optimizer(config, model)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, (rate, decay) in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
    return optimizer


def build_with_all_decayed(config: Any, model: nn.Module) -> Optimizer:
    return build_optimizer(replace(config, decay_norms_and_biases=True), model)


def outer_step_goes_backwards(run: Run[Any]) -> AbstractContextManager[None]:
    synchronise, mean = OuterOptimizer._synchronise, outer_optimizer.all_reduce_mean

    def backwards(self: OuterOptimizer, names: list[str]) -> None:
        with swapped(outer_optimizer, "all_reduce_mean", lambda tensors: [-each for each in mean(tensors)]):
            synchronise(self, names)

    return swapped(OuterOptimizer, "_synchronise", backwards)


# Weights --------------------------------------------------------------------------------------------------------------


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of the same model, as if it had been trained: drawn from another seed."""
    drawn = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=drawn).to(tensor)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def load_trained(run: Run[Any], model: nn.Module) -> None:
    model.load_state_dict(trained_weights(model), strict=False)


def names_do_not_fit(run: Run[Any]) -> AbstractContextManager[None]:
    def prefixed(model: nn.Module) -> None:
        weights = {f"module.{name}": tensor for name, tensor in trained_weights(model).items()}
        model.load_state_dict(weights, strict=False)

    return swapped(run, "prepare", prefixed)
