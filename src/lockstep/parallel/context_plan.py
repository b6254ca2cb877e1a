"""What a task says of how ranks may share a sequence, held to its model before anything starts.

    def context_parallel_modules(self, model):
        return ["layers.*.attention"]

names the modules that look beyond one position, or know which position they are at, as in `named_modules()`, with `*` for
any one part. In each of them F.scaled_dot_product_attention sees the positions of all ranks, and its attribute
`positions`, None in one process, is set to the positions that this rank has, int64 [tokens], in every forward:

    class Attention(nn.Module):
        positions: Tensor | None = None

        def forward(self, x):
            positions = torch.arange(x.shape[1], device=x.device) if self.positions is None else self.positions

All else must see each position by itself, and the targets must have been shifted already: [samples, tokens, …], dim 1
the sequence's, as the inputs'.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lockstep.data.batch import describe, map_tensors, tree_tensors
from lockstep.errors import UserError
from lockstep.parallel.task_plans import fitting_modules, require_same_samples
from lockstep.task import option
from lockstep.utils.text import divisors


def context_modules(task: Any, name: str, model: nn.Module, context: int) -> list[str]:
    """The names of the modules that see beyond one position.

    Args:
        name: the task's, for errors.
        model: on any device, the meta device too.
        context: ranks that share a sequence.

    Raises:
        UserError: the task says nothing, or what does not fit the model.
    """
    given = option(task, "context_parallel_modules")
    if given is None:
        raise UserError(
            f"task={name}: says nothing of how ranks could share a sequence; give the task context_parallel_modules(model) "
            "-> names of its attention modules, as task=language has it; or use recipes.fsdp, which trains any model"
        )
    require_same_samples(task, name, context, "a sequence")
    modules = dict(model.named_modules())
    found: list[str] = []
    for pattern in given(model):
        found += fitting_modules(modules, pattern, name, "context_parallel_modules")
    for each in found:
        if not hasattr(modules[each], "positions"):
            raise UserError(
                f"task={name}: context_parallel_modules names {each}, a {type(modules[each]).__name__} without the "
                "attribute positions; give its class `positions = None`, and use them where they are not None"
            )
    return list(dict.fromkeys(found))


def check_attention(
    name: str,
    model: nn.Module,
    names: Sequence[str],
    inputs: Any,
    context: int,
    by: str,
    tensor: int = 1,
    slices: int = 1,
) -> None:
    """Hold one forward to what ranks can share: the sequence's length, and each call of attention.

    Args:
        name: the task's, for errors.
        model: on the meta device, or with memory where it cannot be built there.
        names: `context_modules`'.
        inputs: of one sample.
        tensor: ranks among which heads are cut already.
        slices: into which each rank's positions are cut once more.

    Raises:
        UserError: it calls attention elsewhere, or nowhere, or with what cannot be cut; or the sizes do not divide.
    """
    require_length(sequence_length(inputs), context, by, slices)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    watch = _Watch(model, names)
    # What fails without memory or on one sample may well be able to train: its first step will say.
    with (
        contextlib.suppress(RuntimeError, NotImplementedError, TypeError, ValueError),
        torch.random.fork_rng(devices=[]),
    ):
        with watch, torch.no_grad():
            model(map_tensors(lambda tensor: tensor.to(device), inputs))
        if not watch.calls:
            raise UserError(
                f"task={name}: none of its context_parallel_modules calls torch.nn.functional."
                "scaled_dot_product_attention, which is what sees all ranks' positions; have them call it"
            )
    for call in watch.calls:
        if not call.module:
            raise UserError(
                f"task={name}: context_parallel_modules leaves out a module that calls F.scaled_dot_product_attention, "
                f"which would see this rank's positions alone; it names {', '.join(names)}"
            )
        require_plain_attention(f"task={name}: {call.module}: ", call.query, call.key, call.mask, call.dropout)
        if by == "ulysses":
            require_heads(call.query.shape[1] // tensor, call.key.shape[1] // tensor, context)


@dataclass
class _Call:
    """One of F.scaled_dot_product_attention's, and the named module that it came from; empty: from none."""

    module: str
    query: Tensor
    key: Tensor
    mask: Any
    dropout: float


