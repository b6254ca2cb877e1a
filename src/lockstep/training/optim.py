"""What updates the weights, and with which learning rate: the optimizer and its schedule, built from `optim.*`."""

from __future__ import annotations

import base64
import inspect
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lockstep.config.schema import OPTIMIZERS, OptimConfig
from lockstep.distributed.dtensor import is_sharded
from lockstep.errors import UserError
from lockstep.training.muon import MuonAndAdamW

OURS = ("params", "lr", "weight_decay", "momentum", "nesterov")  # arguments that have keys of their own, or none
CLOSURE = ("LBFGS", "SparseAdam")  # need a closure, or sparse gradients, which no recipe has

Trained = nn.Module | Iterable[nn.Module] | Iterable[dict[str, Any]]


def build_optimizer(config: OptimConfig, model: Trained) -> Optimizer:
    """The optimizer that `optim.*` describes, over a model's parameters.

    `optim.name` is sgd, adamw, adam, lion or muon, or a class of torch.optim such as torch.optim.RMSprop. It gets
    `optim.lr`, `optim.weight_decay` where it has one, sgd `optim.momentum` and `optim.nesterov`, and each what is in
    `optim.arguments`. Muon is made for matrices: it updates the parameters of two dims, and AdamW all others, embeddings
    too, whose rows are a table and no matrix.

    Args:
        model: a module, wrapped or not; several, such as the stages of one rank; or groups of parameters as torch's
            optimizers take them, `{"params": [...], "lr": ...}`. Build the optimizer last: what wraps or shards a model
            afterwards may replace its parameters.

    Raises:
        UserError: this torch has no such class, or the class has no such argument, or refuses its value.
    """
    groups = parameter_groups(model)
    if not config.decay_norms_and_biases:
        groups = [part for group in groups for part in _without_decay(group)]
    groups = [part for group in groups for part in _of_one_kind(group)]
    cls, arguments = optimizer_class(config), optimizer_arguments(config)
    try:
        if cls.__name__ == "Muon":
            return MuonAndAdamW(groups, arguments, embeddings_of(model))
        return cls(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name={config.name}: {error}; optim.* has its arguments") from None


def parameter_groups(model: Trained) -> list[dict[str, Any]]:
    """The parameters of one or more modules as one group, or groups as they are."""
    if isinstance(model, nn.Module):
        return [{"params": list(model.parameters())}]
    found = list(model)
    if found and isinstance(found[0], dict):
        return [{**group, "params": list(group["params"])} for group in cast(list[dict[str, Any]], found)]
    modules = cast(list[nn.Module], found)
    return [{"params": [parameter for module in modules for parameter in module.parameters()]}]


def embeddings_of(model: Trained) -> list[Tensor]:
    """The weights of the nn.Embeddings in one or more modules; of groups of parameters nobody knows."""
    modules = [model] if isinstance(model, nn.Module) else [each for each in model if isinstance(each, nn.Module)]
    layers = (layer for module in modules for layer in module.modules())
    return [layer.weight for layer in layers if isinstance(layer, nn.Embedding)]


def _without_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group in two, the second without weight decay: parameters of at most one dim, which are norms and biases."""
    decayed = [parameter for parameter in group["params"] if parameter.dim() > 1]
    others = [parameter for parameter in group["params"] if parameter.dim() <= 1]
    parts = [{**group, "params": decayed}, {**group, "params": others, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def _of_one_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group in two where some parameters are sharded and others are not: on a GPU, torch updates a group in one call,
    which takes either."""
    kinds = {kind: [each for each in group["params"] if is_sharded(each) == kind] for kind in (False, True)}
    return [{**group, "params": own} for own in kinds.values() if own] if all(kinds.values()) else [group]


def optimizer_class(config: OptimConfig) -> type[Any]:
    """The class that `optim.name` names; raises UserError where this torch has none."""
    name = OPTIMIZERS.get(config.name, config.name.removeprefix("torch.optim."))
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer) or name in CLOSURE:
        every = (each for each, value in vars(torch.optim).items() if isinstance(value, type) and each not in CLOSURE)
        allowed = ", ".join(sorted(each for each in every if each != "Optimizer"))
        raise UserError(f"optim.name={config.name}: allowed of torch {torch.__version__}'s optimizers are {allowed}")
    return cls


