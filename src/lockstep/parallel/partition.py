"""Cutting any model into consecutive parts: by name, evenly, or so that the parts cost the same.

The outer forward is traced by torch.fx with each block as one call, and the graph is cut before some of these calls.
A part is the operations in between, under the names that its modules have in the model.
Source: https://arxiv.org/abs/2112.08429 (torch.fx)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from lockstep.config.keys import AUTO
from lockstep.data.batch import tree_tensors
from lockstep.errors import UserError
from lockstep.parallel.graph import carried, carrier, named_blocks, plain_nodes, trace_forward

Names = Sequence[str] | Callable[[nn.Module], Sequence[str]] | None
Crossing = tuple[fx.Node, bool]  # a value that a later part needs, or of a tensor its shape alone (True)


def blocks(model: nn.Module, names: Names = None) -> dict[str, nn.Module]:
    """A model as what its forward calls one after the other: {name: module}, whole blocks and the layers in between."""
    return {name: model.get_submodule(name) for name in _Cutter(model, names).calls}


def units(model: nn.Module, names: Names = None) -> dict[str, list[str]]:
    """What a cut may not tear apart: {first of its modules: its modules}. The stem, each block, and the head.

    A ReLU that works in place is one with what it works on. Inside the stem and the head there is nothing to gain.
    """
    return _Cutter(model, names).units()


class Part(nn.Module):
    """Consecutive blocks of a model, under the names they have there: the parts' state_dicts make up the model's."""

    def __init__(self, model: nn.Module, graph: fx.Graph, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.held = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        for name in self.held:
            hold(self, model, name)
        code = graph.python_code("self")
        space = dict(code.globals)
        exec(compile(code.src, f"<the part from {names[0] if names else 'the start'}>", "exec"), space)
        self._run = space["forward"]

    def forward(self, *inputs: Any) -> Any:
        """The model's inputs, or what the part before gives, to what the next part takes, or the model's outputs.

        One tensor, or a tuple of them where several cross a cut.
        """
        return self._run(self, *inputs)


def hold(holder: nn.Module, model: nn.Module, name: str) -> None:
    """Give a module, parameter or buffer of a model to another module too, under the same dotted name."""
    *path, last = name.split(".")
    owner = model.get_submodule(".".join(path))
    for step in path:
        if not hasattr(holder, step):
            holder.add_module(step, nn.Module())
        holder = holder.get_submodule(step)
    value = getattr(owner, last)
    if isinstance(value, nn.Module):
        holder.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        holder.register_parameter(last, value)
    else:  # a tensor that is neither is no part of the model's state, but goes where the part goes
        kept = last in owner._buffers and last not in owner._non_persistent_buffers_set
        holder.register_buffer(last, value, persistent=kept)


def join(parts: Sequence[Part]) -> nn.Module:
    """A module that holds what some parts of a model hold, under the model's names; it cannot be called."""
    joined = nn.Module()
    for part in parts:
        for name in part.held:
            hold(joined, part, name)
    return joined


def split(model: nn.Module, firsts: Sequence[str], names: Names = None) -> list[Part]:
    """Cut a model before each of the named blocks; the parts share its parameters.

    What a later part needs crosses each cut up to there, tensor by tensor. Of a tensor of which it needs the shape
    alone, an empty tensor crosses, so that a batch of any size finds its own. A buffer is in each part that uses it.

    Raises:
        UserError: two parts would hold the same parameter.
    """
    return _Cutter(model, names).split(list(firsts))


def wanted_cut(cut: Any, parts: int) -> Any:
    """The cut that is asked for; more than two parts are balanced by default."""
    return "balanced" if cut == AUTO and parts > 2 else cut