class _Watch(TorchFunctionMode):
    """Notes each call of attention while it is entered."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._inside: list[str] = []
        self._hooks = list(
            itertools.chain.from_iterable(self._hooks_of(model.get_submodule(name), name) for name in names)
        )

    def _hooks_of(self, module: nn.Module, name: str) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda *_: self._inside.append(name)),
            module.register_forward_hook(lambda *_: self._inside.pop() and None, always_call=True),
        ]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            known = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False)) | named
            where = self._inside[-1] if self._inside else ""
            mask, dropout = known.get("attn_mask"), known.get("dropout_p", 0.0)
            self.calls.append(_Call(where, known["query"], known["key"], mask, dropout))
        return func(*args, **named)


def chunks_of(context: int, by: str) -> int:
    """In how many equal chunks a sequence is cut; a rank has one, or, in the ring's zig-zag, two."""
    return 1 if context == 1 else 2 * context if by == "ring" else context


def sequence_length(inputs: Any) -> int:
    """Dim 1 of the first tensor of the inputs that has one.

    Raises:
        UserError: none has.
    """
    for tensor in tree_tensors(inputs):
        if tensor.dim() > 1:
            return int(tensor.shape[1])
    raise UserError(f"the inputs {describe(inputs)} are no sequences: allowed are tensors [samples, tokens, …]")


def require_length(length: int, context: int, by: str, slices: int = 1) -> None:
    """Hold the length of sequences to the chunks they are cut into, and a rank's positions to `slices`; raises UserError."""

    def works(ranks: int) -> bool:
        return length % chunks_of(ranks, by) == 0 and length // ranks % slices == 0

    if works(context):
        return
    allowed = [str(ranks) for ranks in range(1, length + 1) if works(ranks)]
    some = ", ".join(allowed[:8]) + (", …" if len(allowed) > 8 else "")
    chunks, more = chunks_of(context, by), ""
    if length % chunks == 0:
        more = f", and a rank's by tensor={slices} slices of sequence_parallel=true"
    raise UserError(
        f"context={context}: {length} tokens do not divide by the {chunks} equal chunks that by={by} cuts a sequence into"
        f"{more}; allowed for this length are {some or 'none'}, or for this context sequences of a multiple of "
        f"{math.lcm(chunks, context * slices)}"
    )


def require_heads(heads: int, kv_heads: int, context: int) -> None:
    """Hold the heads to the ranks that each take some of them; raises UserError."""
    if heads % context == 0 and kv_heads % context == 0:
        return
    allowed = divisors(math.gcd(heads, kv_heads))
    what = f"{heads} heads" if heads % context else f"{kv_heads} heads of keys and values"
    raise UserError(
        f"context={context}: by=ulysses gives each rank equally many heads, and the {what} do not divide; allowed for this "
        f"model are {allowed}; or set by=ring, which takes any"
    )


def require_plain_attention(where: str, query: Tensor, key: Tensor, mask: Any, dropout: float) -> None:
    """Hold a call of attention to what can be cut: [N, heads, tokens, width], without a mask or dropout of weights.

    Raises:
        UserError: naming what it has.
    """
    if mask is not None or dropout > 0:
        what = "attn_mask" if mask is not None else f"dropout_p={dropout}"
        raise UserError(
            f"{where}F.scaled_dot_product_attention with {what} cannot be shared by ranks; allowed are is_causal, scale and "
            "enable_gqa"
        )
    if query.dim() != 4 or key.shape[2] != query.shape[2]:
        raise UserError(
            f"{where}F.scaled_dot_product_attention of queries {list(query.shape)} and keys {list(key.shape)} cannot be "
            "shared by ranks; allowed are [samples, heads, tokens, width], queries and keys of the same tokens"
        )
