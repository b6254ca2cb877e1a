"""One picture per technique: what each rank holds, and who sends what in a step. docs/site_hooks.py puts them on the pages.

A rank's holdings are drawn from one letter per piece: `#` this rank has it, `.` another one does, `o` it has it and does
not train it. A rank's step is drawn from one letter per moment: F forward, B backward, R forward again, U update, `.`
waiting; `v` and `^` send to the rank below or above; a digit is a collective of all ranks, named in `sends`. `|` parts
two blocks of the same letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby

LEFT, WIDTH, ROW, LANE = 132, 720, 26, 34  # pixels: where ranks begin, all, a row of the table, a rank's step
COLOURS = {"F": "#5c6bc0", "B": "#ef8a3c", "R": "#9fa8da", "U": "#43a047", ".": "none"}
WORDS = {"F": "forward", "B": "backward", "R": "again", "U": "update"}
COLLECTIVE = "#c2185b"


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        holds: (what, a word per rank) lines.
        steps: a word per rank; one alone is that of all ranks.
        sends: what each digit stands for, from 1 on; then what arrows stand for.
        ranks: what a column stands for.
    """

    holds: tuple[str, ...]
    steps: tuple[str, ...]
    sends: tuple[str, ...] = ()
    ranks: str = "rank"


ALL = "#### ####"  # both ranks have all four pieces
PARTS = "##.. ..##"
DDP_HOLDS = (f"weights {ALL}", f"gradients {ALL}", f"optimizer {ALL}", f"samples {PARTS}")
DDP_STEP = ("FFFFFFBBB1BBB1BBB1UU",)

