"""What checkpoints can hold: objects with a state_dict, and trainers that keep files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.checkpoint.directory import FileContents

if TYPE_CHECKING:
    from lockstep.training.local_gradients import LocalGradients


class Stateful(Protocol):
    """A GradScaler, an average of the weights, …: its state is a flat dict of tensors and JSON values.

    One that differs between ranks has their numbers in its tensors' names, and a method that is called with how many
    ranks have saved it and {name: shape} of what they saved: `saved_by(ranks, shapes) -> dict[str, Tensor]`, tensors
    that are filled and handed to `load_state_dict`. JSON values are rank 0's.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Engine(Protocol):
    """A trainer from elsewhere that keeps weights and optimizer in files of its own, such as DeepSpeed.

    Its files become part of a checkpoint as if lockstep had written them: in the background, with their hashes in the
    manifest, flushed, and under their final name only when all of them are complete. So it returns bytes, and leaves
    the disk alone: on a full one, one rank would fail and the others wait for it.

    All ranks call each method together, except `weights`.

    Attributes:
        name: of the folder within a checkpoint that holds its files.
    """

    name: str

    def files(self) -> FileContents:
        """{file name: content}: what this rank holds of the state, copied."""
        ...

    def restore(self, folder: Path, same_ranks: bool) -> None:
        """Take over the state in a folder of its files.

        Args:
            same_ranks: as many ranks as now have saved it: then training must continue with the same bits.
        """
        ...

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over a plain state_dict of the whole model, on the CPU, and leave the optimizer as it is."""
        ...

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """The plain state_dict in a folder of its files, on the CPU. One rank calls it alone."""
        ...

    def parts(self, module: nn.Module, optimizer: Optimizer) -> LocalGradients:
        """Where this rank's gradients and weights are seen, in `module` and `optimizer`, those that `run.steps` has."""
        ...


def require_tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint keeps tensors alone; hand it to keep=")
    return value
