"""A task is what is trained: a model, its data and its loss. It knows nothing of ranks; every recipe trains every task.

    @dataclass
    class Diabetes:                                   # task=diabetes.py:Diabetes
        hidden: int = 64                              # task.hidden=128

        def __post_init__(self):
            self.train_set, self.eval_set = ...       # map-style datasets: index -> (inputs, targets)

        def build_model(self):
            return nn.Sequential(nn.Linear(10, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))

        def loss(self, outputs, targets):
            return mse_loss(outputs, targets)

A plain class with these methods is one; deriving from `Task` adds the defaults below, and says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn


class Task:
    """What is trained. Only `train_set`, `build_model` and `loss` must be there.

    Attributes:
        train_set: a map-style dataset: index → (inputs, targets), each any pytree (tensor, number, array, dict, tuple,
            dataclass); or an iterable one, a stream. `__getitem__` runs under Python's, NumPy's and torch's generators
            seeded by (seed, epoch, index), so that random transforms do not depend on ranks, workers and resumes.
        eval_set: the same, to evaluate on; None: nothing is evaluated.
        sample_weights: [len(train_set)]: how often each sample is drawn, relative to the others, with replacement.
        stream_per_rank: whether a stream is each rank's own part already, and not the whole.
        epoch_samples: samples that count as an epoch, for a stream without a length.
        unit: what a sample is called, in the plural.
        tokens_per_sample: of a model of sequences; then a run also tells tokens per second and MFU.
        lower_is_better: names of metrics that are better when smaller. `loss` always is.
        defaults: {key: value} of other keys, such as {"optim.lr": 0.003}, where the command says nothing else.
        best: the metric that `metric=null` stands for.
    """

    train_set: Any
    eval_set: Any = None
    sample_weights: Tensor | None = None
    stream_per_rank: bool = False
    epoch_samples: int | None = None
    unit: str = "samples"
    tokens_per_sample: int | None = None
    lower_is_better: Collection[str] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    best: str = "loss"

    def build_model(self) -> nn.Module:
        """The model, on the CPU or wherever torch's default device is, its weights drawn from torch's generator."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss over the samples, or over what `weigh` counts: one number."""
        raise NotImplementedError

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, tuple[Any, Any]]:
        """{name: (sum, count)} of a batch, numbers or tensors of any shape, computed from float64.

        They are added up over all batches and ranks, exactly; `summarise` makes one number of each.
        """
        return {}

    def summarise(self, totals: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """{name: value} of the whole evaluation set from the added-up (sum, count): by default sum / count."""
        return {name: float(total.double() / count) for name, (total, count) in totals.items()}

    def torchmetrics(self) -> Mapping[str, Any]:
        """{name: torchmetrics.Metric}, beside `metrics` or instead: new ones at each call, for one evaluation.

        Each gets `update(outputs, targets)` of every batch, floats in float64, and computes one number: exactly what it
        makes of the whole evaluation set, on any number of ranks. Its states may be reduced by sum, cat, min and max.
        """
        return {}

    show: Callable[[Any], str] | None = None  # show(model) → text for the end of a run; all ranks call it together
    weigh: Callable[[Any], Tensor] | None = None  # weigh(targets) → items that the loss is a mean over, such as tokens
    collate: Callable[[list[Any]], Any] | None = None  # collate(samples) → (inputs, targets); None: default_collate
    to_device: Callable[[Any, Any], Any] | None = None  # to_device(inputs, targets), both there already, → the same
    # mistakes(outputs, targets) → int64 [batch, 3]: place in the batch, -1 if it is right; label; prediction. The first
    # ones of the last evaluation are in result.json.
    mistakes: Callable[[Any, Any], Tensor] | None = None
    pictures: Callable[[list[int]], Tensor] | None = None  # pictures(numbers in eval_set) → uint8 [N, 3, H, W], of them
    blocks: Callable[[Any], Sequence[str]] | None = None  # blocks(model) → names of modules to shard or cut between
    # tensor_parallel_plan(model) → {module: how ranks share it}, as lockstep.parallel.tensor_plan has it, and
    # tensor_parallel_counts(model) → {name: a number of which each rank needs an equal share, such as heads}.
    tensor_parallel_plan: Callable[[Any], Mapping[str, str]] | None = None
    tensor_parallel_counts: Callable[[Any], Mapping[str, int]] | None = None
    # context_parallel_modules(model) → names of what looks beyond a position, as lockstep.parallel.context_plan has it.
    context_parallel_modules: Callable[[Any], Sequence[str]] | None = None
    # expert_parallel_modules(model) → names of what holds experts, as lockstep.parallel.expert_plan has it.
    expert_parallel_modules: Callable[[Any], Sequence[str]] | None = None


def option(task: Any, name: str) -> Any:
    """An optional attribute or method of a task, whether it derives from Task or not."""
    found = getattr(task, name, None)
    return getattr(Task, name) if found is None else found


def metrics_of(task: Any) -> Callable[[Any, Any], Mapping[str, tuple[Tensor, Tensor]]]:
    """A task's `metrics`, or one that gives none."""
    return getattr(task, "metrics", None) or (lambda outputs, targets: {})


def summary_of(task: Any) -> Callable[[Mapping[str, tuple[Tensor, Tensor]]], dict[str, float]]:
    """A task's `summarise`, or sum / count."""
    found = getattr(task, "summarise", None)
    return found if found is not None else Task.summarise.__get__(task)