PICTURES = {
    "single": Picture(
        ("weights ####", "gradients ####", "optimizer ####", "samples ####"), ("FFFFFFFFBBBBBBBBBBBBUU",)
    ),
    "ddp": Picture(DDP_HOLDS, DDP_STEP, ("all-reduce of the gradients that are ready, beside backward",)),
    "sync_batchnorm": Picture(
        DDP_HOLDS,
        ("FF1FF1FF1BB2BB2BB23UU",),
        (
            "all-gather: a layer's mean, squared deviations and count per channel",
            "all-reduce: two sums of the gradient per channel",
            "all-reduce of the gradients",
        ),
    ),
    "zero1": Picture(
        (f"weights {ALL}", f"gradients {ALL}", f"optimizer {PARTS}", f"samples {PARTS}"),
        ("FFFFFFBBB1BBB1BBB1UU2",),
        ("all-reduce of the gradients", "broadcast: each rank's updated weights to all others"),
    ),
    "comm_hooks": Picture(
        (f"weights {ALL}", f"gradients {ALL}", f"left-out {ALL}", f"optimizer {ALL}", f"samples {PARTS}"),
        DDP_STEP,
        ("all-reduce of the compressed gradients; what they lack is kept for the next step",),
    ),
    "local_sgd": Picture(
        DDP_HOLDS,
        ("FFBBU|FFBBU|FFBBU|FFBBU|1",),
        ("all-reduce of the weights, once in `period` steps",),
    ),
    "fsdp": Picture(
        tuple(f"{what} {PARTS}" for what in ("weights", "gradients", "optimizer", "samples")),
        ("1FF1FF1FF1BB21BB21BB2UU",),
        ("all-gather of the next block's weights", "reduce-scatter of its gradients"),
    ),
    "tensor_parallel": Picture(
        (f"weights {PARTS}", f"gradients {PARTS}", f"optimizer {PARTS}", f"samples {ALL}"),
        ("1FF1FF1FF1BB1BB1BB1UU",),
        ("all-reduce of activations, behind each half of a block, and in front of it in backward",),
    ),
    "context_parallel": Picture(
        (f"weights {ALL}", f"gradients {ALL}", f"optimizer {ALL}", "positions #..# .##."),
        ("F1FF1FF1FBB1BB1BB12UU",),
        ("keys and values go around the ring (or all-to-all of heads)", "all-reduce of the gradients"),
    ),
    "expert_parallel": Picture(
        (f"experts {PARTS}", f"other-weights {ALL}", f"their-optimizer {PARTS}", f"samples {PARTS}"),
        ("F1F2F1F2B1B2B1B23UU",),
        (
            "all-to-all: tokens to the ranks of their experts",
            "all-to-all: back to the ranks of the tokens",
            "all-reduce of the gradients of all that is no expert",
        ),
    ),
    "parallel_mesh": Picture(  # shard 2 × tensor 2
        (
            *(f"{what} #... .#.. ..#. ...#" for what in ("weights", "gradients", "optimizer")),
            "samples ##.. ##.. ..## ..##",
        ),
        ("1F2F21F2F2B21B23B21B23UU",),
        (
            "all-gather of a block's weights, among 0 and 2, and 1 and 3",
            "all-reduce of activations, among 0 and 1, and 2 and 3",
            "reduce-scatter of a block's gradients, as they were gathered",
        ),
    ),
    "grad_accumulation": Picture(
        DDP_HOLDS,
        ("FFBBB|FFBBB|FFB1B1UU",),
        ("all-reduce of the gradients, in the last micro-batch's backward alone",),
    ),
    "activation_checkpointing": Picture(
        (f"weights {ALL}", f"gradients {ALL}", f"optimizer {ALL}", "blocks'-inputs #### ####", "activations #... #..."),
        ("FFFFFFRRBB1RRBB1RRBB1UU",),
        ("all-reduce of the gradients",),
    ),
    "deepspeed_zero": Picture(
        (f"weights {ALL}", f"gradients {PARTS}", f"optimizer {PARTS}", f"samples {PARTS}"),
        ("FFFFFFBBB1BBB1BBB1UU2",),
        ("reduce of each bucket to the rank whose part it is (stage 2)", "all-gather of the updated weights"),
    ),
    "lightning_fabric": Picture(DDP_HOLDS, DDP_STEP, ("all-reduce of the gradients, by Fabric's DDP",)),
    "lightning_trainer": Picture(DDP_HOLDS, DDP_STEP, ("all-reduce of the gradients, by the Trainer's DDP",)),
    "transfer_learning": Picture(
        ("backbone oooo oooo", "head #### ####", "its-gradients #### ####", f"samples {PARTS}"),
        ("FFFFFFFFFFB1U",),
        ("all-reduce of the head's gradients",),
    ),
    "lora": Picture(
        ("weights oooo oooo", "A-and-B #### ####", "their-gradients #### ####", f"samples {PARTS}"),
        ("FFFFFFBBBBB1U",),
        ("all-reduce of the gradients of A and B",),
    ),
    "data_parallel": Picture(
        ("weights #### ####", "gradients #### ####", "optimizer #### ....", "samples ##.. ..##"),
        ("1FFFF2...3BBBB4UU", "1FFFF2...3BBBB4.."),
        (
            "scatter the batch, copy the model to all devices",
            "gather the outputs on the first device, where the loss is",
            "scatter their gradients",
            "sum the weights' gradients on the first device",
        ),
        ranks="device",
    ),
    "model_parallel": Picture(
        (f"weights {PARTS}", f"gradients {PARTS}", f"optimizer {PARTS}", f"samples {ALL}"),
        ("FFFFv.........BBBBB.UU", ".....FFFFBBBB^......UU"),
        ("arrows: activations, and their gradients on the way back",),
        ranks="device",
    ),
    "pipeline_parallel": Picture(
        (f"weights {PARTS}", f"gradients {PARTS}", f"optimizer {PARTS}", f"samples {ALL}"),
        ("FFvFFv...BB.FFvBB.FFvBB....BB.UU", "...FF.BB^FF.BB^FF.BB^FF.BB^...UU"),
        ("arrows: a micro-batch's activations, and their gradients on the way back",),
    ),
    "checkpoint_resume": Picture(
        ("model #### ####", "optimizer #### ####", "schedule,-step #### ####", "random-numbers ##.. ..##"),
        ("FFBBU|FFBBU|1|FFBBU|FFBBU",),
        ("save all of it, or stop here and continue from it",),
    ),
}


