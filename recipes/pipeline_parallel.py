"""Pipeline parallelism: the parts of a cut model in processes of their own, kept busy by micro-batches.

Rank s of a pipeline holds stage s. It receives a micro-batch's activations from rank s − 1, runs its blocks, sends
the result to rank s + 1, and is free for the next micro-batch; in backward the gradients of those activations travel
the other way. The schedule decides the order. `gpipe` runs all forwards, then all backwards. `1f1b` starts each
backward as soon as it can, so that at most `stages` micro-batches' activations are held. `interleaved` gives each rank
two thinner stages, which halves the wait at both ends, and `zero_bubble` fills the rest by putting the weights'
gradients off.

While a pipeline of p ranks fills and drains, each rank waits: a share (p − 1) / (w m + p − 1) of the step with m
micro-batches, the bubble, if all stages cost the same. With `gpipe` and `1f1b` w is 1, with `interleaved` 2, and with
`zero_bubble` 6: it waits for a third of a stage's work. `cut=balanced` measures the blocks and cuts accordingly. The
summary sets each rank's measured idle share beside the formula.

With more ranks than `stages` there are several pipelines, each with its share of the batch: the mesh is ("data",
"stage"), and equal stages average their gradients over the data axis. BatchNorm normalises micro-batches one by one;
`model.norm=group` computes exactly what recipes.single does. Evaluation, too, goes through the stages, without a
schedule: no rank ever has another stage's weights on its GPU.

    python -m recipes.pipeline_parallel                                      2 stages, 4 micro-batches, 1F1B
    python -m recipes.pipeline_parallel schedule=gpipe micro_batches=8 cut=balanced
    python -m recipes.pipeline_parallel nproc=4                              2 pipelines of 2 stages

Expect: an accuracy of 0.97 or more on the digits, in about two minutes on two CPU cores.
Source: https://arxiv.org/abs/1811.06965 (GPipe), https://arxiv.org/abs/2104.04473 (1F1B, interleaved),
https://arxiv.org/abs/2401.10241 (zero bubble), https://docs.pytorch.org/docs/stable/distributed.pipelining.html
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage

from lockstep import Proof, Run, recipe
from lockstep.config.keys import AUTO, CUT_HELP, key
from lockstep.config.schema import Config
from lockstep.data.batch import pieces, tree_tensors, with_tensors
from lockstep.distributed.collectives import gather_numbers
from lockstep.parallel.in_turn import PartsInTurn
from lockstep.parallel.partition import Part, crossings, join, wanted_cut
from lockstep.parallel.replicas import average_gradients
from lockstep.parallel.stages import (
    STAGES_A_RANK,
    Contiguous,
    agreed_parts,
    build_schedule,
    check_stages,
    gather_model,
    refuse_gloo_between_gpus,
)
from lockstep.training.accumulate import MicroBatch, micro_batch
from lockstep.training.clip import clip_gradients
from lockstep.training.optim import build_optimizer, build_scheduler
from lockstep.training.timing import Stopwatch


@dataclass
class PipelineConfig(Config):
    model_parallel_key: ClassVar[str] = "stages"
    refuses: ClassVar[dict[str, str]] = {
        "expert": "a pipeline's schedule knows nothing of the all-to-all in its stages; use recipes.expert_parallel, or "
        "leave it out: each stage then holds all experts of its blocks"
    }
    stages: int = key(2, "ranks that a model is cut over", minimum=1)
    cut: Any = key(AUTO, CUT_HELP)
    micro_batches: int = key(4, "micro-batches that a global batch is piped through in", minimum=1)
    schedule: str = key(
        "1f1b",
        "order of the micro-batches' forwards and backwards",
        ("gpipe", "1f1b", "interleaved", "zero_bubble"),
    )

    @property
    def pipeline_micro_batches(self) -> int:
        return self.micro_batches

    @property
    def pipeline_stages(self) -> int:
        return self.stages

    @property
    def parts(self) -> int:
        """That the model is cut into."""
        return self.stages * STAGES_A_RANK[self.schedule]


class TimedStage(PipelineStage):
    """A stage that times its own forwards and backwards; what is left of a step is waiting."""

    watch: Stopwatch
    crossing: dict[str, Any]  # what it takes and gives, where that is known beforehand

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().forward_one_chunk, args, kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().backward_one_chunk, args, kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().backward_weight_one_chunk, args, kwargs)

    def _timed(self, work: Any, args: Any, kwargs: Any) -> Any:
        self.watch.start()
        result = work(*args, **kwargs)
        self.watch.stop()
        return result


def build_stages(
    run: Run[PipelineConfig], model: nn.Module, stage_group: dist.ProcessGroup
) -> tuple[list[TimedStage], list[Part]]:
    """(this rank's stages, every stage's part of the model)."""
    config, rank, size = run.config, dist.get_rank(stage_group), dist.get_world_size(stage_group)
    count = config.parts
    piece = config.global_batch_size // run.shards // config.micro_batches
    example = run.data.example(piece).inputs
    parts = agreed_parts(model, wanted_cut(config.cut, count), count, example, run.blocks(model))
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    wrapped = [Contiguous(part, memory_format, example if number == 0 else None) for number, part in enumerate(parts)]
    # A plan's other ranks are not there to be asked what they send.
    crossing = crossings(wrapped, tree_tensors(example)) if run.world.backend == "fake" else [{}] * count
    stages = []
    for number in range(rank, count, size):  # rank r holds stages r, r + size, …
        part = wrapped[number].to(run.device)
        stages.append(TimedStage(part, number, count, run.device, group=stage_group, **crossing[number]))
        stages[-1].watch, stages[-1].crossing = Stopwatch(run.device), crossing[number]
    return stages, parts


def another(stage: TimedStage) -> TimedStage:
    """The same stage for samples of another size: what it receives is as large as in its first step."""
    count, given = stage.num_stages, stage.crossing
    found = TimedStage(stage.submod, stage.stage_index, count, stage.device, group=stage.group, **given)
    found.watch = stage.watch
    return found


def bubble_share(schedule: str, ranks: int, micro_batches: int) -> float:
    """The share of a step in which each rank waits, if all stages cost the same and a backward twice its forward."""
    waits_for = STAGES_A_RANK[schedule] * (3 if schedule == "zero_bubble" else 1)  # of this many pieces, for one
    return (ranks - 1) / (waits_for * micro_batches + ranks - 1)


def check(config: PipelineConfig, share: int) -> None:
    """What the schedules and the cut ask for, before anything starts."""
    check_stages(config, config.stages, config.parts)


@recipe(
    config=PipelineConfig,
    proof=Proof(
        {"model.norm": "group"},
        {"stages": 2, "micro_batches": 4},
        {"model.norm": "batch"},
        "BatchNorm sees micro-batches",
    ),
    check=check,
    next_command="python -m recipes.model_parallel     the same cut without the pipeline: one part always waits",
)
def train(run: Run[PipelineConfig]) -> None:
    refuse_gloo_between_gpus(run.device.type, run.world.backend)
    mesh = init_device_mesh(run.device.type, (run.shards, run.config.stages), mesh_dim_names=("data", "stage"))
    data_group, stage_group = mesh.get_group("data"), mesh.get_group("stage")
    model = run.place(run.task.build_model())
    stages, parts = build_stages(run, model, stage_group)
    first, last = stages[0].is_first, stages[-1].is_last
    mine = join([parts[stage.stage_index] for stage in stages])
    optimizer = build_optimizer(run.config.optim, mine)
    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)
    scaler = run.scaler()  # precision=fp16 needs it; else it passes everything on

    def whole() -> nn.Module:
        return gather_model(model, mine, parts, run.config.stages, run.device)

    in_turn = PartsInTurn(
        {stage.stage_index: stage.submod for stage in stages},
        stages[0].num_stages,
        stage_group,
        data_group,
        lambda: stages[-1].submod.gives,
        run.device,
    )
    model.forward = in_turn.forward  # for whoever calls the whole model, such as a task that shows what it has learnt
    micros: list[MicroBatch] = []  # of the step

    def scaled_loss(outputs: Any, number: Tensor) -> Tensor:
        """The schedule divides the sum of these losses' gradients by the number of micro-batches."""
        micro, form = micros[int(number)], stages[-1].submod.gives
        loss = run.task.loss(outputs if form is None else with_tensors(form, outputs), micro.targets)
        if isinstance(micro.weight, Tensor):  # the task counts tokens, say, and these are not equally many
            loss = loss * (micro.weight * len(micros))
        return scaler.scale(loss)

    schedules: dict[Any, Any] = {}  # by the shapes of the inputs, which are those of the longest sample of a batch
    clock = Stopwatch(run.device)
    for batch in run.steps(model=mine, optimizer=optimizer, scheduler=scheduler, whole=whole, evaluated=in_turn):
        inputs = tuple(tree_tensors(batch.inputs))
        shapes = tuple((x.shape, x.dtype) for x in inputs)  # the same on all ranks of a pipeline, as its batch is
        if shapes not in schedules:
            again = [another(stage) for stage in stages]
            schedules[shapes] = build_schedule(run.config.schedule, again, run.config.micro_batches, scaled_loss)
        micros[:] = [micro_batch(batch, *bounds) for bounds in pieces(batch.count, run.config.micro_batches)]
        numbers = torch.arange(len(micros))  # the schedule cuts tensors alone, and targets may be anything
        losses: list[Tensor] = []
        clock.start()
        with run.autocast():  # the schedule runs forwards and backwards, and divides the gradients by micro_batches
            schedules[shapes].step(
                *(inputs if first else ()), **({"target": numbers, "losses": losses} if last else {})
            )
        clock.stop()
        if last:  # only here the model ends, and with it the loss is known
            run.record(loss=scaler.unscale_loss(torch.stack(losses).mean()))
        average_gradients(mine, data_group)
        clip_gradients(mine, optimizer, scaler, run.config.gradients, stage_group)
        scaler.step(optimizer)  # unscales the gradients, unless that is done; if one is not finite, no rank updates
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()

    busy = sum(stage.watch.total() for stage in stages)
    idle = gather_numbers(1 - busy / clock.total(), run.device)
    bubble = bubble_share(run.config.schedule, run.config.stages, run.config.micro_batches)
    run.note(
        f"idle: {', '.join(f'{share:.0%}' for share in idle)} by rank; the bubble alone is {bubble:.0%}; "
        f"cut before {', '.join(part.names[0] for part in parts[1:])}",
        idle_shares=idle,
        bubble_formula=bubble,
        cuts=[part.names[0] for part in parts[1:]],
    )


if __name__ == "__main__":
    train.main()
