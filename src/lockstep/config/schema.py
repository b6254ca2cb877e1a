"""Every key a user can set, with its type, its default and what it does.

Hydra composes `conf/` against these dataclasses: a misspelt key or a wrong type fails by name before anything starts.
A rank reads the frozen `config.yaml` back through the same classes.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lockstep.errors import UserError

if TYPE_CHECKING:
    pass


def key(
    default: Any,
    help: str,
    choices: tuple[str | int, ...] = (),
    minimum: float | None = None,
    only: tuple[str, ...] = (),
    free: bool = False,
) -> Any:
    """A config key: its default, one line of help, what `check_values` holds it to, and the recipes that use it.

    `free` keys may change when a run is continued; any other would make it another training.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "only": only, "default": default, "free": free}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


AUTO = "auto"  # global_batch_size, before it is found, and what is chosen for the hardware (tuning.py)
FLAT_WEIGHTS = ("deepspeed_zero",)  # recipes whose weights have no memory format of their own
NO_AUTO = ("checkpoint_resume", "compare", "tune", "verify")  # several trainings, so there is no one batch to find
SPLIT = ("model_parallel", "pipeline_parallel")
LIGHTNING = ("lightning_fabric", "lightning_trainer")
SHARDED = ("fsdp", "verify")
TRANSFER = ("transfer_learning",)
TUNE = ("tune",)


