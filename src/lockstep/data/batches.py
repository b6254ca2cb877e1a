"""The batches of one rank, for training and for evaluation: fetched, moved to its device, normalised, resized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.config.schema import Config
from lockstep.data.datasets import Batch, ImageSubset, checksum, load_data
from lockstep.data.loader import Samples, build_loader
from lockstep.data.sampler import EvalSampler, StepSampler
from lockstep.data.transforms import Normalise
from lockstep.distributed.parallel_dims import ParallelDims
from lockstep.distributed.process_group import World


class BatchSource:
    """Both data sets, and this rank's batches of them.

    Args:
        dtype: of the images that the model takes.

    Attributes:
        workers: processes that decode images; images in memory are faster without.
    """

    def __init__(self, config: Config, world: World, dims: ParallelDims, dtype: torch.dtype) -> None:
        assert config.model.image_size is not None, "the app fills in what the data set says"
        self._config, self._world, self._dims, self._dtype = config, world, dims, dtype
        self.image_size = config.model.image_size
        self.train_set, self.eval_set = load_data(config.data, self.image_size, config.seed)
        self._normalise = Normalise(config.data.mean, config.data.std)
        decodes = config.data.name == "imagefolder"
        workers = config.data.workers
        self.workers = (max(1, world.threads) if decodes else 0) if workers is None else workers

    def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's shares of the global batches of steps start…stop − 1."""
        config, dims = self._config, self._dims
        sampler = StepSampler(
            len(self.train_set), config.global_batch_size, config.seed, dims.shard, dims.shards, start, stop
        )
        return self._load(Samples(self.train_set, config.seed, config.data.augment), sampler)

    def eval_sampler(self) -> EvalSampler:
        """Which samples of the evaluation set are this rank's."""
        size, batch_size = len(self.eval_set), self._config.eval_batch_size
        return EvalSampler(size, batch_size, self._world.rank, self._world.world_size)

    def eval_batches(self, sampler: EvalSampler) -> Iterator[Batch]:
        """This rank's batches of the evaluation set, prepared as those to train on are, and not augmented."""
        return self._load(Samples(self.eval_set, self._config.seed, augment=False), sampler)

    def eval_images(self, samples: Sequence[int]) -> Tensor:
        """Images of the evaluation set by their numbers: uint8 [N, 3, H, W]."""
        return self.eval_set.fetch(torch.tensor(samples), None).images

    def facts(self) -> dict[str, int]:
        """What all ranks must have alike (lockstep.distributed.consistency)."""
        return {
            "images to train on": len(self.train_set),
            "images to evaluate": len(self.eval_set),
            "other images to train on": checksum(self.train_set),
            "other images to evaluate": checksum(self.eval_set),
        }

    @property
    def where(self) -> str:
        """The setting that says where the data lie."""
        data = self._config.data
        return f"data.root={data.root}" if data.root else f"data={data.name}"

    def limit_evaluation(self) -> None:
        """Evaluate one batch per rank from now on, where what an evaluation finds does not matter."""
        self.eval_set = ImageSubset(self.eval_set, self._config.eval_batch_size * self._world.world_size)

    def to_model(self, images: Tensor) -> Tensor:
        """Floats of the dtype, device and memory format that the model takes."""
        images = images.to(self._world.device, self._dtype)
        return images.contiguous(memory_format=torch.channels_last) if self._config.channels_last else images

    def blank_images(self, count: int) -> Tensor:
        """So many black images, as the model takes them."""
        return self.to_model(torch.zeros(count, 3, self.image_size, self.image_size))

    def _load(self, samples: Samples, sampler: StepSampler | EvalSampler) -> Iterator[Batch]:
        return map(self._prepare, build_loader(samples, sampler, self.workers, self._world.device.type == "cuda"))

    def _prepare(self, batch: Batch) -> Batch:
        """To the device as bytes, then to normalised floats of the model's size and memory format."""
        device, size = self._world.device, self.image_size
        images = batch.images.to(device, non_blocking=True)
        if not self._config.channels_last:
            images = images.contiguous()  # an image folder's are channels_last; bytes are quicker to move than floats
        images = self._normalise(images, self._dtype)
        if images.shape[-1] != size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return Batch(self.to_model(images), batch.labels.to(device, non_blocking=True))