def draw(picture: Picture) -> str:
    """The picture, as SVG for a page; colours of text follow the page's."""
    rows = [line.split() for line in picture.holds]
    ranks = max(len(rows[0]) - 1, len(picture.steps))
    steps = picture.steps * (ranks if len(picture.steps) == 1 else 1)
    parts: list[str] = []
    column = (WIDTH - LEFT) / ranks
    for rank in range(ranks):
        parts.append(text(LEFT + (rank + 0.5) * column, 14, f"{picture.ranks} {rank} holds", "middle"))
    top = 24
    for name, *words in rows:
        parts.append(text(LEFT - 10, top + 14, name.replace("-", " "), "end"))
        for rank, word in enumerate(words):
            parts += pieces(word, LEFT + rank * column + 4, top, column - 16)
        top += ROW
    top += 26
    parts.append(text(LEFT, top - 6, "a step, from left to right"))
    parts += [part for rank, step in enumerate(steps) for part in lane(step, rank, steps, top, picture.ranks)]
    parts += collectives(steps, top)
    height = top + LANE * ranks + 4
    title = escape("; ".join(picture.sends) or "one process")
    body = "\n".join(parts)
    return (
        f'<svg class="technique" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>'
    )


def pieces(word: str, left: float, top: float, width: float) -> list[str]:
    each = width / len(word)
    fills = {"#": 'fill="#5c6bc0"', "o": 'fill="#90a4ae"', ".": 'fill="none"'}
    return [
        f'<rect x="{left + each * at:.1f}" y="{top + 2}" width="{each:.1f}" height="{ROW - 10}" {fills[letter]} '
        'stroke="currentColor" stroke-opacity="0.5"/>'
        for at, letter in enumerate(word)
    ]


def moments(step: str) -> list[tuple[str, int, int]]:
    """(letter, first moment, moments) of each block of a rank's step."""
    blocks, at = [], 0
    for stretch in step.split("|"):
        for letter, run in groupby(stretch):
            length = len(list(run))
            blocks.append((letter, at, length))
            at += length
    return blocks


def lane(step: str, rank: int, steps: tuple[str, ...], top: float, what: str) -> list[str]:
    """A rank's own blocks, and its arrows to its neighbours."""
    unit, y = moment_width(steps), top + rank * LANE
    parts = [text(LEFT - 10, y + 20, f"{what} {rank}", "end")]
    for letter, at, length in moments(step):
        x, width = LEFT + at * unit, length * unit
        if letter in WORDS:
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 4}" width="{width - 2:.1f}" height="{LANE - 10}" rx="3" '
                f'fill="{COLOURS[letter]}"/>'
            )
            word = WORDS[letter] if width > 62 else letter
            parts.append(text(x + width / 2, y + 20, word, "middle", "#fff"))
        elif letter in "v^":
            ends = (y + LANE / 2, y + 1.5 * LANE) if letter == "v" else (y + LANE / 2, y - LANE / 2)
            middle, head = (x + unit / 2 - 4, 6) if letter == "v" else (x + unit / 2 + 4, -6)
            parts.append(
                f'<path d="M{middle:.1f} {ends[0]} V{ends[1]} m-4 {-head} l4 {head} l4 {-head}" fill="none" '
                f'stroke="{COLLECTIVE}" stroke-width="2"/>'
            )
    return parts


def collectives(steps: tuple[str, ...], top: float) -> list[str]:
    """What all ranks take part in: a bar across them."""
    unit, parts = moment_width(steps), []
    for letter, at, length in moments(steps[0]):
        if letter.isdigit():
            x, width = LEFT + at * unit, length * unit
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{top}" width="{width - 2:.1f}" height="{LANE * len(steps) - 2}" rx="3" '
                f'fill="{COLLECTIVE}"/>'
            )
            parts.append(text(x + width / 2, top + LANE * len(steps) / 2 + 4, letter, "middle", "#fff"))
    return parts


def moment_width(steps: tuple[str, ...]) -> float:
    return (WIDTH - LEFT) / max(len(step.replace("|", "")) for step in steps)


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "currentColor") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="13" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
