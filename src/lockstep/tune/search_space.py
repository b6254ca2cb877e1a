"""A search space in words: for each config key where its values come from, read without running any code.

    loguniform(1e-4, 1e-1)         a number between the two, small ones as likely as large ones
    uniform(0.8, 0.99)             a number between the two
    randint(2, 9)                  a whole number from the first up to the second, which is left out
    lograndint(16, 1025)           the same, small ones as likely as large ones
    choice(48, 96, 192)            one of these: numbers, words, true, false, null
    sample_from(2 ** randint(5, 8))                    arithmetic on any of them,
    sample_from(round(0.1 * epochs * 1437 / global_batch_size)) and on other keys, drawn or fixed

Arithmetic is + - * / // % **, min, max, round and int. A function of Python's own choosing, as Ray's sample_from takes
it, would make a config file a program.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.declared import CommandLine
from lockstep.config.keys import walk
from lockstep.config.schema import Config
from lockstep.errors import UserError

RANGES = ("uniform", "loguniform", "randint", "lograndint")
WORDS = {"true": True, "false": False, "null": None}
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
DIGITS = 4  # of a drawn number that are kept: a learning rate to be typed again has no use for 17
ALLOWED = "allowed are uniform, loguniform, randint, lograndint, each with (low, high), choice(…) and sample_from(…)"
MOST_COMBINATIONS = 64


@dataclass(frozen=True)
class Draw:
    """One thing to draw.

    Attributes:
        kind: the distribution's name.
        arguments: its two ends, or the values to choose from.
    """

    kind: str
    arguments: tuple[Any, ...]

    def examples(self) -> tuple[Any, ...]:
        """All that can be drawn, or its two ends where that is too much."""
        if self.kind == "choice":
            return self.arguments
        low, high = self.arguments
        if self.kind.endswith("randint"):
            return tuple(range(low, high)) if high - low <= 16 else (low, high - 1)
        return low, high

    def sample(self, generator: random.Random) -> Any:
        """One value."""
        if self.kind == "choice":
            return generator.choice(self.arguments)
        low, high = self.arguments
        if self.kind == "randint":
            return generator.randrange(low, high)
        logarithm = self.kind.startswith("log")
        value = generator.uniform(*(math.log(low), math.log(high)) if logarithm else (low, high))
        value = math.exp(value) if logarithm else value
        return min(max(int(value), low), high - 1) if self.kind == "lograndint" else min(max(value, low), high)


class Space:
    """What is drawn, and how the values of config keys follow from it.

    Args:
        tree: {key: text}, also nested as a config is.
        recipe: whose settings they are.

    Attributes:
        draws: by the name of the key, or `key 2` for the second of several that one key needs.

    Raises:
        UserError: a key that no config has, or a text that is none of the above.
    """

    def __init__(self, tree: Mapping[str, Any], recipe: CommandLine) -> None:
        self.texts = dict(flat(tree))
        self.draws: dict[str, Draw] = {}
        self._names: dict[ast.AST, str] = {}
        self._trees: dict[str, ast.expr] = {}
        known = {name: value for name, value, _ in walk(recipe.config())}
        for key, text in self.texts.items():
            if key not in known:
                from lockstep.config.explain import unknown_key  # Hydra: only a process that checks needs it

                raise unknown_key(key, recipe, recipe.config, " in tune.space")
            self._key, self._count = key, 0
            try:
                if not isinstance(text, str):
                    raise ValueError(f"{ALLOWED}; a fixed value is set as {key}={text}")
                node = ast.parse(text.strip(), mode="eval").body
                if not (isinstance(node, ast.Call) and self._function(node) in (*RANGES, "choice", "sample_from")):
                    raise ValueError(ALLOWED)
                self._trees[key] = node
                self._read(node, known)
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
            if key not in self._trees:
                return rest[key]
            if key in asking:
                raise ValueError(f"{' needs '.join((*asking[asking.index(key) :], key))}: none can be first")
            if key not in found:
                found[key] = self._evaluate(self._trees[key], drawn, lambda other: value(other, (*asking, key)))
            return found[key]

        for key, text in self.texts.items():
            try:
                value(key, ())
            except (ValueError, TypeError, ArithmeticError) as error:
                raise UserError(f"tune.space.{key}={text}: {error}") from None
        return {key: found[key] for key in self.texts}

    def sample(self, seed: int, number: int) -> dict[str, Any]:
        """Draw for trial `number`: a function of the two, so that a search can be cut off anywhere."""
        generator = random.Random(f"{seed} {number}")
        return {name: draw.sample(generator) for name, draw in self.draws.items()}

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

    def _read(self, node: ast.AST, known: Mapping[str, Any]) -> None:
        """Note the draws in an expression; raise ValueError for what is not part of the language."""
        if isinstance(node, ast.Call):
            function = self._function(node)
            if function in (*RANGES, "choice"):
                self._count += 1
                name = self._key if self._count == 1 else f"{self._key} {self._count}"
                self._names[node], self.draws[name] = name, draw(function, node.args)
                return
            if function not in ("sample_from", *FUNCTIONS):
                raise ValueError(f"{ast.unparse(node.func)} is none of its functions; {ALLOWED}")
            if not node.args or (function == "sample_from" and len(node.args) != 1):
                raise ValueError(f"{function}(…) takes {'one expression' if function == 'sample_from' else 'numbers'}")
            for argument in node.args:
                self._read(argument, known)
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            self._read(node.left, known)
            self._read(node.right, known)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self._read(node.operand, known)
        elif isinstance(node, ast.Name | ast.Attribute):
            if ast.unparse(node) not in known:
                raise ValueError(f"{ast.unparse(node)} is no config key")
        elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
            raise ValueError(f"{ast.unparse(node)} is neither a number, nor a key, nor arithmetic on them")

    @staticmethod
    def _function(node: ast.Call) -> str:
        if node.keywords:
            raise ValueError("arguments have no names here")
        return node.func.id if isinstance(node.func, ast.Name) else ""

    def _evaluate(self, node: ast.AST, drawn: Mapping[str, Any], value: Callable[[str], Any]) -> Any:
        if node in self._names:
            found = drawn[self._names[node]]
            return float(f"{found:.{DIGITS}g}") if isinstance(found, float) else found
        match node:
            case ast.Constant():
                return node.value
            case ast.Call():
                arguments = [self._evaluate(argument, drawn, value) for argument in node.args]
                function = self._function(node)
                return arguments[0] if function == "sample_from" else FUNCTIONS[function](*arguments)
            case ast.UnaryOp():
                return -self._evaluate(node.operand, drawn, value)
            case ast.BinOp():
                left, right = (self._evaluate(side, drawn, value) for side in (node.left, node.right))
                if isinstance(node.op, ast.Pow) and abs(right) > 64:
                    raise ValueError(f"{left} ** {right} is too large")
                result = OPERATORS[type(node.op)](left, right)
                # 0.5 * 96 is a whole number of images.
                return int(result) if isinstance(result, float) and result.is_integer() else result
        return value(ast.unparse(node))


def draw(kind: str, arguments: list[ast.expr]) -> Draw:
    """Read a distribution; ValueError where its arguments do not fit it."""
    values = tuple(literal(argument) for argument in arguments)
    if kind == "choice":
        if not values:
            raise ValueError("choice() has nothing to choose from")
        return Draw(kind, values)
    number = int if kind.endswith("randint") else (int, float)
    whole = "whole " * (number is int)
    if len(values) != 2 or not all(isinstance(value, number) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{kind} takes two {whole}numbers, the lower one first")
    low, high = values if number is int else map(float, values)
    if not low < high:
        raise ValueError(f"{kind} takes two {whole}numbers, the lower one first")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{kind} takes numbers above 0")
    return Draw(kind, (low, high))


def literal(node: ast.expr) -> Any:
    """A number or a word, as YAML would read it."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -literal(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.Name):
        return WORDS.get(node.id, node.id)
    raise ValueError(f"{ast.unparse(node)} is neither a number nor a word; words that are no names stand in quotes")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, text) for every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
