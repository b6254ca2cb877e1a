"""What recipes.plan predicts of trainings that others have published, from published hardware figures alone.

    python -m benchmarks.published [--json FILE] [--only NAME]

The rows are all of seven sources that plan can express, chosen by a rule and not by their outcome:
- MosaicML's MPT models under FSDP on H100 in bf16, every row that takes one micro-batch per step (9 rows).
  https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md
- NVIDIA's ResNet-50 v1.5 under DDP on a DGX A100, 256 images per GPU, TF32 and mixed precision, without and with seven more
  GPUs (4 rows). Images lie in memory.
  https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5
- torchtitan's Llama 2 and 3 under FSDP on 64 A100, every row but those that checkpoint every other layer (6 rows). The page
  does not say how the nodes are linked, nor whether the model is compiled.
  https://github.com/pytorch/torchtitan/blob/041336434916bdc0f88c1f89fda176fd3c2092e4/docs/performance.md
- torchtitan's Llama 3.1 8B under FSDP in bf16 without torch.compile (2 rows), with memory.
  https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md
- Megatron-LM's weak scaling (Table 1), every row without a pipeline: DDP, and 2, 4 and 8 ranks that share each layer, on
  A100. Its operations per second are turned back into tokens by its own formula (3), which counts recomputed ones. Its
  micro-batch is not in the table; a rank takes its share as one. https://arxiv.org/abs/2104.04473
- PyTorch's FSDP paper, GPT-175B with 1 and 2 samples per GPU, which it gives for 128 to 512 GPUs alike; here 256. It does not
  say whether recomputed operations count; they are taken to. https://arxiv.org/abs/2304.11277, section 5.4
- Goyal et al., ResNet-50 on P100, 32 images per GPU in fp32: an epoch of 1.28 million images "over 16 minutes" on 8 GPUs, so
  that speed is an upper bound; 90 epochs in an hour on 256; an epoch in 30 seconds on 352 (profile benchmarks/p100.yaml).
  https://arxiv.org/abs/1706.02677

Nothing is tuned to a row. Differences that are known: MPT ties its first and last layer, which recipes.fsdp does not; torchtitan's
H100s have 96 GB with 2.4 TB/s, which is taken into account, and a limit of 500 W, which is not.

Expect: one line per row as it is done, in about ten minutes on two quiet cores; no GPU is needed.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lockstep.config.compose import compose_another
from lockstep.launch.validate import validate
from lockstep.models.gpt import GPT, GPTConfig
from lockstep.plan.dry_run import dry_steps
from lockstep.plan.hardware import load_hardware
from lockstep.plan.workers import planned_beside
from lockstep.registry import get_recipe


class NoTokens(Dataset[tuple[Tensor, Tensor]]):
    """Windows of zeros."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.length, dtype=torch.int64), torch.zeros(self.length, dtype=torch.int64)


class MptBlock(nn.Module):
    """LayerNorm, attention of all heads, LayerNorm, and a GELU four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Mpt(nn.Module):
    """Its first and last layer are not tied. Of Megatron's blocks, it has no table of positions."""

    def __init__(
        self, width: int, layers: int, heads: int, vocabulary: int, length: int, block: type[nn.Module] = MptBlock
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width) if block is MptBlock else None  # ranks that share layers share all
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(layers))
        self.norm, self.output = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


class SplitAttention(nn.Module):
    """Attention of all heads, whose projections ranks may share by heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MegatronBlock(nn.Module):
    """MptBlock with biases, in two parts that ranks may share."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SplitAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


MEGATRON_PLAN = {
    "embedding": "embedding",
    **{f"blocks.*.attention.{name}": "columns" for name in ("query", "key", "value")},
    "blocks.*.attention.out": "rows",
    "blocks.*.mlp.0": "columns",
    "blocks.*.mlp.2": "rows",
    "blocks.*.attention": "gather",
    "blocks.*.mlp": "gather",
    "blocks.*.norm_1": "whole",
    "blocks.*.norm_2": "whole",
    "norm": "whole",
    "output": "output",
}