def optimizer_arguments(config: OptimConfig) -> dict[str, Any]:
    """What the class is called with besides the parameters; raises UserError where it has no such argument."""
    cls = optimizer_class(config)
    takes = inspect.signature(cls).parameters
    allowed = [name for name in takes if name not in (OURS if cls is SGD else OURS[:3])]
    for name, value in config.arguments.items():
        if name not in allowed:
            other = f"; set optim.{name}" if name in OURS[1:] else ""
            raise UserError(
                f"optim.arguments.{name}={value}: allowed for {config.name} are {', '.join(allowed)}{other}"
            )
    if config.nesterov and cls is not SGD:
        raise UserError(f"optim.nesterov=true: optim.name={config.name} does not take it; sgd does")
    found: dict[str, Any] = {"lr": config.lr}
    if "weight_decay" in takes:
        found["weight_decay"] = config.weight_decay
    if cls is SGD:
        found |= {"momentum": config.momentum, "nesterov": config.nesterov}
    return found | config.arguments


def check_optimizer(config: OptimConfig) -> None:
    """Hold `optim.*` to what the optimizer's class takes; raises UserError."""
    build_optimizer(config, [nn.Linear(1, 1)])


def states_per_weight(config: OptimConfig) -> tuple[int, int]:
    """(numbers that the optimizer keeps for each weight, numbers besides that it keeps for each parameter)."""
    layer = nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(replace(config, lr=0.0), layer)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    states = [value for value in optimizer.state[layer.weight].values() if isinstance(value, Tensor)]
    return sum(value.dim() > 0 for value in states), sum(value.dim() == 0 for value in states)


class JointOptimizer(Optimizer):
    """Several optimizers behind one face: for checkpoints, for who looks on, and for `step()` of all of them.

    Groups and states are the optimizers' own, not copies, and a recipe may step each of them whenever it wants to.

    Raises:
        UserError: two of them update the same tensor.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        # Not Optimizer's: it would make groups and a state of its own.
        self.parts = list(parts)
        self.defaults: dict[str, Any] = {}
        self._before: list[Callable[..., None]] = []
        self._after: list[Callable[..., None]] = []
        self._updating = False  # one of them has made an update in this step
        owners: dict[int, Optimizer] = {}
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                if owners.setdefault(id(parameter), part) is not part:
                    raise UserError(
                        f"optimizer: {type(owners[id(parameter)]).__name__} and {type(part).__name__} both update a tensor "
                        f"{list(parameter.shape)}; give each parameter to one of them"
                    )
            part.register_step_pre_hook(self._begin_update)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self, closure: Any = None) -> Any:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer's: parameters are numbered on from one to the next."""
        found: dict[str, Any] = {"state": {}, "param_groups": []}
        for first, part in zip(self._first_numbers(), self.parts, strict=True):
            own = part.state_dict()
            found["state"] |= {first + number: state for number, state in own["state"].items()}
            found["param_groups"] += [_renumbered(group, first) for group in own["param_groups"]]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states, groups = state_dict["state"], iter(state_dict["param_groups"])
        for first, part in zip(self._first_numbers(), self.parts, strict=True):
            own = [_renumbered(next(groups), -first) for _ in part.param_groups]
            numbers = {number for group in own for number in group["params"]}
            state = {number: states[first + number] for number in numbers if first + number in states}
            part.load_state_dict({"state": state, "param_groups": own})

    def _first_numbers(self) -> list[int]:
        counts = [sum(len(group["params"]) for group in part.param_groups) for part in self.parts]
        return [sum(counts[:place]) for place in range(len(counts))]

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Called once in each step of the training, before the first of the optimizers makes its update."""
        return _Hook(self._before, hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Called once in each step of the training in which any of them has made an update, at its end."""
        return _Hook(self._after, hook)

    def _begin_update(self, *_: Any) -> None:
        if not self._updating:
            self._updating = True
            for hook in list(self._before):
                hook(self, (), {})

    def end_step(self) -> None:
        """To be called when a step of the training is over."""
        if self._updating:
            self._updating = False
            for hook in list(self._after):
                hook(self, (), {})


