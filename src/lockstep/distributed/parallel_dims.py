"""How the ranks share the work: a global batch is cut into equal shares, and the model may be cut besides."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.config.schema import Config


@dataclass(frozen=True)
class ParallelDims:
    """One rank's place in both.

    Attributes:
        shards: in how many equal shares a global batch is cut: one per rank, or one per copy of the model.
        shard: which of them is this rank's.
        model_parallel_size: ranks that hold one model together. They are neighbours and work on the same images.
        rank, world_size: this rank's number, and how many there are.
        together: whether those who hold one model, or a stage of it, work on each layer together (tensor parallelism).
        whole: whether each of them has all weights (they share sequences).
        stages: in how many stages those who hold one model have it, one after the other (a pipeline).
    """

    shards: int
    shard: int
    model_parallel_size: int
    rank: int
    world_size: int
    together: bool = False
    whole: bool = False
    stages: int = 1

    @classmethod
    def of(cls, rank: int, world_size: int, config: Config, shards: int | None = None) -> ParallelDims:
        """Args: shards: 1 where every rank takes the whole batch."""
        size = config.model_parallel_size
        shards = shards or world_size // size
        together, whole = config.shares_activations, config.shares_sequences
        return cls(shards, rank // size % shards, size, rank, world_size, together, whole, config.pipeline_stages)

    @property
    def cuts_the_model(self) -> bool:
        """Whether ranks hold different parts of the model, and the same parts in several copies of it."""
        return self.model_parallel_size > 1 and not self.whole

    @property
    def in_stages(self) -> bool:
        """Whether those who hold one model have layers of it, one after the other."""
        return self.stages > 1

    @property
    def stage(self) -> int:
        """Which of the stages is this rank's first one."""
        return self.rank % self.model_parallel_size // (self.model_parallel_size // self.stages)

    @property
    def owns_buffers(self) -> bool:
        """Whether this rank's running statistics are those that are evaluated and saved."""
        return self.shard == 0

    @property
    def random_stream(self) -> int:
        """Whose random numbers this rank draws in training: its own, or those of all who work on a layer with it.

        What they all have of an activation loses the same numbers to dropout on each of them. So it does where every
        rank trains the whole batch.
        """
        repeated = self.shards * self.model_parallel_size < self.world_size
        return self.shard + self.shards * self.stage if self.together or repeated else self.rank

    @property
    def evaluates_together(self) -> bool:
        """Whether those who hold one model make its forwards together in evaluation, too."""
        return self.together or self.cuts_the_model

    @property
    def evaluation_share(self) -> tuple[int, int]:
        """(which share of the evaluation set is this rank's, how many there are)."""
        return (self.shard, self.shards) if self.evaluates_together else (self.rank, self.world_size)

    @property
    def counts_evaluation(self) -> bool:
        """Whether this rank's share counts, of those who evaluate it together."""
        return not self.evaluates_together or self.rank % self.model_parallel_size == 0