@dataclass
class Published:
    """The task of a row."""

    family: str = "mpt"
    width: int = 2048
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    hidden: int = 8192
    vocabulary: int = 50368
    length: int = 2048

    def __post_init__(self) -> None:
        self.train_set, self.tokens_per_sample = NoTokens(self.length), self.length

    def build_model(self) -> nn.Module:
        if self.family != "llama":
            block = MptBlock if self.family == "mpt" else MegatronBlock
            return Mpt(self.width, self.layers, self.heads, self.vocabulary, self.length, block)
        return GPT(GPTConfig(self.layers, self.width, self.heads, self.kv_heads, self.hidden, self.vocabulary))

    def tensor_parallel_plan(self, model: nn.Module) -> dict[str, str]:
        return MEGATRON_PLAN

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten())


MPT = {
    "1b": {"width": 2048, "layers": 24, "heads": 16},
    "7b": {"width": 4096, "layers": 32, "heads": 32},
    "13b": {"width": 5120, "layers": 40, "heads": 40},
}
LLAMA = {
    "family": "llama",
    "width": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "hidden": 14336,
    "vocabulary": 128256,
    "length": 8192,
}
LLAMA_70B = LLAMA | {"width": 8192, "layers": 80, "heads": 64, "hidden": 28672}
LLAMA_2_70B = LLAMA_70B | {"vocabulary": 32000, "length": 4096}
LLAMA_2_13B = LLAMA_2_70B | {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "hidden": 13824}


def gpt_tokens(rate: float, layers: int, width: int, vocabulary: int, length: int = 2048) -> float:
    """Tokens per second of a GPU that does so many operations per second, by formula (3) of Megatron-LM's paper."""
    return rate / (96 * layers * width**2 * (1 + length / (6 * width) + vocabulary / (16 * layers * width)))


@dataclass(frozen=True)
class PublishedRow:
    """A training that somebody measured.

    Attributes:
        shape: keys of the task Published; none: ResNet-50.
        samples: of each GPU.
        tokens: per second and GPU; of ResNet-50, images.
        hardware: a profile, or a file beside this one.
        memory: of a GPU at the peak, in bytes, where it was published.
    """

    name: str
    shape: dict[str, Any]
    gpus: int
    samples: int
    tokens: float
    memory: float | None = None
    bandwidth: float | None = None
    words: tuple[str, ...] = ()
    recipe: str = "fsdp"
    hardware: str = "h100"

    @property
    def unit(self) -> str:
        return "tokens" if self.shape else "images"


