"""Autocast, and loss scaling for fp16 on which all ranks agree.

fp16 has 5 bits for the exponent: gradients below 6e-8 become zero, and what is above 65504 infinite. So the loss is
multiplied by a large number before backward, its gradients are divided by it in fp32 before the update, and where one
of them is not finite the update is left out and the number halved; after many good steps it is doubled. bf16 has
fp32's exponent and needs none of this.
Source: https://arxiv.org/abs/1710.03740, https://docs.pytorch.org/docs/stable/amp.html
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lockstep.distributed.dtensor import local_shard
from lockstep.errors import UserError

GOOD_STEPS = 2000  # in a row, after which the scale is doubled
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}  # of weights
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context for forward and loss: bf16 or fp16 where the precision says so, else nothing."""
    return torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else contextlib.nullcontext()


class Scaler(torch.amp.GradScaler):
    """A GradScaler with which all ranks leave a step out, or none does.

    torch's decides for each process by the gradients it holds. Those of a pipeline's stage are that rank's alone: the
    stages would continue with weights that do not belong together, and with different scales. So the ranks that have
    found something not finite tell all others, in an all-reduce of one number per step.

    A step that is left out is a step: its batch is used up and the schedule advances, so the order of the data
    stays a function of the step alone. Weights and optimizer stay as they are, and hooks on the optimizer's step
    (where gradients are clipped, on values that are unscaled already) are not called.

    Several optimizers are stepped together, `scaler.step([muon, adamw])`: one by one, torch would leave out the update of
    one and make the other's.

    Args:
        device: where the ranks communicate.
        first: the scale to begin with.
        enabled: else `scale` gives back what it gets, `step` is the optimizer's and `update` does nothing.

    Attributes:
        skipped: steps that were left out.
        left_out: whether the last one was.
    """

    def __init__(self, device: torch.device, first: float = 2.0**16, enabled: bool = True) -> None:
        super().__init__(device.type, init_scale=first, growth_interval=GOOD_STEPS, enabled=enabled)
        self.skipped = 0
        self.left_out = self._overflow = False
        self._alone: set[int] = set()  # optimizers that were stepped by themselves since the last update
        self._found: dict[int, bool] = {}  # whether an optimizer's gradients of this step overflow
        if enabled:
            # Where the first steps are left out, the scheduler's step() comes before the optimizer's, as it should.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
            self.scale(torch.zeros((), device=device))  # makes the scale, also where no loss comes by to be scaled

    @property
    def overflows(self) -> bool:
        """Whether the gradients of this step, unscaled already, are not all finite: it is going to be left out."""
        return self._overflow

    def unscale_together(self, optimizers: Sequence[Optimizer]) -> None:
        """Divide the gradients of all by the scale, where that is not done; where one's are not finite, no one's are."""
        if not self.is_enabled():
            return
        for each in optimizers:
            if self._per_optimizer_states[id(each)]["stage"] is OptState.READY:
                self.unscale_(each)
        if self._overflow:
            for each in optimizers:
                self._found[id(each)] = True
                for found in self._per_optimizer_states[id(each)]["found_inf_per_device"].values():
                    found.fill_(1.0)

    def step(self, optimizer: Optimizer | Sequence[Optimizer], *args: Any, **kwargs: Any) -> float | None:
        """Make the update of an optimizer, or of several: of all of them, or of none."""
        if not isinstance(optimizer, Optimizer):
            self.unscale_together(optimizer)
            for each in optimizer:
                super().step(each, *args, **kwargs)
            return None
        if self.is_enabled():
            self._alone.add(id(optimizer))
        return super().step(optimizer, *args, **kwargs)

    def unscale_loss(self, loss: Tensor) -> Tensor:
        """A loss that `scale` has scaled, as it was; before the step's `update`. Does not wait for the GPU."""
        return loss if not self.is_enabled() or self._scale is None else loss / self._scale.to(loss.device)

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's, which would ask the GPU again what `_unscale_grads_` has asked."""
        if id(optimizer) not in self._found:
            return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        return None if self._found[id(optimizer)] else optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Halve the scale after a step that was left out, double it after many that were not.

        Raises:
            UserError: not even a loss that is not scaled up has finite gradients; or several optimizers were stepped
                one by one. On all ranks.
        """
        if len(self._alone) > 1:
            raise UserError(
                f"precision=fp16: scaler.step took {len(self._alone)} optimizers one by one, and could leave out the update "
                "of one of them alone; call scaler.step([...]) with all of them, or set precision=bf16"
            )
        self._alone.clear()
        super().update(new_scale)
        self._count()

    def leave_out(self) -> None:
        """Halve the scale for a step that an engine of its own has left out, on all ranks."""
        self._overflow = True
        backed_off = {"scale": self.get_scale() * self.get_backoff_factor(), "_growth_tracker": 0}
        self.load_state_dict(self.state_dict() | backed_off)
        self._count()

    def _count(self) -> None:
        self.left_out, self._overflow = self._overflow, False
        self._found.clear()
        self.skipped += self.left_out
        if self.left_out and self.get_scale() < 1:
            raise UserError(
                f"precision=fp16: gradients are not finite, {self.skipped} steps left out, the loss scale is below 1; "
                "the training has diverged: lower optim.lr, or set precision=bf16"
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"skipped": self.skipped} if self.is_enabled() else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.skipped = state_dict.get("skipped", 0)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Divide the gradients by the scale, in place; {device: 1 if any rank has found one that is not finite}.

        In place of torch's, also of ShardedGradScaler's: of DTensors each mesh would agree by itself, on the device that
        holds the shards, and with host offload that is the CPU, where the ranks of a mesh of GPUs cannot communicate.
        """
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        with torch.no_grad():
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                gradient = local_shard(parameter.grad)
                if gradient.dtype == torch.float16 and not allow_fp16:
                    raise ValueError("gradients in fp16 cannot be unscaled: keep the weights in fp32")
                if gradient.numel():
                    alike.setdefault((gradient.device, gradient.dtype), []).append(gradient)
            for (device, _), gradients in alike.items():
                found = torch.zeros((), device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inv_scale.to(device))
                found_inf = torch.maximum(found_inf, found.to(found_inf.device))
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        self._found[id(optimizer)] = overflows = bool(found_inf.item())  # the one wait for the GPU in a step
        self._overflow = self._overflow or overflows
        return {found_inf.device: found_inf}
