"""Which techniques go together: pairs and triples that train what one process trains, and those that are refused.

    python -m lockstep.verify.compositions > docs/compositions.md

Each composition is a command of a recipe. `tests/ranks/test_compositions.py` holds each one that is here to 1e-10 of one
process in fp64 (those in bf16 to what rounding explains), by the means of recipes.verify, and each refused one to its words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lockstep.config.keys import typed

TECHNIQUES = {
    "ddp": "copies of the model, or of a part of it, that average gradients",
    "fsdp": "weights, gradients and optimizer state sharded",
    "tensor": "layers shared",
    "context": "sequences shared",
    "pipeline": "blocks in stages",
    "expert": "experts on ranks of their own",
    "accumulation": "micro-batches, one update",
    "checkpointed": "activations computed again in backward",
    "clipping": "by the norm of all gradients",
    "bf16": "16-bit arithmetic, fp32 weights",
}


@dataclass(frozen=True)
class Composition:
    """Techniques that go together, and the command that has them do so.

    Attributes:
        own: the recipe's own keys, where they are not the recipe's defaults.
        settings: keys that the reference has, too.
    """

    techniques: tuple[str, ...]
    recipe: str
    ranks: int
    own: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp64"

    @property
    def name(self) -> str:
        return " + ".join(self.techniques)

    @property
    def command(self) -> str:
        words = [typed(*pair) for pair in (self.own | self.settings).items()]
        words += [f"precision={self.precision}"] * (self.precision != "fp64")
        return " ".join([f"recipes.{self.recipe}", f"nproc={self.ranks}", *words])


@dataclass(frozen=True)
class Refusal:
    """Techniques that do not go together: what the command says, and exits with 2."""

    techniques: tuple[str, str]
    recipe: str
    words: str
    said: str
    ranks: int = 4


STAGES = {"pipeline": 2, "micro_batches": 2}
SINGLES = (
    Composition(("ddp",), "ddp", 2),
    Composition(("fsdp",), "fsdp", 2),
    Composition(("tensor",), "tensor_parallel", 2),
    Composition(("context",), "context_parallel", 2),
    Composition(("pipeline",), "pipeline_parallel", 2, {"cut": "even", "micro_batches": 2}),
    Composition(("expert",), "expert_parallel", 2, settings={"task.experts": 4}),
)
PAIRS = (
    Composition(("ddp", "fsdp"), "fsdp", 4, {"replicate": 2}),
    Composition(("ddp", "tensor"), "tensor_parallel", 4),
    Composition(("ddp", "context"), "context_parallel", 4),
    Composition(("ddp", "pipeline"), "pipeline_parallel", 4, {"cut": "even", "micro_batches": 2}),
    Composition(("ddp", "expert"), "expert_parallel", 4, settings={"task.experts": 4}),
    Composition(("fsdp", "tensor"), "parallel_mesh", 4),
    Composition(("fsdp", "context"), "parallel_mesh", 4, {"context": 2, "tensor": 1}),
    Composition(("tensor", "context"), "parallel_mesh", 4, {"context": 2}),
    Composition(("fsdp", "pipeline"), "parallel_mesh", 4, {"tensor": 1} | STAGES),
    Composition(("tensor", "pipeline"), "parallel_mesh", 4, STAGES),
    Composition(("context", "pipeline"), "parallel_mesh", 4, {"context": 2, "tensor": 1} | STAGES),
)
TRIPLES = (
    Composition(("ddp", "fsdp", "tensor"), "parallel_mesh", 8, {"replicate": 2}),
    Composition(("ddp", "fsdp", "context"), "parallel_mesh", 8, {"replicate": 2, "context": 2, "tensor": 1}),
    Composition(("ddp", "tensor", "context"), "parallel_mesh", 8, {"replicate": 2, "context": 2}),
    Composition(("fsdp", "tensor", "context"), "parallel_mesh", 8, {"context": 2}),
    Composition(("fsdp", "tensor", "pipeline"), "parallel_mesh", 8, STAGES),
    Composition(("tensor", "context", "pipeline"), "parallel_mesh", 8, {"context": 2} | STAGES),
)
ADDED: dict[str, dict[str, Any]] = {  # what every recipe has, as changes of a Composition
    "accumulation": {"own": {"accumulate": 2}},
    "checkpointed": {"own": {"checkpoint_activations": "full"}},
    "clipping": {"settings": {"gradients.clip_norm": 0.1}},
    "bf16": {"precision": "bf16"},
}
REFUSALS = (
    Refusal(
        ("pipeline", "accumulation"),
        "pipeline_parallel",
        "accumulate=2",
        "accumulate=2: a pipeline accumulates by itself; set micro_batches instead",
    ),
    Refusal(
        ("fsdp", "expert"),
        "parallel_mesh",
        "tensor=1 expert=2",
        "expert=2: experts on ranks of their own are averaged by other ranks than FSDP's; use recipes.expert_parallel, "
        "which has copies of experts, or recipes.fsdp, which shards them like all weights",
    ),
    Refusal(
        ("tensor", "expert"),
        "tensor_parallel",
        "task.experts=4",
        "task.experts=4: its ranks share layers that all tokens go through; use recipes.expert_parallel, or set "
        "task.experts=0",
    ),
    Refusal(
        ("context", "expert"),
        "context_parallel",
        "task.experts=4",
        "task.experts=4: their balance is of whole sequences, of which a rank has some positions here; use "
        "recipes.expert_parallel, or set task.experts=0",
    ),
    Refusal(
        ("pipeline", "expert"),
        "pipeline_parallel",
        "task.experts=4 expert=2",
        "expert=2: a pipeline's schedule knows nothing of the all-to-all in its stages; use recipes.expert_parallel, or "
        "leave it out: each stage then holds all experts of its blocks",
    ),
)


def with_added(composition: Composition, *names: str) -> Composition:
    """A composition with further techniques, of ADDED."""
    values: dict[str, Any] = {"own": composition.own, "settings": composition.settings, "precision": "fp64"}
    for name in names:
        for part, value in ADDED[name].items():
            values[part] = values[part] | value if isinstance(value, dict) else value
    techniques = (*composition.techniques, *names)
    return Composition(techniques, composition.recipe, composition.ranks, **values)


def refuses(techniques: tuple[str, ...]) -> bool:
    return any({*refusal.techniques} <= {*techniques} for refusal in REFUSALS)


def compositions() -> list[Composition]:
    """All that are proven, by ranks: each pair of TECHNIQUES that goes together is in one of them."""
    two = list(combinations(ADDED, 2))
    found = [*PAIRS, *TRIPLES]
    found += [with_added(each, name) for each in (*SINGLES, *PAIRS) for name in ADDED]
    found += [with_added(each, *names) for each in SINGLES for names in (two if each is SINGLES[0] else two[1::4])]
    return sorted((each for each in found if not refuses(each.techniques)), key=lambda each: each.ranks)


PAGE = """# Which techniques go together

