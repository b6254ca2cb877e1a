"""What a training program of your own calls, so that `recipes.verify program=…` can judge it (docs/your_program.md):

    import lockstep.verify
    lockstep.verify.watch(model, optimizer)

Started by anything else than recipes.verify the call returns at once, and the lines may stay where they are.

Each rank writes a file per optimizer step into the folder that recipes.verify names in an environment variable: the losses;
of the first step also the weights before and after it and its gradients; of the last step the weights and buffers after it.
Then it ends the process. Shards (DTensor) are put together, and the first rank of their mesh writes them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

RECORDS = "LOCKSTEP_RECORDS"  # the folder
RECORDED_STEPS = "LOCKSTEP_RECORDED_STEPS"  # how many steps are written
OTHERS_SECONDS = 60  # for the other ranks' last step: a rank that leaves earlier would break their collectives
# What wrappers put into the names of parameters: DDP, torch.compile, FSDP, activation checkpointing, Fabric.
WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_watchers: list[ProgramWatcher] = []


def watch(model: nn.Module, optimizer: Any = None) -> None:
    """Write down what this program computes, if recipes.verify has started it; else do nothing.

    To be called before training, when the model has been made; whether it has been wrapped yet does not matter.

    Args:
        model: what is trained. Several models: nn.ModuleList([...]).
        optimizer: whose `step` is a step of training, also one that Accelerate or Lightning has wrapped; None: the first
            that updates a parameter of the model.

    Raises:
        RuntimeError: it is called a second time.
    """
    if RECORDS not in os.environ:
        return
    if _watchers:
        raise RuntimeError(
            "lockstep.verify.watch is called a second time; of several models, watch nn.ModuleList([...])"
        )
    _watchers.append(ProgramWatcher(model, optimizer, Path(os.environ[RECORDS]), int(os.environ[RECORDED_STEPS])))


def record(loss: Any, weight: float = 1.0) -> None:
    """Say what the loss of this step is, instead of what `backward` is called on.

    Needed where the mean of what the ranks call `backward` on is not the loss of the whole batch, though the gradients are
    those of it. Several calls in a step, one per micro-batch, are averaged by their weights, and so are the ranks.

    Args:
        loss: a number or a tensor of one, the mean over the samples (or tokens) that this rank has seen.
        weight: how many of them there are.
    """
    for watcher in _watchers:
        watcher.recorded.append((loss.detach() if hasattr(loss, "detach") else loss, float(weight)))


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def by_plain_name(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by their plain names; by their full ones where two would have the same."""
    full = dict(tensors)
    plain = {plain_name(name): tensor for name, tensor in full.items()}
    return plain if len(plain) == len(full) else full


def whole_copy(tensor: Tensor) -> Tensor | None:
    """A copy in main memory; of shards all of it, on the first rank of their mesh, and None on the others."""
    tensor = tensor.detach()
    mesh = getattr(tensor, "device_mesh", None)  # DTensor
    if mesh is not None:
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        if any(mesh.get_coordinate() or ()):
            return None
    return tensor.to("cpu", copy=True)