IMAGES = (
    "task.name=images",
    "model=resnet50",
    "data=synthetic",
    "data.image_size=224",
    "data.num_classes=1000",
    "optim=sgd",
)
ROWS = [
    *(
        PublishedRow(
            f"ResNet-50, A100, {'mixed precision, channels last' if layout else 'TF32'}",
            {},
            gpus,
            256,
            images / gpus,
            words=(*IMAGES, f"precision={precision}", *layout),
            recipe="ddp" if gpus > 1 else "single",
            hardware="a100",
        )
        for precision, layout, gpus, images in (
            ("fp32", (), 1, 938),
            ("fp32", (), 8, 7248),
            ("bf16", ("channels_last=true",), 1, 2470),
            ("bf16", ("channels_last=true",), 8, 16621),
        )
    ),
    *(
        PublishedRow("MPT-1b", MPT["1b"], *row)
        for row in ((8, 14, 45455), (16, 20, 46037), (32, 20, 45130), (64, 20, 44402))
    ),
    PublishedRow("MPT-7b", MPT["7b"], 8, 6, 10643),
    *(PublishedRow("MPT-13b", MPT["13b"], *row) for row in ((8, 2, 4792), (16, 2, 4767), (32, 2, 4811), (64, 2, 4800))),
    *(
        PublishedRow(
            "Llama-3.1-8B", LLAMA, gpus, 2, tokens, memory * 2**30, 2.4e12, ("checkpoint_activations=selective",)
        )
        for gpus, tokens, memory in ((8, 5762, 82.4), (128, 5605, 67.0))
    ),
    *(
        PublishedRow(
            f"{name}, A100{'' if how == 'none' else f', {how} checkpointing'}",
            shape,
            64,
            samples,
            tokens,
            words=(f"checkpoint_activations={how}",),
            hardware="a100",
        )
        for name, shape, samples, how, tokens in (
            ("Llama-3-8B", LLAMA, 1, "selective", 2973),
            ("Llama-3-70B", LLAMA_70B, 1, "full", 331),
            ("Llama-2-13B", LLAMA_2_13B, 2, "none", 2162),
            ("Llama-2-13B", LLAMA_2_13B, 2, "selective", 1904),
            ("Llama-2-70B", LLAMA_2_70B, 1, "selective", 355),
            ("Llama-2-70B", LLAMA_2_70B, 2, "full", 353),
        )
    ),
    *(
        PublishedRow(
            f"Megatron {name}, A100",
            {"family": "megatron", "width": width, "layers": layers, "heads": heads, "vocabulary": 51200},
            gpus,
            batch // gpus,
            gpt_tokens(rate, layers, width, 51200),
            words=("checkpoint_activations=full", *shared),
            recipe="tensor_parallel" if shared else "ddp",
            hardware="a100",
        )
        for name, width, layers, heads, shared, gpus, batch, rate in (
            ("1.7B", 2304, 24, 24, (), 32, 512, 137e12),
            ("3.6B", 3072, 30, 32, ("tensor=2",), 64, 512, 138e12),
            ("7.5B", 4096, 36, 32, ("tensor=4",), 128, 512, 142e12),
            ("18.4B", 6144, 40, 48, ("tensor=8",), 256, 1024, 135e12),
        )
    ),
    *(
        PublishedRow(
            f"GPT-175B, A100, {samples} per GPU",
            {"width": 12288, "layers": 96, "heads": 96, "vocabulary": 50000},
            256,
            samples,
            gpt_tokens(rate, 96, 12288, 50000),
            words=("checkpoint_activations=full",),
            hardware="a100",
        )
        for samples, rate in ((1, 173e12), (2, 186e12))
    ),
    *(
        PublishedRow(
            "ResNet-50, P100",
            {},
            gpus,
            32,
            1.28e6 * epochs / seconds / gpus,
            words=(*IMAGES, "precision=fp32"),
            recipe="ddp",
            hardware="p100.yaml",
        )
        for gpus, epochs, seconds in ((8, 1, 16 * 60), (256, 90, 3600), (352, 1, 30))
    ),
]


def predict(row: PublishedRow) -> dict[str, Any]:
    """A row's published and predicted figures."""
    beside = Path(__file__).with_name(row.hardware)
    recipe, hardware = get_recipe(row.recipe), load_hardware(str(beside) if beside.is_file() else row.hardware)
    if row.bandwidth:
        hardware = replace(hardware, memory=96e9, memory_bandwidth=row.bandwidth)
    shape = [f"task.{key}={value}" for key, value in row.shape.items()]
    words = [f'task.name="{Path(__file__).resolve()}:Published"', *shape, "optim=adamw", "precision=bf16", *row.words]
    if not row.shape:
        words = list(row.words)
    config = compose_another(recipe, [*words, f"global_batch_size={row.samples * row.gpus}"])
    validate(config, recipe, row.gpus, (1000, 10**12))  # ImageNet has a thousand classes
    found = dry_steps(recipe, config, row.gpus, hardware)
    length = int(row.shape.get("length", 2048)) if row.shape else 1
    return {
        "model": row.name,
        "gpus": row.gpus,
        "unit": row.unit,
        "published_tokens": row.tokens,
        "predicted_tokens": row.samples * length / found.step.times.step,
        "published_memory": row.memory,
        "predicted_memory": found.peak_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    arguments = parser.parse_args()
    rows: dict[int, dict[str, Any]] = {}
    asked = [number for number, row in enumerate(ROWS) if arguments.only in row.name]
    for number, made in planned_beside(lambda number: predict(ROWS[number]), asked):
        row, rows[number] = ROWS[number], made
        assert made, f"{row.name}: its process was ended; is there enough memory on this machine?"
        speed = made["predicted_tokens"] / row.tokens - 1
        line = f"{row.name:15} {row.gpus:4} GPUs {row.tokens:8,.0f} {row.unit}/s/GPU, predicted {made['predicted_tokens']:8,.0f}"
        line += f" ({speed:+.0%})"
        if row.memory:
            line += f"; {row.memory / 1e9:.1f} GB, predicted {made['predicted_memory'] / 1e9:.1f}"
            line += f" ({made['predicted_memory'] / row.memory - 1:+.0%})"
        print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps([rows[number] for number in sorted(rows)], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
