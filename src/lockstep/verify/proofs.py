"""What recipes.verify proves: for each proof that a recipe declares, a few steps of it against the same of a reference.

The reference is `single`, among the same ranks, or a command of its own on one rank (lockstep/verify/reference.py)."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lockstep.callbacks.base import Callback
from lockstep.config.copies import convert, with_values
from lockstep.config.declared import own_task
from lockstep.config.keys import typed
from lockstep.config.schema import Config
from lockstep.config.tasks import IMAGES, task_schema
from lockstep.distributed.collectives import broadcast_object
from lockstep.distributed.signals import Preempted
from lockstep.errors import CheckFailed, UserError
from lockstep.launch.validate import check_batch, check_package
from lockstep.recipe import Proof, Recipe
from lockstep.run import Run
from lockstep.tasks.build import has_batchnorm, sketch
from lockstep.training.precision import AUTOCAST
from lockstep.verify.first_difference import parting_of
from lockstep.verify.operations import with_operation
from lockstep.verify.reference import SINGLE, described_reference, reference_of, run_alone
from lockstep.verify.rows import VerifyRow, rounding_of
from lockstep.verify.sample_masks import drops
from lockstep.verify.trace import Trace, trace

PROOF_STEPS = {"fp64": 5, "fp32": 3, "bf16": 3, "fp16": 3}  # by precision
SAMPLES_PER_RANK = 14  # chunked in 4 it leaves a ragged piece, which still has 2 samples for BatchNorm
OF_IMAGES = ("model.", "data.")  # keys of task=images
TASK_KEYS = "task."  # what the keys of a task begin with
RECORDED = "-recorded"  # what the folder of a training is called besides that is repeated to record its tensors
BY_SHARES = "its BatchNorm normalises by each share"


@dataclass(frozen=True)
class ProofCase:
    """One row to come.

    Attributes:
        settings: of both sides.
        differs: why the two sides compute different trainings; empty where they must be equal.
        against: the reference: single, or the path of a recipe's file, which is run on one rank.
        task: what both sides train in place of images; empty: what `run.task` is.
        interrupt: the step after which the recipe's training is cut off and resumed; the reference's is not.
    """

    recipe: Recipe
    proof: Proof
    precision: str
    settings: dict[str, Any]
    differs: str = ""
    against: str = SINGLE
    task: str = ""
    interrupt: int | None = None

    @property
    def own_words(self) -> list[str]:
        """The proof's settings for its recipe alone, as typed."""
        return typed_words(self.proof.own)

    @property
    def words(self) -> str:
        """The settings of both sides, as typed."""
        return " ".join([*typed_words(self.settings), *[f"task={self.task}"] * bool(self.task)])

    @property
    def variant(self) -> str:
        """Those of `own_words` that not every proof of this recipe has."""
        others = [typed_words(proof.own) for proof in self.recipe.proofs]
        return " ".join(word for word in self.own_words if not all(word in words for words in others))


def typed_words(values: dict[str, Any]) -> list[str]:
    return [typed(*pair) for pair in values.items()]


def proofs_of(recipe: Recipe, config: Config) -> list[Proof]:
    """What a recipe is held to under this config; of a task other than images, what does not set its model or data.

    A proof that asks for another norm than BatchNorm holds for that task as well, where its model has none; else it is
    another computation, which is measured and not judged.
    """
    if config.task.name == IMAGES:
        return list(recipe.proofs) or [Proof()]
    found = []
    for proof in recipe.proofs or (Proof(),):
        if proof.images:
            continue
        by_shares = proof.settings.get("model.norm", "batch") != "batch" and has_batchnorm(config)
        keys = {f"{TASK_KEYS}{entry.name}" for entry in fields(config.task)}
        settings = {
            name: value
            for name, value in proof.settings.items()
            if not name.startswith(OF_IMAGES) and (name in keys or not name.startswith(TASK_KEYS))
        }
        because = (proof.because or BY_SHARES) if by_shares else ""
        found.append(replace(proof, settings=settings, differs={}, because=because))
    return found


