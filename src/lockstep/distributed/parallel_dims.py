"""How the ranks share the work: a global batch is cut into equal shares, and a pipeline cuts the model besides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelDims:
    """One rank's place in both.

    Attributes:
        shards: in how many equal shares a global batch is cut: one per rank, or one per pipeline.
        shard: which of them is this rank's.
        model_parallel_size: ranks that hold one model together. They are neighbours and work on the same images.
    """

    shards: int
    shard: int
    model_parallel_size: int

    @classmethod
    def of(cls, rank: int, world_size: int, model_parallel_size: int, shards: int | None = None) -> ParallelDims:
        """Args: shards: 1 where every rank takes the whole batch."""
        shards = shards or world_size // model_parallel_size
        return cls(shards, rank // model_parallel_size % shards, model_parallel_size)

    @property
    def cuts_the_model(self) -> bool:
        """Whether ranks hold different parts of the model, and the same parts in several pipelines."""
        return self.model_parallel_size > 1

    @property
    def owns_buffers(self) -> bool:
        """Whether this rank's running statistics are those that are evaluated and saved."""
        return self.shard == 0
