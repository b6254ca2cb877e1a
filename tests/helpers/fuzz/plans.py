"""What the fuzzer draws: which run, what befalls it and its files."""

from __future__ import annotations

import importlib
import random
import signal
from dataclasses import dataclass, replace

from lockstep.distributed.signals import SIGNALS
from lockstep.recipe import Recipe
from tests.helpers import fuzz_tasks
from tests.helpers import overflowing_scaler as overflow

ALONE = ("single", "data_parallel", "model_parallel")
RANKS = dict.fromkeys(ALONE, (1,)) | dict.fromkeys(
    ("ddp", "sync_batchnorm", "grad_accumulation", "transfer_learning", "zero1", "local_sgd"), (1, 2, 3)
)
RANKS |= {"pipeline_parallel": (2,), "deepspeed_zero": (2, 3), "fsdp": (2, 3, 4)}
RANKS |= dict.fromkeys(("lightning_fabric", "lightning_trainer"), (1, 2, 3))
KEEP_ALL = ("data_parallel",)  # what cannot compute activations again in backward
MESHES = {  # by ranks
    2: (("tensor=2",), ("tensor=1", "context=2"), ("tensor=1", "pipeline=2", "micro_batches=3")),
    3: (("tensor=1",),),
    4: (
        *(("tensor=2",), ("replicate=2",), ("context=2",), ("tensor=1", "context=2")),
        *(("pipeline=2", "micro_batches=3"), ("tensor=2", "sequence_parallel=true")),
    ),
}
RESIZED = ("fsdp",)  # started on another number of ranks each time: compared in fp64, and no longer bit by bit
COPIES = {("fsdp", 4): ("replicate=2",)}
OWN = {"grad_accumulation": ("accumulate=3",), "pipeline_parallel": ("stages=2", "micro_batches=4")}
OWN |= {"transfer_learning": ("weights=random", "unfreeze_epoch=2")}  # half of the steps before it, half after
# Four steps an epoch and an evaluation after each; a rank's share divides by 3 micro-batches on 1, 2 and 3 ranks.
IMAGES = 144, 36  # of the digits
SIZE = ("global_batch_size=36", "epochs=4", "log_every=1", "optim.warmup_steps=3", "threads=1", "timeout_seconds=120")
STEPS = 16
LEFT = 0.7  # so much of a run is left, on average, after a start that was struck
TASKS = ("images", "FewSequences", "Ragged", "Weighted", "Read")  # the built-in one, and those of fuzz_tasks
OWN_RECIPE = "own_recipe"  # tests.helpers.own_recipe, in the place of the recipe whose wrap it has
WRAPS = {"single": "none", "ddp": "ddp", "fsdp": "fsdp"}


@dataclass(frozen=True)
class Setup:
    """A run: what decides its numbers, and what it saves, which must not."""

    recipe: str
    ranks: int
    words: tuple[str, ...]
    saving: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [word for word in self.words + self.saving if word not in SIZE and not word.startswith("task=")]
        shown = [f"task={self.task}", *(word.removeprefix("checkpoint.") for word in words)]
        return f"{self.recipe} × {self.ranks} {' '.join(shown)}"

    @property
    def target(self) -> Recipe:
        module = f"tests.helpers.{OWN_RECIPE}" if self.recipe == OWN_RECIPE else f"recipes.{self.recipe}"
        found: Recipe = importlib.import_module(module).train
        return found

    @property
    def task(self) -> str:
        return next((word.rpartition(":")[2] for word in self.words if word.startswith("task=")), TASKS[0])


@dataclass(frozen=True)
class Fault:
    """What befalls one start.

    Attributes:
        sign: number of the signal; 0: nothing happens.
        rank: who gets it; −1: all ranks.
        share: when, as a share of the time that an undisturbed run takes; None: at `call`.
        call: number of the file-system call below checkpoints/ at which the rank sends itself the signal.
        at: count only calls of which this is a part: `rename .writing-step-00000008`.
        after: behind that call, not before it; in the middle of a file that is being written.
        patient: the ranks ask each other about signals as seldom as in real runs, not after every step.
    """

    sign: int = 0
    rank: int = 0
    share: float | None = None
    call: int = 0
    at: str = ""
    after: bool = False
    patient: bool = False

    def __str__(self) -> str:
        if not self.sign:
            return "undisturbed"
        who = "all ranks" if self.rank < 0 else f"rank {self.rank}"
        return f"{signal.Signals(self.sign).name} to {who}"


