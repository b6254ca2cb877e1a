"""All that a training needs in order to resume as if it had never stopped, as named tensors and JSON.

Weights and buffers, the optimizer's state, whatever else a recipe hands to `run.steps(keep=...)`, and every random
number generator of every rank. The data order needs no state (lockstep.data.sampler), and the learning rate of
`build_scheduler` follows from the step.

Tensors carry the names they have in the whole model (`model.fc.weight`, `optim.fc.weight.exp_avg`), whichever rank
holds them, so that other ranks, or another number of them, find theirs again. torch.distributed.checkpoint.state_dict
has helpers for such names, but to read or set an optimizer's state they take a step with it, whose hooks would run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.checkpoint.directory import FileContents
from lockstep.checkpoint.prefixes import check_shape
from lockstep.checkpoint.types import Engine, Stateful, require_tensor
from lockstep.distributed.collectives import on_any_rank
from lockstep.distributed.dtensor import full_state_dict, load_full_state_dict, local_shard
from lockstep.errors import UserError
from lockstep.training.random_state import generators, set_generators


class TrainingState:
    """The state of one rank's training.

    Args:
        module: what this rank holds of the model, unwrapped, under the names of the whole model.
        keep: {name: object}, kept besides model and optimizer; equal on all ranks.
        engine: what keeps model and optimizer instead, in files of its own.
        whole: gives what is evaluated and exported, complete, where a recipe says so; all ranks call it together.
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
        whole: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.whole = whole
        self.module, self.optimizer, self.keep, self.engine = module, optimizer, keep, engine
        self.rank, self.device, self.owns_buffers = rank, device, owns_buffers
        # Where ranks hold different weights under the same names, a checkpoint has rank 0's under theirs.
        self.own_weights = any(getattr(thing, "own_weights", False) for thing in keep.values())
        # Whether a training's last bits depend on where in DDP's buckets a gradient lies, also on two ranks.
        self.by_place = any(getattr(thing, "by_place", False) for thing in keep.values())
        self._mine = f"replica.{rank}." if self.own_weights and rank else ""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = optimizer.param_groups if optimizer and not engine else []
        if not all(id(p) in names for group in groups for p in group["params"]):
            raise UserError(
                "optimizer: holds tensors that are not the model's parameters, which would never change; "
                "build it last: place the model, wrap or shard it, then make the optimizer from its parameters()"
            )
        # In the order in which the optimizer numbers them in its own state_dict.
        self.trained = [(names[id(p)], p) for group in groups for p in group["params"]]

    def files(self) -> FileContents:
        """What the engine's own files are to hold, by their paths in the checkpoint."""
        return {f"{self.engine.name}/{name}": data for name, data in self.engine.files().items()} if self.engine else {}

    def tensors(self) -> dict[str, Tensor]:
        """What this rank holds besides, not copied."""
        parameters = {name for name, _ in self.module.named_parameters()}
        found = {}
        for name, tensor in self._model().items():
            if name in parameters or self.owns_buffers or self.own_weights:
                found[f"{self._mine}model.{name}"] = tensor
        states = self.optimizer.state if self.optimizer else {}
        for name, parameter in self.trained:
            for entry, value in states.get(parameter, {}).items():
                if value is not None:
                    found[f"{self._mine}optim.{name}.{entry}"] = require_tensor(value, f"optimizer state {entry}")
        for name, thing in self.keep.items():
            found |= {f"keep.{name}.{k}": v for k, v in thing.state_dict().items() if isinstance(v, Tensor)}
        return found | {f"rng.{self.rank}.{name}": state for name, state in generators(self.device).items()}

    def exported(self) -> dict[str, Tensor]:
        """On rank 0 what would be exported now, as `whole.NAME`; nothing where that is the model that `tensors` has.

        It is something else where a recipe evaluates an average of the weights. All ranks call it together.
        """
        if self.whole is None or self.engine:
            return {}
        whole = self.whole()
        theirs, parameters = whole.state_dict(), {name for name, _ in self.module.named_parameters()}
        differs = any(
            name not in theirs or not _equal(tensor, theirs[name])
            for name, tensor in self._model().items()
            if name in parameters or self.owns_buffers
        )
        if not on_any_rank(differs, self.device):
            return {}
        found = full_state_dict(whole, self.device, keep=self.rank == 0)
        return {f"whole.{name}": tensor for name, tensor in found.items()}

    def facts(self) -> dict[str, Any]:
        """What of the state is no tensor, as JSON."""
        states = {name: thing.state_dict() for name, thing in self.keep.items()}
        plain = {name: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for name, state in states.items()}
        found = {"keep": json.loads(json.dumps(plain)), "engine": self.engine and self.engine.name}
        return found | ({"own_weights": True} if self.own_weights else {})

    def restore(self, path: Path, facts: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        """Take over the state in a checkpoint. All ranks call it together.

        Raises:
            UserError: it is another model's.
        """
        from lockstep.checkpoint import dcp  # a second to import, which a run that starts at step 0 need not wait for

        there, here = facts.get("engine"), self.engine and self.engine.name
        if there != here:
            raise UserError(
                f"{path}: holds {there or 'lockstep'}'s files, and this recipe reads {here or 'lockstep'}'s; "
                f"resume it with recipes.{facts['recipe']}, or take the weights alone, with resume=RUN/model.pt"
            )
        replicas = facts["world_size"] if facts.get("own_weights") else 0
        if replicas != (dist.get_world_size() if self.own_weights else 0):
            holds = f"the different weights of {replicas} ranks" if replicas else "the same weights for all ranks"
            raise UserError(
                f"{path}: holds {holds}; resume it with recipes.{facts['recipe']}"
                + (f" on {replicas} ranks" if replicas else "")
                + ", or take the weights alone, with resume=RUN/model.pt"
            )
        saved = dcp.tensor_metadata(path)
        wanted: dict[str, Tensor] = {f"{self._mine}model.{name}": tensor for name, tensor in self._model().items()}
        if not self.engine:
            self._refuse_more(path, saved, facts["recipe"])
        for name, tensor in wanted.items():
            shape = tuple(saved[name].size) if name in saved else None
            check_shape(path, name.removeprefix(f"{self._mine}model."), shape, tuple(tensor.shape))
        moments: list[dict[str, Tensor]] = []
        keeps = getattr(self.optimizer, "keeps", lambda parameter: True)
        for name, parameter in self.trained:
            prefix = f"{self._mine}optim.{name}."
            if not keeps(parameter):  # another rank reads its state
                moments.append({})
                continue
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
        shapes = {key: tuple(info.size) for key, info in saved.items()}
        kept = {name: expected_state(name, thing, facts["world_size"], shapes) for name, thing in self.keep.items()}
        for name, state in kept.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = wanted[f"keep.{name}.{key}"] = value.clone()
        # Other ranks than those that saved have no generators there; they keep the seeds they started with.
        streams = generators(self.device) if facts["world_size"] == dist.get_world_size() else {}
        streams = {name: state for name, state in streams.items() if f"rng.{self.rank}.{name}" in saved}
        wanted |= {f"rng.{self.rank}.{name}": state for name, state in streams.items()}
        dcp.load_tensors(path, wanted, group)
        if self.engine:
            self.engine.restore(path / self.engine.name, facts["world_size"] == dist.get_world_size())
        elif self.optimizer:
            packed = self.optimizer.state_dict()
            packed["state"] = {number: state for number, state in enumerate(moments) if state}
            self.optimizer.load_state_dict(packed)
        for name, thing in self.keep.items():
            thing.load_state_dict(kept[name] | facts["keep"].get(name, {}))
        set_generators(streams, self.device)

    def _refuse_more(self, path: Path, saved: Iterable[str], recipe: str) -> None:
        """Refuse a tensor of a layer that this rank has, and that has no such tensor here: it would be dropped."""
        layers, here = {name for name, _ in self.module.named_modules()}, self._model()
        for key in saved:
            name = key.removeprefix(f"{self._mine}model.")
            layer = name.rpartition(".")[0]
            if name != key and name not in here and layer and layer in layers:
                raise UserError(
                    f"{path}: holds {name}, which {layer} does not have here; resume it with recipes.{recipe} and the keys "
                    "that it had"
                )

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over plain weights."""
        if self.engine:
            self.engine.load(weights)
        else:
            load_full_state_dict(self.module, weights)

    def _model(self) -> dict[str, Tensor]:
        if self.engine:
            return {}
        return {name: require_tensor(value, name) for name, value in self.module.state_dict().items()}


def expected_state(name: str, thing: Stateful, ranks: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What is read of a kept object that `ranks` ranks have saved, in a checkpoint that holds tensors of these shapes."""
    if not hasattr(thing, "saved_by"):
        return thing.state_dict()
    prefix = f"keep.{name}."
    mine = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    found: dict[str, Any] = thing.saved_by(ranks, mine)
    return found


def _equal(mine: Tensor, other: Tensor) -> bool:
    """Whether this rank holds the same of both, to the last bit."""
    mine, other = local_shard(mine), local_shard(other)
    return mine.dtype == other.dtype and mine.shape == other.shape and torch.equal(mine, other.to(mine.device))