@dataclass
class ModelConfig:
    name: str = key("resnet18", "architecture", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"))
    num_classes: int | None = key(None, "outputs of the last layer (null: the data set's classes)", minimum=1)
    image_size: int | None = key(None, "side of the square input in pixels (null: the data set's)", minimum=8)
    norm: str = key("batch", "normalisation layer", ("batch", "group"))
    init: str = key("kaiming", "weight initialisation", ("kaiming", "xavier"))


@dataclass
class DataConfig:
    name: str = key("digits", "data set", ("digits", "synthetic", "cifar10", "imagefolder"))
    root: str | None = key(None, "folder that holds the data (cifar10, imagefolder)", free=True)
    num_classes: int | None = key(None, "classes (null: counted)", minimum=1)
    classes: list[str] | None = key(
        None, "take these alone, relabelled 0, 1, … (0…9, or an imagefolder's folders; null: all)"
    )
    image_size: int = key(8, "side of the square images in pixels, before model.image_size resizes them", minimum=1)
    mean: list[float] = key((0.5, 0.5, 0.5), "mean of each channel, images scaled to 0…1")
    std: list[float] = key((0.5, 0.5, 0.5), "standard deviation of each channel, images scaled to 0…1")
    augment: bool = key(True, "augment the training images, seeded by (seed, epoch, sample)")
    workers: int | None = key(None, "DataLoader processes a rank (null: none for data in memory)", minimum=0, free=True)
    size: int = key(1024, "synthetic: number of training images", minimum=1)
    download: bool = key(False, "cifar10: fetch it into data.root if it is not there", free=True)
    check_files: int = key(
        10_000, "imagefolder: files whose first and last bytes are looked at before a run", minimum=0, free=True
    )


@dataclass
class OptimConfig:
    name: str = key("sgd", "optimizer", ("sgd", "adamw"))
    lr: float = key(0.02, "peak learning rate", minimum=0)
    momentum: float = key(0.9, "sgd: momentum", minimum=0)
    weight_decay: float = key(5e-4, "weight decay", minimum=0)
    schedule: str = key("cosine", "learning rate after the warm-up", ("constant", "cosine"))
    warmup_steps: int = key(15, "steps in which the learning rate rises from 0 to optim.lr", minimum=0)


@dataclass
class CheckpointConfig:
    every: int | None = key(None, "steps between two checkpoints (null: by the clock)", minimum=1, free=True)
    minutes: float = key(10, "minutes between two checkpoints where `every` is null (0: none)", minimum=0, free=True)
    keep: int = key(2, "newest checkpoints kept", minimum=1, free=True)
    best: bool = key(False, "also keep the best one by `metric`, and export best.pt", free=True)
    asynchronous: bool = key(True, "training waits for the copy, not for the disk", free=True)


@dataclass
class FsdpConfig:
    replicas: int = key(
        1, "copies of the model, each sharded over its part of the ranks", minimum=1, only=SHARDED, free=True
    )
    reshard_after_forward: bool = key(
        True,
        "free each block's whole weights after its forward, gather them again for backward",
        only=SHARDED,
        free=True,
    )
    offload: bool = key(False, "keep shards and optimizer in host memory, and update there", only=SHARDED, free=True)
    reduce: str = key("fp32", "precision=bf16: what gradients are averaged in", ("fp32", "bf16"), only=SHARDED)
    sync: str = key(
        "last",
        "accumulate=N: average gradients after the last micro-batch, or after every one, which needs less memory",
        ("last", "every"),
        only=SHARDED,
    )


@dataclass
class LoggerConfig:
    csv: bool = key(False, "metrics.csv, for spreadsheets (logger=csv)", free=True)
    tensorboard: bool = key(False, "event files for TensorBoard (logger=tensorboard)", free=True)
    wandb: bool = key(False, "Weights & Biases, offline unless you are logged in (logger=wandb)", free=True)
    project: str = key("lockstep", "wandb: the project that the run belongs to", free=True)
    histograms: int = key(
        0, "histograms of weights and gradients, at every so many logged steps (0: none)", minimum=0, free=True
    )
    images: int = key(8, "misclassified images shown at the end, at most 64", minimum=0, free=True)


@dataclass
class GradientsConfig:
    log: bool = key(
        False, "at logged steps, each layer's gradient norm, and how far the update moved its weights", free=True
    )
    warn_above: float | None = key(None, "name a layer whose gradient norm is above this", free=True)
    clip_norm: float | None = key(None, "scale all gradients down together where their global norm is above this")
    clip_value: Any = key(
        None, "clamp each number in the gradients of the parameters whose names fit, such as {fc.*: 0.1}"
    )
    stop_on_nan: bool = key(
        False, "end the run where a layer's output or gradient is not finite, and name layer, step and rank", free=True
    )


@dataclass
class TuneConfig:
    recipe: str = key("ddp", "recipe whose settings are searched", only=TUNE)
    space: dict[str, Any] = key(
        {}, "config key: where its values come from, such as {optim: {lr: 'loguniform(1e-4, 1e-1)'}}", only=TUNE
    )
    trials: int = key(8, "settings that are tried", minimum=1, only=TUNE)
    concurrent: int | None = key(
        None, "trials at once (null: as many as there are cores or GPUs for)", minimum=1, only=TUNE, free=True
    )
    nproc: int | None = key(
        None, "ranks of a trial (null: as many as the recipe alone would have)", minimum=1, only=TUNE
    )
    search: str = key("random", "what draws the settings", ("random", "optuna"), only=TUNE)
    scheduler: str = key("asha", "asha: stop early those trials that are behind", ("asha", "none"), only=TUNE)
    grace: int = key(1, "asha: evaluations that every trial gets", minimum=1, only=TUNE)
    reduction: int = key(2, "asha: of so many trials at a rung, one goes on", minimum=2, only=TUNE)
    address: str | None = key(
        None, "an existing Ray cluster: auto, or HOST:PORT (null: this machine)", only=TUNE, free=True
    )


@dataclass
class ClusterConfig:
    launcher: str = key("launchers.slurm", "module that starts the ranks")
    nodes: int = key(1, "nodes", minimum=1)
    gpus_per_node: int = key(0, "GPUs on each node", minimum=0)
    tasks_per_node: int | None = key(None, "ranks on each node (null: one a GPU, 1 without GPUs)", minimum=1)
    cpus_per_task: int | None = key(None, "CPUs for each rank (null: the cluster's default)", minimum=1)
    mem_gb: float | None = key(None, "memory on each node in GB (null: the cluster's default)", minimum=0)
    partition: str | None = key(None, "partition to submit to")
    account: str | None = key(None, "account to charge")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that the nodes must have")
    exclude: str | None = key(None, "nodes to avoid")
    time_minutes: int = key(60, "time limit in minutes", minimum=1)
    signal_seconds: int = key(
        120, "seconds before the time limit at which the run saves and is requeued (at most a third of it)", minimum=1
    )
    max_requeues: int = key(20, "times that the job comes back after preemptions, time limits, lost nodes", minimum=0)
    mail_user: str | None = key(None, "address for Slurm's mails")
    mail_type: str | None = key(None, "what it writes about, such as END,FAIL,REQUEUE")
    setup: list[str] = key((), "shell lines before the ranks start, such as [module load cuda]")
    container: str | None = key(None, "command in front of each rank, such as apptainer exec --nv image.sif")
    python: str | None = key(None, "the ranks' interpreter (null: this one; in a container: python)")
    ranks: str = key("launchers.slurm", "module that makes a rank of each of srun's tasks")
    sbatch: dict[str, Any] = key({}, "further options of sbatch, such as {reservation: course}")
    srun: list[str] = key((), "further options of the srun that starts the ranks")
    follow: bool = key(True, "follow the job's log until it ends; false: return at once")


@dataclass
class ZeroConfig:
    stage: int = key(
        2,
        "what each rank keeps only its part of: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too",
        (0, 1, 2, 3),
        only=("deepspeed_zero",),
    )
    offload: bool = key(False, "keep the optimizer's part in host memory, and update there", only=("deepspeed_zero",))


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    cluster: ClusterConfig | None = None
    global_batch_size: Any = key(
        96,
        "global batch: images the optimizer sees in one step, over all ranks; auto: the largest that fits",
        minimum=1,
    )
    memory_fraction: float = key(
        0.9, "global_batch_size=auto: share of the free memory that the ranks may take", minimum=0, free=True
    )
    epochs: int = key(15, "passes over the training set", minimum=1)
    max_steps: int | None = key(None, "end after this many steps, if epochs does not end first", minimum=1, free=True)
    metric: str = key(
        "eval_accuracy", "what is best, and what `patience` watches", ("eval_accuracy", "eval_loss", "eval_f1")
    )
    patience: int | None = key(None, "end after so many evaluations without a better `metric` (null: never)", minimum=1)
    accumulate: int = key(1, "micro-batches a step", minimum=1)
    comm: str = key(
        "fp32",
        "what gradients travel between ranks in; bf16, fp16: half the bytes",
        ("fp32", "bf16", "fp16"),
        only=("ddp",),
    )
    accumulate_by: str = key("chunk", "how the micro-batches are cut", ("chunk", "unbind"), only=("grad_accumulation",))
    replicas: int | None = key(
        None, "copies of the model (null: one a GPU; 2 on CPU)", minimum=1, only=("data_parallel",)
    )
    cut: Any = key(
        "layer3", "first layer of each further part: a name, a list, or balanced (by measured cost)", only=SPLIT
    )
    micro_batches: int = key(1, "micro-batches that a global batch is piped through in", minimum=1, only=SPLIT)
    devices: list[str] | None = key(
        None, "devices of the parts (null: the GPUs, or cpu twice)", only=("model_parallel",)
    )
    stages: int = key(1, "ranks that a model is cut over", minimum=1, only=("pipeline_parallel",))
    schedule: str = key(
        "1f1b",
        "order of the micro-batches' forwards and backwards",
        ("gpipe", "1f1b", "interleaved", "zero_bubble"),
        only=("pipeline_parallel",),
    )
    sync_batchnorm: bool = key(False, "BatchNorm over the global batch", only=LIGHTNING)
    weights: str | None = key(
        None,
        "torchvision's backbone, downloaded once (imagenet: its best); random: none (resume=PATH names one of yours)",
        ("imagenet", "IMAGENET1K_V1", "IMAGENET1K_V2", "random"),
        only=TRANSFER,
    )
    freeze: list[str] | None = key(
        None,
        "patterns of the parameters that are not trained, such as [layer1.*] (null: all but the head)",
        only=TRANSFER,
    )
    unfreeze_epoch: int | None = key(None, "epochs after which all is trained (null: never)", minimum=1, only=TRANSFER)
    unfreeze_lr: float | None = key(
        None, "peak learning rate of what was frozen (null: optim.lr / 10)", minimum=0, only=TRANSFER
    )
    demonstrate: bool = key(False, "2 images a rank, with and without, beside one process", only=("sync_batchnorm",))
    forget: str | None = key(
        None,
        "part of the state that the resumed half is not given",
        ("optimizer", "schedule", "scaler", "step", "random", "buckets"),
        only=("checkpoint_resume",),
    )
    recipes: list[str] | None = key(
        None, "recipes to run or look at (null: all; doctor: ddp)", only=("verify", "compare", "doctor")
    )
    rounds: int = key(3, "times that each recipe is run, in turn", minimum=1, only=("compare",))
    nprocs: list[int] | None = key(
        None, "ranks that each recipe is run on, typed as nproc=1,2,4 (null: one per GPU, else 2)", only=("compare",)
    )
    verify: bool = key(False, "also hold the recipes to recipes.single, with recipes.verify", only=("compare",))
    check: str = key(
        "preflight",
        "what recipes.doctor looks at: whether a run would work here, or where its memory goes",
        ("preflight", "memory"),
        only=("doctor",),
    )
    run: str | None = key(None, "a run's folder, which recipes.doctor reads instead", only=("doctor",), free=True)
    memory: str | None = key(
        None, "report: count what each layer holds during the first step, into memory.json", ("report",), free=True
    )
    seed: int = key(0, "seed of the weights, of the data order and of the augmentation", minimum=0)
    precision: str = key(
        "fp32",
        "arithmetic; bf16, fp16: by autocast, weights stay fp32; fp64: for proofs; auto: bf16 where the device is fast "
        "at it",
        ("fp32", "bf16", "fp16", "fp64", AUTO),
    )
    loss_scale: float = key(2.0**16, "precision=fp16: what the loss is multiplied by at first", minimum=1)
    tf32: bool = key(True, "cuda: allow TensorFloat-32 in fp32 matrix products and convolutions")
    compile: bool = key(False, "torch.compile the model")
    channels_last: Any = key(
        AUTO, "NHWC memory format for images and weights (auto: in 16-bit precision)", (AUTO, True, False)
    )
    allocator: str = key(
        AUTO,
        "cpu: keep freed memory for the next step, or give it back to the system (auto: keep)",
        (AUTO, "keep", "system"),
        free=True,
    )
    cudnn_benchmark: Any = key(
        AUTO, "cuda: time cuDNN's algorithms and take the fastest (auto: true)", (AUTO, True, False), free=True
    )
    profile: int = key(
        0, "steps after the warm-up that torch.profiler records, into profile.json and ranks/", minimum=0, free=True
    )
    detect_anomaly: bool = key(False, "name the operation whose backward made a NaN (slow)", free=True)
    nproc: int | None = key(None, "ranks on this machine (null: one per GPU, else 2)", minimum=1, free=True)
    device: str = key("auto", "where the ranks compute", ("auto", "cpu", "cuda"), free=True)
    backend: str = key("auto", "collectives (auto: nccl on cuda, gloo on cpu)", ("auto", "gloo", "nccl"), free=True)
    threads: int | None = key(
        None, "CPU threads a rank (null: the cores divided among the host's ranks)", minimum=1, free=True
    )
    timeout_seconds: int = key(
        300, "longest wait for another rank, at the start and in a collective", minimum=1, free=True
    )
    max_restarts: int = key(0, "times that all ranks are started again after one has died", minimum=0, free=True)
    eval_every: int = key(1, "epochs between two evaluations (0: only at the end)", minimum=0)
    eval_batch_size: int = key(128, "images in one evaluation batch", minimum=1)
    log_every: int = key(10, "steps between two lines of metrics.jsonl", minimum=1, free=True)
    resume: str = key(
        "auto",
        "auto: continue what is in `out`; never; or a PATH: a run, a checkpoint, or a file of weights",
        free=True,
    )
    out: str | None = key(None, "run directory (null: outputs/<recipe>/<time>)", free=True)
    launcher: str = key("launchers.torchrun", "module that starts the ranks where there is no cluster", free=True)
    start: str = key(
        "auto",
        "ranks on this machine: spawn, an interpreter each, or fork, copies of this process (auto: on the CPU)",
        ("auto", "spawn", "fork"),
        free=True,
    )


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (dotted key, value, metadata) for every leaf of a config object."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{entry.name}.")
        elif entry.metadata:
            yield f"{prefix}{entry.name}", value, dict(entry.metadata)