def choose_cuts(model: nn.Module, cut: Any, parts: int, inputs: Any, names: Names = None) -> list[str]:
    """The first block of each part but the first.

    Args:
        cut: a layer or block name, a list of them, `even`: as many blocks in each, `balanced`: measured on `inputs`, or
            `auto`: before layer3 in two parts where there is one, else `even`.
        parts: how many parts there are to be.
        inputs: a micro-batch on the device that is measured, a tuple where its forward takes several arguments.
        names: the blocks, or a function that names them; None: those that the model is seen to have.

    Raises:
        UserError: a name is no layer, the order is wrong, or the number of names does not make that many parts.
    """
    firsts = list(units(model, names))
    layers = dict.fromkeys(_layer(name) for name in firsts[1:])
    if cut == AUTO:
        cut = "layer3" if "layer3" in layers and parts == 2 else "even"
    if cut in ("even", "balanced"):
        check_count(cut, len(firsts), parts)
        costs = [1.0] * len(firsts) if cut == "even" else measure_units(model, inputs, names)
        return [firsts[start] for start in balance(costs, parts)[1:]]
    asked = list(cut) if isinstance(cut, list) else [str(cut)]
    found = [next((name for name in firsts[1:] if name == word or name.startswith(f"{word}.")), "") for word in asked]
    shown = f"[{','.join(map(str, asked))}]" if isinstance(cut, list) else asked[0]
    allowed = ", ".join(dict.fromkeys([*layers, *firsts[1:]]))
    if "" in found:
        raise UserError(f"cut={shown}: not a layer to cut before; allowed are {allowed}, even or balanced")
    if sorted(found, key=firsts.index) != found or len(set(found)) != len(found):
        raise UserError(f"cut={shown}: the cuts must be in the model's order, each once: {allowed}")
    if len(found) != parts - 1:
        raise UserError(
            f"cut={shown}: makes {len(found) + 1} parts, not {parts}; name {parts - 1} layers, or even or balanced"
        )
    return found


def _layer(name: str) -> str:
    """layer1 of layer1.0, and encoder.layers of encoder.layers.encoder_layer_0."""
    return name.rpartition(".")[0] or name


def check_cut(build: Callable[[], nn.Module], cut: Any, parts: int, names: Names = None) -> None:
    """Refuse a cut that `choose_cuts` or `split` would, on a model without memory where it can be had: names need no
    weights.

    Args:
        build: makes the model.

    Raises:
        UserError: the model cannot be cut, or not there.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = build()
        except (NotImplementedError, RuntimeError):  # it looks at numbers while it is built
            model = build()
    # What `balanced` will choose is measured later; that there are blocks enough is known now.
    if cut == "balanced":
        check_count(cut, len(units(model, names)), parts)
        cut = "even"
    split(model, choose_cuts(model, cut, parts, None, names), names)


def check_count(cut: str, blocks: int, parts: int) -> None:
    """Hold the number of parts to that of the blocks; raises UserError."""
    if parts > blocks:
        raise UserError(f"cut={cut}: the model has {blocks} blocks to cut between, too few for {parts} parts")


def measure_units(model: nn.Module, inputs: Any, names: Names = None, rounds: int = 7) -> list[float]:
    """Seconds of each unit's forward and backward: the median of several rounds, for a noisy one misplaces a cut.

    Each unit is on the inputs' device as long as it computes, so that the whole model need not fit there.
    """
    model = copy.deepcopy(model).train()
    parts = split(model, list(units(model, names))[1:], names)
    seconds: list[list[float]] = [[] for _ in parts]
    home = next(model.parameters()).device
    device = next((x.device for x in tree_tensors(inputs)), home)
    for _ in range(rounds):
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        for number, part in enumerate(parts):
            if number:
                values = tuple(x.detach().requires_grad_(x.requires_grad) for x in values)
            part.to(device)
            started = _clock(device)
            outputs = part(*values)
            values = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
            if wanted:
                torch.autograd.backward([x.sum() for x in wanted])
            seconds[number].append(_clock(device) - started)
            part.to(home)
    return [statistics.median(times) for times in seconds]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def crossings(parts: Sequence[nn.Module], inputs: Iterable[Any]) -> list[dict[str, Any]]:
    """What a PipelineStage of each part is told where no other rank can be asked: input_args and output_args."""
    found: list[dict[str, Any]] = []
    values = tuple(inputs)
    for part in parts:
        outputs = part(*values)
        gives = outputs if isinstance(outputs, tuple) else (outputs,)
        gives = tuple(x.detach().requires_grad_(x.requires_grad) for x in gives)
        found.append({"input_args": values, "output_args": gives})
        values = gives
    return found


def balance(costs: list[float], parts: int) -> list[int]:
    """Where to start each of `parts` consecutive, non-empty groups so that the dearest one is as cheap as it can be.

    Dynamic programming over (first n blocks, k groups): O(parts · blocks²).
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(n, 1): (total[n], [0]) for n in range(1, len(costs) + 1)}
    for k in range(2, parts + 1):
        for n in range(k, len(costs) + 1):
            best[n, k] = min(
                (max(best[m, k - 1][0], total[n] - total[m]), [*best[m, k - 1][1], m]) for m in range(k - 1, n)
            )
    return best[len(costs), parts][1]