def proof_cases(recipes: Iterable[Recipe], config: Config, device: str) -> list[ProofCase]:
    """All rows to come. A precision other than the default one asks for the proofs in that precision alone."""
    cases = []
    every_precision = config.precision == Config().precision
    precisions = ["fp64", "fp32", *AUTOCAST] if device == "cuda" else ["fp64", "fp32"]
    for recipe, proof in [(each, proof) for each in recipes for proof in proofs_of(each, config)]:
        against = reference_of(recipe, getattr(config, "against", None))
        interrupt = getattr(config, "interrupt", None)
        differs = proof.because if config.task.name != IMAGES else ""
        task = (own_task(recipe) or "") if config.task.name == IMAGES else ""  # it cannot train images
        for precision in precisions if every_precision else [config.precision]:
            # What a recipe lacks of the precision that proves most, or was asked for, is said in a row.
            if precision in proof.precisions or precision == "fp64" or not every_precision:
                cases.append(ProofCase(recipe, proof, precision, proof.settings, differs, against, task, interrupt))
        if proof.differs and every_precision:
            cases.append(ProofCase(recipe, proof, proof.precisions[0], proof.differs, proof.because, against, task))
    return cases


def fewest_steps(config: Config) -> int:
    """Steps of the shortest proof."""
    return config.max_steps or min(PROOF_STEPS.values())


def proof_config(asked: Config, schema: type[Config], precision: str, values: dict[str, Any]) -> Config:
    """What both sides train, each in its own config class: few steps, every one of them logged, one evaluation at the end."""
    common: dict[str, Any] = {
        "precision": precision,
        "max_steps": asked.max_steps or PROOF_STEPS[precision],
        "log_every": 1,
        "eval_every": 0,
        "optim.warmup_steps": 0,
    }
    if precision == "fp16":  # so small that no step is left out: which ones are depends on how images are dealt out
        common["loss_scale"] = 256.0
    return with_values(convert(asked, schema), common | values)


def both_configs(case: ProofCase, single: Recipe, asked: Config) -> tuple[Config, Config]:
    """(what the reference trains, what the recipe trains), from what the tool was asked for."""
    trained = {name: value for name, value in case.settings.items() if name.startswith(TASK_KEYS)}
    settings = {name: value for name, value in case.settings.items() if name not in trained}
    base = proof_config(asked, single.config, case.precision, settings)
    mine = with_values(proof_config(asked, case.recipe.config, case.precision, settings), case.proof.own)
    if case.task:
        base.task, mine.task = task_schema(case.task)(), task_schema(case.task)()
    return with_values(base, trained), with_values(mine, trained)


def refuse_dropout(case: ProofCase, config: Config, masked: bool) -> None:
    """Raises UserError where the model drops numbers, and the two sides cannot be made to drop the same."""
    if not masked:
        return
    if config.pipeline_stages > 1:
        raise UserError(
            "dropout: a stage after the first does not see the samples that masks are made by here; set its probability to 0"
        )
    if config.compile:
        raise UserError("dropout: masks are made by samples in hooks, which compile=true melts; leave one out")
    if case.against != SINGLE:
        raise UserError(
            "dropout: a reference that is a command of its own draws its own masks; set its probability to 0"
        )