def typed(name: str, value: Any) -> str:
    """A key and its value as a person would type them, but for the shell's own quotes."""
    return f"{name}={word(value)}"


def word(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/.][\w/.*-]*", value)
    special = isinstance(value, str) and value.lower() in ("true", "false", "null", "nan", "inf")
    return str(value) if plain and not special else json.dumps(value)


def check_values(config: Config) -> None:
    """Hold every key to its own choices and minimum; raise UserError naming the key, its value and what is allowed."""
    if config.global_batch_size != AUTO and type(config.global_batch_size) is not int:
        raise UserError(f"global_batch_size={config.global_batch_size}: allowed are whole numbers from 1 up, or {AUTO}")
    if not 0 < config.memory_fraction <= 1:
        raise UserError(f"memory_fraction={config.memory_fraction}: allowed are numbers above 0, up to 1")
    for name, value, rule in walk(config):
        if name == "global_batch_size" and value == AUTO:
            continue
        if rule["choices"] and value is not None and value not in rule["choices"]:
            allowed = (str(each).lower() if isinstance(each, bool) else str(each) for each in rule["choices"])
            raise UserError(f"{name}={value}: allowed are {', '.join(allowed)}")
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{name}={value}: allowed are finite numbers")
        if rule["minimum"] is not None and value is not None and value < rule["minimum"]:
            raise UserError(f"{name}={value}: allowed are numbers from {rule['minimum']} up")
    if config.seed >= 2**32:
        raise UserError(f"seed={config.seed}: allowed are numbers from 0 to 2**32 − 1")
    check_limits(config.gradients)
    if config.profile > 100:
        raise UserError(f"profile={config.profile}: allowed are 0…100, for all that they do is kept in memory")
    if config.logger.images > 64:
        raise UserError(f"logger.images={config.logger.images}: allowed are 0…64")
    if min(config.data.std, default=1) <= 0:
        raise UserError(f"data.std={config.data.std}: allowed are numbers above 0")


def check_limits(config: GradientsConfig) -> None:
    """Hold what gradients are measured against to numbers above 0; raises UserError."""
    values = config.clip_value
    if values is not None and not isinstance(values, dict):
        raise UserError(f"gradients.clip_value={values}: allowed are a pattern and a number, such as {{fc.*: 0.1}}")
    limits = {"warn_above": config.warn_above, "clip_norm": config.clip_norm}
    limits |= {f"clip_value.{name}": value for name, value in (values or {}).items()}
    for name, limit in limits.items():
        if limit is not None and not (type(limit) in (int, float) and limit > 0 and math.isfinite(limit)):
            raise UserError(f"gradients.{name}={limit}: allowed are finite numbers above 0")


def to_yaml(config: Config) -> str:
    """The frozen form of a config: plain YAML, nothing left to resolve."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """Read `to_yaml`'s text back through the schema.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key or a type that the schema does not know.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """A copy of a config with some dotted keys set."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        *path, last = key.split(".")
        node: Any = config
        for name in path:
            node = getattr(node, name)
        assert hasattr(node, last), f"no key {key}"
        setattr(node, last, value)
    return config
