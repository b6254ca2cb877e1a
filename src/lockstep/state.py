"""What a training must remember to go on as if it had never stopped, as named tensors and JSON.

Weights and buffers, the optimizer's state, whatever else a recipe hands to `run.steps(keep=...)`, and every random
number generator of every rank. The data order needs no state (lockstep.order), and the learning rate follows from the
step.

Tensors carry the names they have in the whole model (`model.fc.weight`, `optim.fc.weight.exp_avg`), whichever rank
holds them, so that other ranks, or another number of them, find theirs again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lockstep.checkpoint import Files
from lockstep.errors import UserError

if TYPE_CHECKING:
    from lockstep.gradients import Parts


class Stateful(Protocol):
    """A GradScaler, an average of the weights, …: its state is a flat dict of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Engine(Protocol):
    """A trainer from elsewhere that keeps weights and optimizer in files of its own, such as DeepSpeed.

    Its files become part of a checkpoint as if lockstep had written them: in the background, with their hashes in the
    manifest, flushed, and under their final name only when all of them are complete. So it hands over bytes, and leaves
    the disk alone: on a full one, one rank would fail and the others wait for it.

    All ranks call each method together, except `weights`.

    Attributes:
        name: of the folder within a checkpoint that holds its files.
    """

    name: str

    def files(self) -> Files:
        """{file name: content}: what this rank holds of the state, copied."""
        ...

    def restore(self, folder: Path, same_ranks: bool) -> None:
        """Take over the state in a folder of its files.

        Args:
            same_ranks: as many ranks as now have saved it: then training must go on to the same bits.
        """
        ...

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over a plain state_dict of the whole model, on the CPU, and leave the optimizer as it is."""
        ...

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """The plain state_dict in a folder of its files, on the CPU. One rank calls it alone."""
        ...

    def parts(self, module: nn.Module, optimizer: Optimizer) -> Parts:
        """Where this rank's gradients and weights are seen, in `module` and `optimizer`, those that `run.steps` has."""
        ...

    def keep_gradients(self, into: dict[str, Tensor]) -> None:
        """Fill a dict with the first update's gradients, whole and by the model's names, when they are there."""
        ...


