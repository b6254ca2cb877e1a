"""Finds autograd graphs that outlive their step: a loss, or an output, that somebody keeps without detaching it.

`losses.append(loss)` and `total += loss` keep the graph of every step: its nodes, what its functions hold, and, where
no backward has freed them, all activations. Memory then grows with every step, and the error comes hours later,
somewhere else. A graph has no list of who holds it, but one can see whether it is still there.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor

from lockstep.callbacks.base import Callback, CallbackContext
from lockstep.utils.text import some_of

EVERY_STEP = 16  # of the first so many steps every graph is watched, later one in so many
PATIENCE = 3  # steps a graph may outlive its own: a variable still holds the last one


class _GraphMark:
    """Lives as long as the graph node that it was put on."""


class GraphLeakWatch(Callback):
    """Watches the graphs of the losses that a run records, and says once when they pile up."""

    def __init__(self) -> None:
        self._marks: dict[int, weakref.ref[_GraphMark]] = {}  # by step
        self._over = False

    def on_loss(
        self, context: CallbackContext, loss: Tensor, weight: float | Tensor, scalars: dict[str, float | Tensor]
    ) -> None:
        """Put a mark on a step's graph: on its very first node, which every output of the model leads back to."""
        step = context.step
        if self._over or loss.grad_fn is None or step in self._marks or (step > EVERY_STEP and step % EVERY_STEP):
            return
        self._marks = {number: mark for number, mark in self._marks.items() if mark() is not None}
        mark = _GraphMark()
        first_node(loss.grad_fn).metadata["lockstep"] = mark  # a dict of the node's own, freed with it
        self._marks[step] = weakref.ref(mark)

    def on_step_end(self, context: CallbackContext) -> None:
        if self._over or len(self._kept(context.step)) < PATIENCE:
            return
        gc.collect()  # some may only wait for it, in a cycle of references
        kept = self._kept(context.step)
        if len(kept) < PATIENCE:
            return
        self._over, self._marks = True, {}
        context.say(
            f"memory leak: the graphs of steps {some_of([str(step) for step in kept])} are still held, so memory grows "
            "with every step. Something keeps a loss or an output with its graph, as losses.append(loss) and "
            "total += loss do: keep loss.item() or loss.detach() instead"
        )
        context.note("", graphs_kept=kept)

    def _kept(self, done: int) -> list[int]:
        """The steps, from 1 up, whose graphs should have gone when so many steps are done, and have not."""
        return [step + 1 for step, mark in self._marks.items() if step < done - PATIENCE and mark() is not None]


def first_node(node: Any) -> Any:
    """Follow a graph from its end back to an operation whose inputs are the model's parameters or data alone."""
    while True:
        before = [each for each, _ in node.next_functions if each and type(each).__name__ != "AccumulateGrad"]
        if not before:
            return node
        node = before[0]