class _Cutter:
    """A traced model: its calls in order, and its graph in pieces.

    Attributes:
        calls: the first call of each module, {name: place in the graph}.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self.model = model
        self.names = named_blocks(model, names(model) if callable(names) else names)
        self.nodes = list(trace_forward(model, self.names).nodes)
        self.plain = plain_nodes(self.nodes[0].graph)
        self.calls: dict[str, int] = {}
        for place, node in enumerate(self.nodes):
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), place)

    def units(self) -> dict[str, list[str]]:
        order, named = list(self.calls), set(self.names)
        places = [number for number, name in enumerate(order) if name in named]
        if not places:
            raise UserError(f"cut: the forward of {type(self.model).__name__} calls none of its blocks: {self.names}")
        starts = {0, *(number for number in places if not self._in_place(order[number]))}
        bounds = [*sorted(starts | {places[-1] + 1}), len(order)]
        return {order[start]: order[start:stop] for start, stop in pairwise(bounds) if start < stop}

    def _in_place(self, name: str) -> bool:
        """Whether a block begins with a layer that overwrites its input, which another part may still need."""
        layers = (layer for layer in self.model.get_submodule(name).modules() if not any(layer.children()))
        return bool(getattr(next(layers), "inplace", False))

    def split(self, firsts: list[str]) -> list[Part]:
        bounds = [0, *(self.calls[first] for first in firsts), len(self.nodes)]
        part_of = {
            node: number for number, (start, stop) in enumerate(pairwise(bounds)) for node in self.nodes[start:stop]
        }
        pieces = [self.nodes[start:stop] for start, stop in pairwise(bounds)]
        taken: list[list[Crossing]] = [[] for _ in [*pieces, None]]
        for number in range(len(pieces) - 1, 0, -1):
            wanted = [need for node in pieces[number] for need in self._needs(node, part_of, number)]
            wanted += [need for need in taken[number + 1] if part_of[need[0]] < number]
            unique = dict.fromkeys(wanted)
            taken[number] = [need for need in unique if not (need[1] and (need[0], False) in unique)]
        parts = []
        for number, nodes in enumerate(pieces):
            graph = self._copy(nodes, taken[number], taken[number + 1])
            names = [name for name, place in self.calls.items() if bounds[number] <= place < bounds[number + 1]]
            parts.append(Part(self.model, graph, names))
        self._check_shared(parts)
        return parts

    def _needs(self, node: fx.Node, part_of: dict[fx.Node, int], number: int) -> list[Crossing]:
        """What a node takes from the parts before its own; of plain values, the tensors that they were asked of."""
        found: list[Crossing] = []
        for source in node.all_input_nodes:
            if source.op == "get_attr" or part_of[source] >= number:
                continue
            if source in self.plain:  # is reckoned again
                found += self._needs(source, part_of, number)
            else:
                found.append((source, node in self.plain))
        return found

    def _copy(self, nodes: list[fx.Node], takes: list[Crossing], gives: list[Crossing]) -> fx.Graph:
        graph = fx.Graph()
        here: dict[fx.Node, fx.Node] = {}
        shapes: dict[fx.Node, fx.Node] = {}
        for source, shape_alone in takes:
            name = f"{source.name}_shape" if shape_alone else source.name
            (shapes if shape_alone else here)[source] = graph.placeholder(name)

        def value(source: fx.Node) -> fx.Node:
            if source not in here:  # a parameter or buffer, or plain: taken in, or reckoned again
                here[source] = graph.node_copy(source, shape if source in self.plain else value)
            return here[source]

        def shape(source: fx.Node) -> fx.Node:
            if source in here or source not in shapes:
                return value(source)
            return carried_here.setdefault(source, graph.call_function(carried, (shapes[source],)))

        carried_here: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            if node.op == "output" or (node.op == "get_attr" and not node.users):
                continue
            if node.op != "get_attr":
                here[node] = graph.node_copy(node, shape if node in self.plain else value)
        if nodes[-1].op == "output":
            graph.output(fx.node.map_arg(nodes[-1].args[0], value))
        else:
            passed = []
            for source, shape_alone in gives:
                if not shape_alone:
                    passed.append(here[source])
                elif source in here:
                    passed.append(graph.call_function(carrier, (here[source],)))
                else:
                    passed.append(shapes[source])
            graph.output(passed[0] if len(passed) == 1 else tuple(passed))
        return graph

    def _check_shared(self, parts: list[Part]) -> None:
        owner: dict[int, tuple[int, str]] = {}
        for number, part in enumerate(parts):
            for name, parameter in part.named_parameters():
                other, first = owner.setdefault(id(parameter), (number, name))
                if other != number:
                    same = name if name == first else f"{first} and {name}, which are one parameter,"
                    raise UserError(
                        f"cut: {same} would be in parts {other} and {number}; cut so that one part uses it, or give "
                        "the model two parameters"
                    )
