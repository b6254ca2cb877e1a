"""A model's outer forward as a torch.fx graph: what it calls one after the other, with whole blocks as single calls."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import operator
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import fx, nn

from lockstep.errors import UserError
from lockstep.models.blocks import default_blocks

PLAIN_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda"}
PLAIN_METHODS = {"size", "dim", "numel", "ndimension", "stride", "element_size"}
PLAIN_MODULES = {module.__name__ for module in (operator, builtins, math)} | {"_operator"}


class BlockTracer(fx.Tracer):
    """Follows a forward down to the modules that hold blocks, and no further: what is inside a block may be any Python,
    and so may be what holds no block at all."""

    proxy_buffer_attributes = True  # a slice of a buffer is computed by the parts, not here, once and for all

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not any(name.startswith(f"{qualified_name}.") for name in self._names)


def named_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """The blocks that are named, or those that the model is seen to have, or its direct children.

    Raises:
        UserError: a name is no module's.
    """
    if names is None:
        return default_blocks(model) or [name for name, _ in model.named_children()]
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            raise UserError(f"blocks(model) names {name!r}: no module of {type(model).__name__}; see named_modules()")
    return list(names)


def trace_forward(model: nn.Module, names: Sequence[str]) -> fx.Graph:
    """The graph of a model's forward, arguments with a default left at it.

    The inputs that a dict or a tuple of them holds are taken out of it first of all.

    Args:
        names: the blocks, single calls in the graph.

    Raises:
        UserError: it decides by a tensor's value, does other things in training than in evaluation, or is otherwise
            more than a fixed sequence of operations.
    """
    graphs = []
    for mode in (True, False):
        with _mode(model, names, mode):
            graphs.append(_trace(model, names))
    if _shown(graphs[0]) != _shown(graphs[1]):
        raise UserError(
            f"cut: the forward of {type(model).__name__} does something else in training than in evaluation, outside "
            "its blocks; use nn.Dropout instead of a function, or put it inside a block"
        )
    return graphs[0]


def _trace(model: nn.Module, names: Sequence[str]) -> fx.Graph:
    tracer = BlockTracer(names)
    parameters = inspect.signature(type(model).forward).parameters.values()
    left = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    before = set(vars(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a default is taken for granted
            graph = tracer.trace(model, left)
    except Exception as error:
        for name in set(vars(model)) - before:
            delattr(model, name)
        raise UserError(
            f"cut: the forward of {type(model).__name__} is no fixed sequence of operations{_where(error)}; keep that "
            "inside a block: give the task blocks(model), the names of modules that are each called as a whole"
        ) from None
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if any(node.target == f"{name}_1" for name in left) or (node.target.startswith("*") and not node.users):
            _erase(graph, node)  # and what holds it to its default
    _take_out_inputs(graph)
    return graph


def _where(error: Exception) -> str:
    """The line of the model that could not be followed, and what was said of it."""
    torch_itself = str(Path(torch.__file__).parent)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(torch_itself)
    ]
    mine = [frame for frame in frames if frame.filename != __file__]
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    place = f": {Path(mine[-1].filename).name}:{mine[-1].lineno}: {mine[-1].line}" if mine else ""
    return f"{place} ({said})"


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _take_out_inputs(graph: fx.Graph) -> None:
    """Move what is looked up in an input to the beginning: it is a tensor that may be sent on; a dict, or an object
    with tensors as attributes, is none."""
    inputs = {node for node in graph.nodes if node.op == "placeholder"}
    place = list(inputs and [node for node in graph.nodes if node.op == "placeholder"])[-1:]
    for node in list(graph.nodes):
        item = node.target is operator.getitem and isinstance(node.args[1], str | int)
        attribute = node.target is getattr and node.args[1] not in PLAIN_ATTRIBUTES
        if (item or attribute) and node.args[0] in inputs:
            place[-1].append(node)
            place.append(node)
            inputs.add(node)


def _shown(graph: fx.Graph) -> str:
    return "\n".join(node.format_node() or "" for node in graph.nodes)


@contextlib.contextmanager
def _mode(model: nn.Module, names: Sequence[str], training: bool) -> Iterator[None]:
    """Within it the modules whose own forward is followed are in this mode; no other one is asked."""
    followed = {"", *(name.rpartition(".")[0] for name in names)}
    while more := {name.rpartition(".")[0] for name in followed} - followed:
        followed |= more
    modules = [model.get_submodule(name) for name in sorted(followed)]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def plain_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Those whose values are no tensors: shapes, types, devices, and what is reckoned from them."""
    plain: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        of_attribute = node.target is getattr and node.args[1] in PLAIN_ATTRIBUTES
        of_method = node.op == "call_method" and node.target in PLAIN_METHODS
        reckoned = (
            node.op == "call_function"
            and bool(inputs)
            and all(each in plain for each in inputs)
            and (getattr(node.target, "__module__", None) in PLAIN_MODULES or node.target is torch._assert)
        )
        on_plain = node.op == "call_method" and bool(inputs) and all(each in plain for each in inputs)
        if of_attribute or of_method or reckoned or on_plain:
            plain.add(node)
    return plain


def only_shape_matters(node: fx.Node) -> bool:
    """Whether a plain node asks a tensor, and nothing but its shape, type or device."""
    return node.target is getattr or node.op == "call_method"


def carrier(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor that has a tensor's shape, with a 0 behind it, its type and its device: nothing to send."""
    return x.new_empty((*x.shape, 0))


def carried(x: torch.Tensor) -> torch.Tensor:
    """A tensor without memory of the shape, type and device that a `carrier` brings."""
    return x.new_empty(()).expand(x.shape[:-1])