def proof_batch(samples: int, ranks: int) -> int:
    """Samples of a step, over all ranks: some for each rank, or of a small data set as many as there are.

    A number for each rank that is even: a pipeline pipes the batch through in 4 micro-batches.
    """
    share = min(SAMPLES_PER_RANK, max(1, samples // ranks))
    return (share if share < 2 else share - share % 2) * ranks


class References(dict[str, Trace | None]):
    """What `single` computed for earlier cases, which is not computed again, by settings.

    Attributes:
        rounding: what rounding makes of it, likewise: see `rows.rounding_of`; empty where that is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounding: dict[str, dict[str, float]] = {}


def find_rounding(
    run: Run[Any], single: Recipe, config: Config, name: str, rounded: Trace | None, masked: bool = False
) -> dict[str, float]:
    """What rounding makes of `single`'s training: how far `rounded` is from the same in fp64; on rank 0.

    Empty where the model does not compute in fp64.
    """
    values = with_values(config, {"precision": "fp64"})
    try:
        exact = trace(run, single, values, f"{name}-exact", begins=True, smooth=True, masked=masked)
    except Preempted:
        raise
    except Exception:  # on all ranks, each of which trains the same by itself
        run.report.log.write(traceback.format_exc())
        return {}
    return rounding_of(rounded, exact, config.precision) if rounded and exact else {}


def verify_case(run: Run[Any], case: ProofCase, single: Recipe, references: References) -> VerifyRow:
    """Train both sides on the ranks of `run` and compare them; the numbers are on rank 0.

    Raises:
        CheckFailed: a training failed.
    """
    each, precision = case.recipe, case.precision
    base, mine = both_configs(case, single, run.asked)
    row = VerifyRow(each.name, precision, run.world.world_size, mine.max_steps or 0, variant=case.variant)
    row.against = described_reference(case.against, each)
    row.settings = case.words
    ranks = each.ranks or run.world.world_size
    try:
        check_package(each)
        check_batch(mine, ranks)
        if each.check:
            each.check(mine, mine.global_batch_size // (ranks // mine.model_parallel_size))
        # `single` itself, with other settings or a bug, draws as the reference does: its generators are compared, too.
        dropping = drops(sketch(mine))
        drawn = dropping and each.name == single.name
        masked = dropping and not drawn
        refuse_dropout(case, mine, masked)
    except UserError as error:
        row.verdict = f"not run: {error}"
        return row
    # Where a part of the model is frozen, say, the same part is frozen in `single`.
    alike = case.proof.prepare is not None
    said = [precision, *typed_words(case.settings), *[case.task] * bool(case.task), *["drawn"] * drawn]
    key = "-".join([*said, *(case.own_words if alike else [])])
    name = "-".join([each.name, *said, *case.own_words])

    def train(steps: int = 0, looks_on: Sequence[Callback] = ()) -> Trace | None:
        """The recipe's training; the tensors of so many steps are recorded, in a folder of their own."""
        recorded, where = with_values(mine, {"record_tensors": steps}), name + RECORDED * bool(steps or looks_on)
        begins = case.against != SINGLE
        return trace(run, each, recorded, where, case.proof.prepare, case.interrupt, looks_on, begins, smooth, masked)

    def refer(found: Trace | None, steps: int = 0, looks_on: Sequence[Callback] = ()) -> Trace | None:
        """The reference's, likewise."""
        recorded = with_values(base if case.against == SINGLE and not alike else mine, {"record_tensors": steps})
        if case.against == SINGLE:
            where = f"single-{key}" + RECORDED * bool(steps or looks_on)
            return trace(run, single, recorded, where, case.proof.prepare, None, looks_on, True, smooth, masked)
        return run_alone(run, case.against, recorded, f"{name}-on-one-rank" + RECORDED * bool(steps), found)

    # In less than fp64 the same is allowed as rounding explains; a reference that is a command of its own keeps its kinks.
    smooth = precision != "fp64" and case.against == SINGLE
    try:
        if smooth:
            plain = "-".join(said)
            if plain not in references.rounding:
                rounded = trace(run, single, base, f"single-{plain}", begins=True, smooth=True, masked=masked)
                references[plain] = rounded
                references.rounding[plain] = find_rounding(run, single, base, f"single-{plain}", rounded, masked)
            row.allow_rounding(references.rounding[plain])
        if case.against == SINGLE and key not in references:
            references[key] = refer(None)
        found = train()
        reference = references[key] if case.against == SINGLE else refer(found)
        if found and reference:
            row.compare(found, reference, case.differs)
        steps = broadcast_object(row.off_after if row.fails and getattr(run.config, "trace", False) else 0)
        if steps:
            train(steps)
            refer(found, steps)
            where = f"single-{key}" if case.against == SINGLE else f"{name}-on-one-rank"
            folders = run.out / (name + RECORDED), run.out / (where + RECORDED)
            if run.world.rank == 0:
                row.parting = parting_of(*folders, (each.local_updates, False))
            if case.against == SINGLE:  # else the other side is a command of its own

                def again(number: int, looks_on: Callback) -> None:
                    refer(None, looks_on=[looks_on]) if number else train(looks_on=[looks_on])

                row.parting = with_operation(run, row.parting, folders, (each.ranks, single.ranks), again)
    except Preempted:
        raise
    except Exception as error:
        # The ranks may now be at different places, so no further row could be trusted.
        run.report.log.write(traceback.format_exc())
        raise CheckFailed(f"{each.name} in {precision}: {type(error).__name__}: {error}") from None
    return row
