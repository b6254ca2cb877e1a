"""A search space as text: Ray Tune's own domains for config keys, read without running any code.

    loguniform(1e-4, 1e-1)         a number between the two, small ones as likely as large ones
    uniform(0.8, 0.99)             a number between the two
    randint(2, 9)                  a whole number from the first up to the second, which is left out
    lograndint(16, 1025)           the same, small ones as likely as large ones
    choice(48, 96, 192)            one of these: numbers, words, true, false, null
    sample_from(2 ** randint(5, 8))                    arithmetic on any of them,
    sample_from(round(0.1 * epochs * 1437 / global_batch_size)) and on other keys, drawn or fixed

The first five are ray.tune's, which draws from them. Ray's `sample_from` takes a Python function, which would make a
config file a program; here it takes an expression of + - * / // % **, min, max, round and int.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.declared import CommandLine
from lockstep.config.keys import walk
from lockstep.config.schema import Config
from lockstep.config.tasks import with_task
from lockstep.errors import UserError

RANGES = ("uniform", "loguniform", "randint", "lograndint")
LITERALS = {"true": True, "false": False, "null": None}
FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "int": int}
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
SIGNIFICANT_DIGITS = 4  # of a drawn number that are kept: a learning rate to be typed again has no use for 17
ALLOWED = "allowed are uniform, loguniform, randint, lograndint, each with (low, high), choice(…) and sample_from(…)"
MOST_COMBINATIONS = 64

Lookup = Callable[[str], Any]
Expression = Callable[[Mapping[str, Any], Lookup], Any]  # (what was drawn, value of another key) -> value


@dataclass(frozen=True)
class Draw:
    """One thing to draw: the name of one of Ray's domains, and its two ends or the values to choose from."""

    kind: str
    arguments: tuple[Any, ...]

    def domain(self) -> Any:
        """As an object of Ray's."""
        from ray import tune

        return tune.choice(list(self.arguments)) if self.kind == "choice" else getattr(tune, self.kind)(*self.arguments)

    def examples(self) -> tuple[Any, ...]:
        """All that can be drawn, or its two ends where that is too much."""
        if self.kind == "choice":
            return self.arguments
        low, high = self.arguments
        if self.kind.endswith("randint"):
            return tuple(range(low, high)) if high - low <= 16 else (low, high - 1)
        return low, high