def put_together(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within it, what FullyShardedDataParallel has flattened and sharded is whole; all else is as it was.

    Raises:
        RuntimeError: its parameters have no gradients of their own.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FullyShardedDataParallel", None)
    if kind is None or not any(isinstance(each, kind) for each in model.modules()):
        return contextlib.nullcontext()
    if any(name.endswith("_flat_param") for name, _ in model.named_parameters()):
        raise RuntimeError(
            "lockstep.verify.watch: FullyShardedDataParallel(use_orig_params=False) has no gradient per parameter; set "
            "use_orig_params=True, or use fully_shard"
        )
    return cast(
        contextlib.AbstractContextManager[Any], kind.summon_full_params(model, writeback=False, with_grads=True)
    )


def own_rank() -> tuple[int, int]:
    """(rank, world size) of this process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class ProgramWatcher:
    """Looks on at one process's training through the public hooks of torch's optimizers, and at what backward is called on.

    Attributes:
        losses: what backward was called on since the last step.
        recorded: (loss, weight) that the program has said since the last step.
        autocast: the dtypes that torch.autocast was entered with.
    """

    def __init__(self, model: nn.Module, optimizer: Any, folder: Path, steps: int) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        while hasattr(optimizer, "optimizer"):  # Accelerate's, Lightning's, Fabric's
            optimizer = optimizer.optimizer
        self.model, self.optimizer, self.folder, self.steps = model, optimizer, folder, steps
        self.losses: list[Tensor] = []
        self.recorded: list[tuple[Any, float]] = []
        self.autocast: set[str] = set()
        self.step = 0
        self.tensors: dict[str, dict[str, Tensor]] = {}
        (folder / f"watched-{os.getpid()}").touch()
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)
        see_backward(self.losses)
        see_autocast(self.autocast)

    def counts(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's steps are those of training.

        Raises:
            RuntimeError: it is the one that was named, and updates flat copies (DeepSpeed's) or another model.
        """
        if self.optimizer not in (None, optimizer):
            return False
        if not self.step:
            mine = {id(parameter) for parameter in self.model.parameters()}
            if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
                if self.optimizer is None:
                    return False
                raise RuntimeError(
                    "lockstep.verify.watch: the optimizer updates no parameter of the model; name those that are"
                )
            self.optimizer = optimizer
        return True

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the first step's weights and gradients; the latter come with the closure where there is one (Lightning)."""
        if not self.counts(optimizer) or self.step:
            return None
        self.keep_parameters("start")
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self.keep_gradients()
            return None

        @functools.wraps(closure)
        def seen() -> Any:
            result = closure()
            if "gradients" not in self.tensors:  # of several evaluations the first
                self.keep_gradients()
            return result

        return ((args[0], seen, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": seen})

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write down the step; after the last one, end the process."""
        if not self.counts(optimizer):
            return
        self.step += 1
        if self.step in (1, self.steps):
            self.keep_parameters("weights")
        if self.step == self.steps:
            self.keep("buffers", self.model.named_buffers())
        self.write()
        if self.step == self.steps:
            self.leave()

    def keep(self, kind: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        found = {name: whole_copy(tensor) for name, tensor in by_plain_name(tensors).items()}
        self.tensors[kind] = {name: tensor for name, tensor in found.items() if tensor is not None}

    def keep_parameters(self, kind: str) -> None:
        with put_together(self.model):
            self.keep(kind, self.model.named_parameters())

    def keep_gradients(self) -> None:
        with put_together(self.model):
            parameters = self.model.named_parameters()
            self.keep("gradients", ((name, each.grad) for name, each in parameters if each.grad is not None))

    def write(self) -> None:
        import torch

        rank, world_size = own_rank()
        said = self.recorded or [(loss, 1.0) for loss in self.losses]
        content = {
            "rank": rank,
            "world_size": world_size,
            "losses": [
                (float(getattr(loss, "full_tensor", lambda each=loss: each)()), weight) for loss, weight in said
            ],
            "recorded": bool(self.recorded),
            "autocast": sorted(self.autocast),
            "tensors": self.tensors,
        }
        file = self.folder / f"step{self.step:06d}-rank{rank:05d}-{os.getpid()}.pt"
        torch.save(content, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        self.losses.clear()
        self.recorded, self.tensors = [], {}

    def leave(self) -> None:
        """End the process, when the other ranks have written their last step, too."""
        _, world_size = own_rank()
        deadline = time.monotonic() + OTHERS_SECONDS
        while len(list(self.folder.glob(f"step{self.steps:06d}-*.pt"))) < world_size and time.monotonic() < deadline:
            time.sleep(0.02)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # not an exception: a trainer might catch it, save and evaluate


def see_backward(losses: list[Tensor]) -> None:
    """From now on, add to `losses` each number that backward is called on, by `loss.backward()` too."""
    from torch import Tensor, autograd

    backward: Callable[..., Any] = autograd.backward

    @functools.wraps(backward)
    def seen(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        if grad_tensors is None:  # else it is a piece of a backward: of a pipeline's stage, a checkpointed block
            roots = [tensors] if isinstance(tensors, Tensor) else tensors
            losses.extend(each.detach() for each in roots if isinstance(each, Tensor))
        return backward(tensors, grad_tensors, *args, **kwargs)

    autograd.backward = seen


def see_autocast(dtypes: set[str]) -> None:
    """From now on, add to `dtypes` what torch.autocast is entered with: weights and losses do not show it."""
    import torch

    enter = torch.autocast.__enter__

    @functools.wraps(enter)
    def seen(self: torch.autocast) -> Any:
        entered = enter(self)
        if torch.is_autocast_enabled(self.device):
            dtypes.add(str(torch.get_autocast_dtype(self.device)))
        return entered

    torch.autocast.__enter__ = seen  # type: ignore[method-assign]