Each pair and triple of this page is proven in fp64: a few steps of the command, against the same steps of `recipes.single`,
are equal to 1e-10 in losses, gradients, weights and evaluation (with bf16, to 4 times what rounding makes of `single`). What
is not proven is refused: one line that says why and what works instead, exit code 2, before anything starts. The tests of
`tests/ranks/test_compositions.py` hold both. {count} compositions; this page is written by
`python -m lockstep.verify.compositions`.

{words}

## Pairs

`=` is equal, `no` is refused.

{grid}

## What is refused

| pair | command | what it says |
|---|---|---|
{refused}
## What is proven

Each is a command, with `python -m` before it and `task=language` after it. `recipes.verify recipes=[NAME] task=language`
and the same keys show the proof.

| techniques | ranks | command |
|---|---:|---|
{proven}"""


def cell(one: str, other: str, found: list[Composition]) -> str:
    if one == other:
        return ""
    return "=" if any({one, other} <= {*each.techniques} for each in found) else "no"


def compositions_page() -> str:
    """docs/compositions.md."""
    found = compositions()
    grid = [f"| | {' | '.join(TECHNIQUES)} |", f"|---|{':-:|' * len(TECHNIQUES)}"]
    grid += [f"| {one} | {' | '.join(cell(one, other, found) for other in TECHNIQUES)} |" for one in TECHNIQUES]
    return PAGE.format(
        count=len(found),
        words="\n".join(f"- `{name}`: {what}" for name, what in TECHNIQUES.items()),
        grid="\n".join(grid),
        refused="".join(
            f"| {' + '.join(each.techniques)} | `recipes.{each.recipe} {each.words}` | {each.said} |\n"
            for each in REFUSALS
        ),
        proven="".join(f"| {each.name} | {each.ranks} | `{each.command}` |\n" for each in found),
    )


if __name__ == "__main__":
    print(compositions_page(), end="")