@dataclass(frozen=True)
class Damage:
    """What befalls the files between two starts; `file` and `place` are shares of what is there to choose from."""

    kind: str
    file: float = 0.0
    place: float = 0.0


DAMAGES = ("truncate", "flip", "delete", "no LATEST", "garbled LATEST", "stale folder")


@dataclass(frozen=True)
class Plan:
    """All that is drawn for one seed. A last, undisturbed start follows the faults.

    Attributes:
        sizes: on how many ranks each start is; empty: all on the setup's.
    """

    setup: Setup
    faults: tuple[Fault, ...]
    damages: tuple[Damage | None, ...]
    sizes: tuple[int, ...] = ()


def draw(seed: int, variant: int = 0) -> Plan:
    """The plan of a seed; variants train the same, and are saved and struck otherwise: one undisturbed run serves all."""
    return vary(draw_first(seed), seed, variant) if variant else draw_first(seed)


def vary(plan: Plan, seed: int, variant: int) -> Plan:
    """More faults than in a first plan; what is left of the run becomes less from one to the next."""
    dice = random.Random(f"lockstep {seed} variant {variant}")
    every, count, setup = dice.randint(1, 5), dice.randint(3, 6), plan.setup
    saving = [f"checkpoint.every={every}", f"checkpoint.keep={dice.randint(1, 3)}"]
    saving += [f"checkpoint.asynchronous={dice.choice(('true', 'false'))}"]
    saving += ["checkpoint.best=true"] * (dice.random() < 0.4)
    sizes = tuple(dice.choice(RANKS[RESIZED[0]]) for _ in range(count + 1)) if plan.sizes else ()
    faults = [
        draw_fault(dice, sizes[number] if sizes else setup.ranks, STEPS // every, LEFT**number)
        for number in range(count)
    ]
    damages = [
        Damage(dice.choice(DAMAGES), dice.random(), dice.random()) if dice.random() < 0.4 else None
        for _ in range(count)
    ]
    return Plan(replace(setup, saving=tuple(saving)), tuple(faults), tuple(damages), sizes)


def draw_first(seed: int) -> Plan:
    dice = random.Random(f"lockstep {seed}")
    recipe = dice.choice(sorted(RANKS))
    ranks = dice.choice(RANKS[recipe])
    words = [*SIZE, *OWN.get(recipe, ()), f"optim={dice.choice(('sgd', 'adamw'))}"]
    if recipe == "grad_accumulation":
        words.append(f"accumulate_by={dice.choice(('chunk', 'unbind'))}")
    if recipe == "deepspeed_zero":
        words.append(f"stage={dice.randrange(4)}")
    if dice.random() < 0.15:
        words.append("patience=1")  # most of these small runs have become worse, and end, before the last epoch
    every, keep = dice.randint(1, 5), dice.randint(1, 3)
    saving = [f"checkpoint.every={every}", f"checkpoint.keep={keep}"]
    saving.append(f"checkpoint.asynchronous={dice.choice(('true', 'false'))}")
    if dice.random() < 0.4:
        saving.append("checkpoint.best=true")
    faults, damages, count, sizes = [], [], dice.randint(1, 4), ()
    if recipe in RESIZED and dice.random() < 0.5:
        words += ["precision=fp64", "model.norm=group"]
        sizes = (ranks, *(dice.choice(RANKS[recipe]) for _ in range(count)))
    if not sizes and random.Random(f"lockstep fp16 {seed}").random() < 0.15:  # drawn apart: seeds keep their plans
        words += overflow.WORDS
    if recipe not in KEEP_ALL and random.Random(f"lockstep checkpointed {seed}").random() < 0.15:
        words.append("checkpoint_activations=2")
    for number in range(count):
        faults.append(draw_fault(dice, sizes[number] if sizes else ranks, saves=STEPS // every))
        harm = dice.random() < 0.4
        damages.append(Damage(dice.choice(DAMAGES), dice.random(), dice.random()) if harm else None)
    recipe, words = draw_task(random.Random(f"lockstep task {seed}"), recipe, words, resized=bool(sizes))
    if (
        recipe in ("ddp", "zero1", "lightning_fabric")
        and ranks == 2
        and any(word.endswith(":FewSequences") for word in words)
    ):
        part = random.Random(f"lockstep tensor {seed}").choice(
            (None, "sequence_parallel=true", "sequence_parallel=false")
        )
        way = random.Random(f"lockstep context {seed}").choice(("by=ring", "by=ulysses"))
        recipe, words = ("tensor_parallel", [*words, part]) if part else ("context_parallel", [*words, way])
        if random.Random(f"lockstep experts {seed}").random() < 0.5:  # drawn apart: other seeds keep their plans
            recipe, words = "expert_parallel", [*words[:-1], "task.experts=2", "task.experts_per_token=1"]
    if recipe == "transfer_learning" and random.Random(f"lockstep lora {seed}").random() < 0.5:
        recipe, words = "lora", [word for word in words if not word.startswith("unfreeze_epoch")]
    hooks = random.Random(f"lockstep compressed {seed}")
    if recipe == "ddp" and "precision=fp16" not in words and hooks.random() < 0.4:
        recipe, words = "comm_hooks", [*words, hooks.choice(("r=1", "compress=bf16", "compress=fp16"))]
    mesh = random.Random(f"lockstep mesh {seed}")
    if recipe == "fsdp" and not sizes and mesh.random() < 0.6:
        words = [word for word in words if not word.startswith(("task", "model.", "data.", "optim.lr"))]
        words += [f"task={fuzz_tasks.__file__}:FewSequences", "optim.lr=0.003", *mesh.choice(MESHES[ranks])]
        recipe = "parallel_mesh"
    return Plan(Setup(recipe, ranks, tuple(words), tuple(saving)), tuple(faults), tuple(damages), sizes)


def draw_task(dice: random.Random, recipe: str, words: list[str], resized: bool) -> tuple[str, list[str]]:
    """What is trained, and by whom: (recipe, words), each as it was or another one in its place.

    Args:
        resized: the starts are on different numbers of ranks.
    """
    able = ("images", "Weighted") if recipe == "sync_batchnorm" else TASKS  # whose model has BatchNorm
    task = dice.choice(able)
    if task != "images":
        words = [word for word in words if not word.startswith("model.")]
        words += [f"task={fuzz_tasks.__file__}:{task}", "optim.lr=0.003", f"data.workers={dice.choice((0, 0, 0, 1))}"]
    if resized:  # other ranks draw other dropout, and see other batches
        words += {
            "FewSequences": ["task.dropout=0"],
            "Ragged": ["task.dropout=0"],
            "Weighted": ["task.norm=layer"],
        }.get(task, [])
    if task == "Read":
        # A stream that is each rank's own part resumes on as many ranks as it was saved by.
        kinds = ("task.addressed=true", "task.addressed=false", "task.per_rank=true")
        words.append(dice.choice(kinds[:2] if resized else kinds))
    if recipe in WRAPS and dice.random() < 0.4:
        words.append(f"wrap={WRAPS[recipe]}")
        recipe = OWN_RECIPE
    return recipe, words


def draw_fault(dice: random.Random, ranks: int, saves: int, left: float = 1.0) -> Fault:
    """A fault of one start, of a run of which such a share is left."""
    who = dice.randrange(ranks)
    kind = dice.choice(("kill", "kill all", "kill in save", "kill in save", "kill in save", "signal", "signal in save"))
    sign = signal.SIGKILL if kind.startswith("kill") else dice.choice(SIGNALS)
    if kind.endswith("in save"):
        calls = 25 if who == 0 else 6  # about so many a save: rank 0 also commits and prunes
        call = dice.randint(1, max(calls, int(calls * saves * left)))
        return Fault(sign, who, call=call, after=dice.random() < 0.5, patient=dice.random() < 0.3)
    return Fault(sign, -1 if kind == "kill all" else who, dice.uniform(0.0, 1.1) * left, patient=dice.random() < 0.3)