class TrainingState:
    """The state of one rank's training.

    Args:
        module: what this rank holds of the model, unwrapped, under the names of the whole model.
        keep: {name: object}, kept besides model and optimizer; equal on all ranks.
        engine: what keeps model and optimizer instead, in files of its own.
        owns_buffers: whether this rank's buffers count. Ranks that share a module's work each have running statistics
            of their own where BatchNorm is local; evaluation and DDP take the first one's, and so does a checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        keep: Mapping[str, Stateful],
        *,
        rank: int,
        device: torch.device,
        owns_buffers: bool,
        engine: Engine | None = None,
    ) -> None:
        self.module, self.optimizer, self.keep, self.engine = module, optimizer, keep, engine
        self.rank, self.device, self.owns_buffers = rank, device, owns_buffers
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = optimizer.param_groups if optimizer and not engine else []
        if not all(id(p) in names for group in groups for p in group["params"]):
            raise UserError(
                "optimizer: holds tensors that are not the model's parameters, which would never change; "
                "build it last: place the model, wrap or shard it, then make the optimizer from its parameters()"
            )
        # In the order in which the optimizer numbers them in its own state_dict.
        self.trained = [(names[id(p)], p) for group in groups for p in group["params"]]

    def files(self) -> Files:
        """What the engine's own files are to hold, by their paths in the checkpoint."""
        return {f"{self.engine.name}/{name}": data for name, data in self.engine.files().items()} if self.engine else {}

    def tensors(self) -> dict[str, Tensor]:
        """What this rank holds besides, not copied."""
        parameters = {name for name, _ in self.module.named_parameters()}
        found = {}
        for name, tensor in self._model().items():
            if name in parameters or self.owns_buffers:
                found[f"model.{name}"] = tensor
        states = self.optimizer.state if self.optimizer else {}
        for name, parameter in self.trained:
            for entry, value in states.get(parameter, {}).items():
                if value is not None:
                    found[f"optim.{name}.{entry}"] = require_tensor(value, f"optimizer state {entry}")
        for name, thing in self.keep.items():
            found |= {f"keep.{name}.{k}": v for k, v in thing.state_dict().items() if isinstance(v, Tensor)}
        return found | {f"rng.{self.rank}.{name}": state for name, state in generators(self.device).items()}

    def facts(self) -> dict[str, Any]:
        """What of the state is no tensor, as JSON."""
        states = {name: thing.state_dict() for name, thing in self.keep.items()}
        plain = {name: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for name, state in states.items()}
        return {"keep": json.loads(json.dumps(plain)), "engine": self.engine and self.engine.name}

    def restore(self, path: Path, facts: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        """Take over the state in a checkpoint. All ranks call it together.

        Raises:
            UserError: it is another model's.
        """
        from lockstep import storage  # a second to import, which a run that starts at step 0 need not wait for

        there, here = facts.get("engine"), self.engine and self.engine.name
        if there != here:
            raise UserError(
                f"{path}: holds {there or 'lockstep'}'s files, and this recipe reads {here or 'lockstep'}'s; "
                f"go on with recipes.{facts['recipe']}, or take the weights alone, with resume=RUN/model.pt"
            )
        saved = storage.described(path)
        wanted: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in self._model().items()}
        for name, tensor in wanted.items():
            shape = tuple(saved[name].size) if name in saved else None
            check_shape(path, name.removeprefix("model."), shape, tuple(tensor.shape))
        moments: list[dict[str, Tensor]] = []
        for name, parameter in self.trained:
            prefix = f"optim.{name}."
            mine = {key.removeprefix(prefix): saved[key] for key in saved if key.startswith(prefix)}
            moments.append(
                {
                    entry: torch.empty_like(parameter, requires_grad=False)
                    if tuple(info.size) == tuple(parameter.shape) and parameter.dim()
                    else torch.empty(info.size, dtype=info.properties.dtype)
                    for entry, info in mine.items()
                }
            )
            wanted |= {f"{prefix}{entry}": tensor for entry, tensor in moments[-1].items()}
        kept = {name: thing.state_dict() for name, thing in self.keep.items()}
        for name, state in kept.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = wanted[f"keep.{name}.{key}"] = value.clone()
        # Other ranks than those that saved have no generators there; they keep the seeds they started with.
        streams = generators(self.device) if facts["world_size"] == dist.get_world_size() else {}
        streams = {name: state for name, state in streams.items() if f"rng.{self.rank}.{name}" in saved}
        wanted |= {f"rng.{self.rank}.{name}": state for name, state in streams.items()}
        storage.load(path, wanted, group)
        if self.engine:
            self.engine.restore(path / self.engine.name, facts["world_size"] == dist.get_world_size())
        elif self.optimizer:
            packed = self.optimizer.state_dict()
            packed["state"] = {number: state for number, state in enumerate(moments) if state}
            self.optimizer.load_state_dict(packed)
        for name, thing in self.keep.items():
            thing.load_state_dict(kept[name] | facts["keep"].get(name, {}))
        set_generators(streams, self.device)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over plain weights."""
        if self.engine:
            self.engine.load(weights)
        else:
            fill(self.module, weights)

    def _model(self) -> dict[str, Tensor]:
        if self.engine:
            return {}
        return {name: require_tensor(value, name) for name, value in self.module.state_dict().items()}


def require_tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint keeps tensors alone; hand it to keep=")
    return value


def check_shape(path: Path, name: str, there: tuple[int, ...] | None, here: tuple[int, ...]) -> None:
    """Refuse a tensor that is missing or has another shape; raises UserError."""
    if there is None:
        raise UserError(f"{path}: holds no {name}; set model=… and model.norm=… to the model that was saved")
    if there != here:
        raise UserError(
            f"{path}: {name} is {list(there)} there and {list(here)} here; "
            "set model=… and model.num_classes=… to the model that was saved"
        )


def generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every random number generator of this process, as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3, "the layout below is that of Python's version 3"
    _, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*words, float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def seed_generators(seed: int) -> None:
    """Start every random number generator of this process from one number."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators into the states that `generators` gave."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        *words, gauss = states["python"].tolist()
        random.setstate((3, tuple(int(word) for word in words), None if gauss != gauss else gauss))
    if "numpy" in states:
        *keys, position, has_gauss, cached = states["numpy"].tolist()
        array = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", array, int(position), int(has_gauss), cached))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def settle_buckets(model: nn.Module, images: Tensor) -> None:
    """Bring DistributedDataParallel's buckets into the order they had when the training was cut off.

    After a process's first backward DDP sorts its buckets anew, by the order in which gradients became ready. From
    three ranks on, a ring all-reduce adds the ranks' numbers in an order that depends on their place in the bucket, so
    a resumed run would take its first step with other last bits. One backward that is thrown away settles it; running
    statistics and random numbers are put back.
    """
    for wrapped in model.modules():  # Lightning's wrappers hold one
        if isinstance(wrapped, DistributedDataParallel):
            random, buffers = generators(images.device), [buffer.clone() for buffer in wrapped.buffers()]
            wrapped.train()
            wrapped(images).sum().backward()
            wrapped.zero_grad()
            set_generators(random, images.device)
            for buffer, before in zip(wrapped.buffers(), buffers, strict=True):
                buffer.copy_(before)


# Tensors in shards ------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which a rank holds a part. (To import the class takes half a second.)"""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """The complete tensor. Where it is sharded, all ranks call this together, and `device` is where they talk."""
    return cast(Any, tensor.to(device)).full_tensor() if is_sharded(tensor) else tensor


def whole_weights(module: nn.Module, device: torch.device, keep: bool) -> dict[str, Tensor]:
    """The complete state_dict on the CPU where `keep`, else nothing. All ranks call it; one tensor after the other is
    put together on `device`, so that a model that fits no device whole can be exported."""
    found = {}
    for name, tensor in module.state_dict().items():
        complete = whole(tensor.detach(), device)
        if keep:
            found[name] = complete.cpu()
    return found


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy complete weights, which this rank has, into a module; of a sharded tensor it takes its part."""
    for name, mine in module.state_dict().items():
        tensor = weights[name]
        if is_sharded(mine):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = cast(Any, mine).device_mesh, cast(Any, mine).placements
            tensor = distribute_tensor(tensor.to(mine.dtype), mesh, placements, src_data_rank=None)
        mine.copy_(tensor)


# Plain weights ----------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that torch.save wrote: by itself, or as `model`, `state_dict` or `model_state_dict`.

    Raises:
        UserError: it holds something else, or loading it would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or isinstance(error, ModuleNotFoundError):
            raise UserError(
                f"resume={path}: refused, for loading it would run code from the file; "
                "save the weights alone: torch.save(model.state_dict(), path)"
            ) from None
        raise UserError(f"resume={path}: not a file of torch.save's ({said}); name a state_dict or a run") from None
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"resume={path}: holds no state_dict; save one: torch.save(model.state_dict(), path)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def check_weights(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model; raises UserError naming the first tensor that does not fit."""
    for name, tensor in wanted.items():
        check_shape(path, name, tuple(weights[name].shape) if name in weights else None, tuple(tensor.shape))
    more = sorted(set(weights) - set(wanted))
    if more:
        raise UserError(f"{path}: holds {more[0]}, which the model has not; set model=… to the model that was saved")