class _Hook:
    """What a registered hook is removed by."""

    def __init__(self, hooks: list[Callable[..., None]], hook: Callable[..., None]) -> None:
        self._hooks, self._hook = hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        self._hooks.remove(self._hook)


def _renumbered(group: dict[str, Any], by: int) -> dict[str, Any]:
    return group | {"params": [number + by for number in group["params"]]}


def as_one_optimizer(optimizer: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """One optimizer: itself, or several behind one face."""
    return optimizer if isinstance(optimizer, Optimizer) else JointOptimizer(optimizer)


# The learning rate --------------------------------------------------------------------------------------------------


def build_scheduler(config: OptimConfig, optimizer: Optimizer, steps: int) -> WarmupLR:
    """The learning rate as `optim.schedule` and `optim.warmup_steps` say; call its step() after each update.

    Args:
        optimizer: each of its groups keeps its own peak learning rate.
        steps: over which it falls: those of all epochs, `run.scheduled_steps`.
    """
    return WarmupLR(optimizer, lr_factor(config, steps))


def lr_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """step → factor on optim.lr: a linear warm-up, then constant or a half cosine down to 0.

    It spans all epochs even where max_steps ends the run earlier, so that a shorter run is a prefix of the longer one.
    Source: https://arxiv.org/abs/1608.03983 (cosine), https://arxiv.org/abs/1706.02677 (warm-up).
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


class WarmupLR(LambdaLR):
    """A learning rate that follows from the step and the config alone.

    So a run that resumes needs no state of it: with another batch size, or other `optim.*`, the rate is the one that
    the present config has at that step.
    """

    def set_step(self, step: int) -> None:
        """Go to the rate of the update after so many."""
        self.last_epoch = step
        self._last_lr = [base * factor(step) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class SchedulerState:
    """A scheduler of any class as an entry of a checkpoint, with the optimizer's settings, which it may change.

    Both are kept as text: a scheduler's state may be any nested plain value, and its tensors are the same on all ranks.

    Raises:
        UserError: the state holds more than plain values and tensors, and could not be read back.
    """

    def __init__(self, scheduler: LRScheduler, optimizer: Optimizer) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer
        try:
            _unpack(self.state_dict()["packed"])
        except Exception as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"scheduler: the state of {type(scheduler).__name__} holds more than plain values, and no checkpoint "
                f"could keep it ({said})"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        buffer = io.BytesIO()
        torch.save({"scheduler": self._scheduler.state_dict(), "groups": groups}, buffer)
        return {"packed": base64.b64encode(buffer.getvalue()).decode()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = _unpack(state["packed"])
        self._scheduler.load_state_dict(saved["scheduler"])
        for group, settings in zip(self._optimizer.param_groups, saved["groups"], strict=True):
            group.update(settings)


Schedule = LRScheduler | Sequence[LRScheduler] | None


def schedulers(given: Schedule) -> list[LRScheduler]:
    """None, one or several, as a list."""
    return [] if given is None else list(given) if isinstance(given, Sequence) else [given]


def scheduler_states(given: Schedule) -> dict[str, SchedulerState]:
    """What checkpoints keep of schedulers, by name: nothing of a WarmupLR."""
    found = {"scheduler" if not place else f"scheduler{place}": each for place, each in enumerate(schedulers(given))}
    return {
        name: SchedulerState(each, each.optimizer) for name, each in found.items() if not isinstance(each, WarmupLR)
    }


def go_to_step(given: Schedule, step: int) -> None:
    """Set the rates of those that follow from the step, WarmupLRs."""
    for each in schedulers(given):
        if isinstance(each, WarmupLR):
            each.set_step(step)


def _unpack(text: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
    return found