class SearchSpace:
    """What is drawn, and how the values of config keys follow from it.

    Args:
        tree: {key: text}, also nested as a config is.
        recipe: whose settings they are.
        task: what it trains, whose keys are drawn as well; None: images.

    Attributes:
        draws: by the name of the key, or `key 2` for the second of several that one key needs.

    Raises:
        UserError: a key that no config has, or a text that is none of the above.
    """

    def __init__(self, tree: Mapping[str, Any], recipe: CommandLine, task: str | None = None) -> None:
        self.texts = dict(flat_keys(tree))
        self.draws: dict[str, Draw] = {}
        schema = with_task(recipe.config, task)
        self._known = {name for name, _, _ in walk(schema())}
        self._expressions: dict[str, Expression] = {}
        for key, text in self.texts.items():
            if key not in self._known:
                from lockstep.config.explain import unknown_key  # Hydra: only a process that checks needs it

                raise unknown_key(key, recipe, schema, " in tune.space")
            try:
                if not isinstance(text, str):
                    raise ValueError(f"{ALLOWED}; a fixed value is set as {key}={text}")
                node = ast.parse(text.strip(), mode="eval").body
                if called(node) not in (*RANGES, "choice", "sample_from"):
                    raise ValueError(ALLOWED)
                self._expressions[key] = self._read(node, key)
            except SyntaxError:
                raise UserError(f"tune.space.{key}={text}: cannot be read; {ALLOWED}") from None
            except (ValueError, TypeError) as error:
                raise UserError(f"tune.space.{key}={text}: {error}") from None

    def values(self, drawn: Mapping[str, Any], fixed: Config) -> dict[str, Any]:
        """{config key: value} of what was drawn.

        Args:
            drawn: a value for each of `draws`.
            fixed: what expressions find of keys that are not drawn.

        Raises:
            UserError: an expression has no value.
        """
        rest = {name: value for name, value, _ in walk(fixed)}
        found: dict[str, Any] = {}

        def value(key: str, asking: tuple[str, ...]) -> Any:
            if key not in self._expressions:
                return rest[key]
            if key in asking:
                raise ValueError(f"{' needs '.join((*asking[asking.index(key) :], key))}: none can be first")
            if key not in found:
                found[key] = self._expressions[key](drawn, lambda other: value(other, (*asking, key)))
            return found[key]

        for key, text in self.texts.items():
            try:
                value(key, ())
            except (ValueError, TypeError, ArithmeticError) as error:
                raise UserError(f"tune.space.{key}={text}: {error}") from None
        return {key: found[key] for key in self.texts}

    def sample(self, seed: int, number: int) -> dict[str, Any]:
        """Draw for trial `number`: a function of the two, so that a search can be cut off anywhere."""
        from numpy.random import default_rng

        generator = default_rng([seed, number])
        return {name: draw.domain().sample(random_state=generator) for name, draw in self.draws.items()}

    def examples(self) -> Iterator[dict[str, Any]]:
        """Drawings to hold the space to its limits: every combination of choices and ends, or, where there are too
        many, each of them at least once."""
        options = {name: draw.examples() for name, draw in self.draws.items()}
        if math.prod(map(len, options.values())) <= MOST_COMBINATIONS:
            for combination in itertools.product(*options.values()):
                yield dict(zip(options, combination, strict=True))
            return
        for number in range(max(map(len, options.values()))):
            yield {name: each[number % len(each)] for name, each in options.items()}

    def _read(self, node: ast.AST, key: str) -> Expression:
        """The function that a text stands for; ValueError for what is not one of the above."""
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return lambda drawn, value: number
            case ast.Name() | ast.Attribute():
                other = ast.unparse(node)
                if other not in self._known:
                    raise ValueError(f"{other} is no config key")
                return lambda drawn, value: value(other)
            case ast.UnaryOp(op=ast.USub()):
                operand = self._read(node.operand, key)
                return lambda drawn, value: -operand(drawn, value)
            case ast.BinOp() if type(node.op) in OPERATORS:
                sides, combine = [self._read(side, key) for side in (node.left, node.right)], OPERATORS[type(node.op)]
                return lambda drawn, value: calculate(combine, *(side(drawn, value) for side in sides))
            case ast.Call() if called(node) in (*RANGES, "choice"):
                number = 1 + sum(label.split()[0] == key for label in self.draws)
                label = key if number == 1 else f"{key} {number}"
                self.draws[label] = read_draw(called(node), node.args)
                return lambda drawn, value: rounded(drawn[label])
            case ast.Call():
                name = called(node)
                if name not in ("sample_from", *FUNCTIONS):
                    raise ValueError(f"{ast.unparse(node.func)} is none of its functions; {ALLOWED}")
                if not node.args or (name == "sample_from" and len(node.args) != 1):
                    raise ValueError(f"{name}(…) takes {'one expression' if name == 'sample_from' else 'numbers'}")
                function = FUNCTIONS.get(name, lambda expression: expression)
                arguments = [self._read(argument, key) for argument in node.args]
                return lambda drawn, value: function(*(argument(drawn, value) for argument in arguments))
        raise ValueError(f"{ast.unparse(node)} is neither a number, nor a key, nor arithmetic on them")


def called(node: ast.AST) -> str:
    """The name of the function that is called; empty where none is."""
    if not isinstance(node, ast.Call):
        return ""
    if node.keywords:
        raise ValueError("arguments have no names here")
    return node.func.id if isinstance(node.func, ast.Name) else ""


def calculate(combine: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if combine is operator.pow and max(abs(left), abs(right) * 2**58) > 2**64:
        raise ValueError(f"{left} ** {right} is too large")
    result = combine(left, right)
    # 0.5 * 96 is a whole number of images.
    return int(result) if isinstance(result, float) and result.is_integer() else result


def rounded(value: Any) -> Any:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def read_draw(kind: str, arguments: list[ast.expr]) -> Draw:
    """Read a domain; ValueError where its arguments do not fit it. (Ray would notice when it draws.)"""
    values = tuple(read_literal(argument) for argument in arguments)
    if kind == "choice":
        if not values:
            raise ValueError("choice() has nothing to choose from")
        return Draw(kind, values)
    number = int if kind.endswith("randint") else (int, float)
    if not (
        len(values) == 2
        and all(isinstance(value, number) and not isinstance(value, bool) for value in values)
        and values[0] < values[1]
    ):
        raise ValueError(f"{kind} takes two {'whole ' * (number is int)}numbers, the lower one first")
    if kind.startswith("log") and values[0] <= 0:
        raise ValueError(f"{kind} takes numbers above 0")
    return Draw(kind, values if number is int else tuple(map(float, values)))


def read_literal(node: ast.expr) -> Any:
    """A number or a word, as YAML would read it."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -read_literal(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.Name):
        return LITERALS.get(node.id, node.id)
    raise ValueError(f"{ast.unparse(node)} is neither a number nor a word; words that are no names stand in quotes")


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, text) for every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
