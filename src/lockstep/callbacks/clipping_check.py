"""Whether a recipe clips where `gradients.*` asks for it: nothing else clips, so nobody would notice."""

from __future__ import annotations

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.errors import UserError
from lockstep.training.clip import register_clip_pre_hook


class ClippingCheck(Callback):
    """Ends a run after an update whose gradients were not clipped.

    Raises:
        UserError: the recipe does not call `clip_gradients`. On all ranks.
    """

    def __init__(self) -> None:
        self._clipped = False

    def on_train_begin(self, context: CallbackContext) -> None:
        register_clip_pre_hook(context.module, self._saw)

    def _saw(self) -> None:
        self._clipped = True

    def on_step_end(self, context: CallbackContext) -> None:
        if context.updated and not self._clipped:
            raise UserError(
                f"gradients.*: {context.recipe} does not clip; call clip_gradients(model, optimizer, scaler, "
                "run.config.gradients) before the update, or leave gradients.clip_norm and gradients.clip_value out"
            )
