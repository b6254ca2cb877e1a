"""Every key a user can set, with its type, its default and what it does.

Hydra composes `conf/` against these dataclasses: a misspelt key or a wrong type fails by name before anything starts.
A rank reads the frozen `config.yaml` back through the same classes. `import lockstep` imports this, so OmegaConf is
imported only where it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from lockstep.config.cluster_keys import ClusterConfig as ClusterConfig
from lockstep.config.keys import AUTO, key

ConfigT = TypeVar("ConfigT", bound="Config")

MOST_CLASSES = 10_000_000  # more than any data set's; of a ResNet-18 the last layer alone then takes 20 GB
MOST_PIXELS = 16384
MOST_RANKS = 4096  # on one machine
MOST_THREADS = 4096  # more than any machine's cores; OpenMP would fail to start them only in the first step
LAST = "last"  # of `resume`
NO_SOURCE = ("auto", LAST, "never")  # the words that `resume` may be; anything else is a path
LONGEST_WAIT = 31_536_000  # a year in seconds; what waits counts in nanoseconds, and would overflow


NARROW = "narrow_resnet18"  # with a quarter of the channels, for proofs
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", NARROW)


@dataclass
class TaskConfig:
    """What is trained. The fields of a task of one's own become further keys (lockstep.config.tasks)."""

    name: str = key("images", "model, data and loss: images, language, FILE.py:Class or package.module:Class")


@dataclass
class ModelConfig:
    name: str = key("resnet18", f"architecture: {', '.join(RESNETS)}, or any other classification model of torchvision")
    num_classes: int | None = key(
        None, "outputs of the last layer (null: the data set's classes)", minimum=1, maximum=MOST_CLASSES
    )
    image_size: int | None = key(
        None, "side of the square input in pixels (null: the data set's)", minimum=8, maximum=MOST_PIXELS
    )
    norm: str = key(
        "own", "normalisation layer; own: what the model has, of ResNets BatchNorm", ("batch", "group", "own")
    )
    init: str = key(
        "own",
        "weight initialisation; own: torchvision's, but of ResNets kaiming; zero_residual: the same, and each block begins "
        "as the identity",
        ("kaiming", "zero_residual", "xavier", "own"),
    )
    arguments: dict[str, Any] = key(
        {}, "further arguments of torchvision's class, such as {dropout: 0.1}; not of ResNets", open=True
    )


@dataclass
class DataConfig:
    name: str = key("digits", "data set", ("digits", "synthetic", "cifar10", "imagefolder"))
    root: str | None = key(None, "folder that holds the data (cifar10, imagefolder)", free=True)
    num_classes: int | None = key(None, "classes (null: counted)", minimum=1, maximum=MOST_CLASSES)
    classes: list[str] | None = key(
        None, "take these alone, relabelled 0, 1, … (0…9, or an imagefolder's folders; null: all)"
    )
    image_size: int = key(
        8,
        "side of the square images in pixels, before model.image_size resizes them",
        minimum=1,
        maximum=MOST_PIXELS,
    )
    mean: list[float] = key((0.5, 0.5, 0.5), "mean of each channel, images scaled to 0…1")
    std: list[float] = key((0.5, 0.5, 0.5), "standard deviation of each channel, images scaled to 0…1", minimum=1e-6)
    augment: bool = key(True, "augment the training images, seeded by (seed, epoch, sample)")
    workers: int | None = key(
        None, "DataLoader processes per rank (null: none for data in memory)", minimum=0, maximum=1024, free=True
    )
    size: int = key(1024, "synthetic: number of training images", minimum=1)
    download: bool = key(False, "cifar10: fetch it into data.root if it is not there", free=True)
    check_files: int = key(
        10_000, "imagefolder: files whose first and last bytes are looked at before a run", minimum=0, free=True
    )


OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "adam": "Adam", "lion": "Lion", "muon": "Muon"}  # of torch.optim


@dataclass
class OptimConfig:
    name: str = key("sgd", f"optimizer: {', '.join(OPTIMIZERS)}, or a class such as torch.optim.RMSprop")
    lr: float = key(0.02, "peak learning rate", minimum=0)
    momentum: float = key(0.9, "sgd: momentum", minimum=0)
    nesterov: bool = key(False, "sgd: Nesterov's momentum")
    weight_decay: float = key(5e-4, "weight decay", minimum=0)
    decay_norms_and_biases: bool = key(True, "weight decay for norms and biases too (parameters of one dim)")
    arguments: dict[str, Any] = key(
        {}, "further arguments of the optimizer's class, such as {betas: [0.9, 0.95]}", open=True
    )
    schedule: str = key("cosine", "learning rate after the warm-up", ("constant", "cosine"))
    warmup_steps: int = key(15, "steps in which the learning rate rises from 0 to optim.lr", minimum=0)


@dataclass
class CheckpointConfig:
    every: int | None = key(None, "steps between two checkpoints (null: by the clock)", minimum=1, free=True)
    minutes: Any = key(
        AUTO,
        "minutes between two checkpoints where `every` is null (auto: 1, more where a save is slow; 0: none)",
        minimum=0,
        free=True,
    )
    keep: int = key(2, "newest checkpoints kept", minimum=1, free=True)
    best: bool = key(False, "also keep the best one by `metric`, and export best.pt", free=True)
    asynchronous: bool = key(True, "training waits for the copy, not for the disk", free=True)


@dataclass
class LoggerConfig:
    csv: bool = key(False, "metrics.csv, for spreadsheets (logger=csv)", free=True)
    tensorboard: bool = key(False, "event files for TensorBoard (logger=tensorboard)", free=True)
    wandb: bool = key(False, "Weights & Biases, offline unless you are logged in (logger=wandb)", free=True)
    mllog: bool = key(False, "MLPerf's log of the run, mllog.txt (logger=mllog)", free=True)
    mlperf: dict[str, Any] = key(
        {}, "mllog: further lines, such as {submission_benchmark: resnet}", open=True, free=True
    )
    project: str = key("lockstep", "wandb: the project that the run belongs to", free=True)
    histograms: int = key(
        0, "histograms of weights and gradients, at every so many logged steps (0: none)", minimum=0, free=True
    )
    images: int = key(8, "misclassified images shown at the end, at most 64", minimum=0, maximum=64, free=True)


@dataclass
class GradientsConfig:
    log: bool = key(
        False, "at logged steps, each layer's gradient norm, and how far the update moved its weights", free=True
    )
    warn_above: float | None = key(None, "name a layer whose gradient norm is above this", free=True)
    clip_norm: float | None = key(None, "scale all gradients down together where their global norm is above this")
    clip_value: Any = key(
        None,
        "clamp each number in the gradients of the parameters whose names fit, such as {fc.*: 0.1}",
        open=True,
    )
    stop_on_nan: bool = key(
        False, "end the run where a layer's output or gradient is not finite, and name layer, step and rank", free=True
    )
    allow_nan: bool = key(
        False, "train on where weights have become NaN or infinite, instead of ending; they are never saved", free=True
    )


@dataclass
class Config:
    """What every recipe can be told. A recipe's own keys stand in a subclass, in the recipe's own file.

    Attributes:
        flat_weights: the weights are one long vector, which has no memory format of its own.
        model_parallel_key: the key that says how many ranks hold one copy of the model between them, or keys joined by
            " × ", whose product says it; "": each holds one.
        shares_activations: those ranks work on each layer together, and not one after the other.
        shares_sequences: ranks that work on a layer together have some positions each, and all weights.
        several_devices: a rank computes on more devices than its own.
        refuses: {another recipe's key: why it does not compose with this recipe, and what works instead}.
        task_defaults: {name: value} of keys of the task, where it has them and the command says nothing else.
    """

    flat_weights: ClassVar[bool] = False
    model_parallel_key: ClassVar[str] = ""
    shares_activations: ClassVar[bool] = False
    shares_sequences: ClassVar[bool] = False
    several_devices: ClassVar[bool] = False
    refuses: ClassVar[dict[str, str]] = {}
    task_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model between them and see the same samples, as the stages of a pipeline."""
        return math.prod(getattr(self, key) for key in self.model_parallel_key.split(" × ") if key)

    @property
    def pipeline_stages(self) -> int:
        """Of these ranks, those that have layers of their own, one after the other."""
        return 1

    @property
    def pipeline_micro_batches(self) -> int:
        """Micro-batches that a rank's share of the global batch is piped through a cut model in."""
        return 1

    @property
    def steps_between_exchanges(self) -> int:
        """Steps of which one has the ranks talk to each other."""
        return 1

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig | None = None
    global_batch_size: Any = key(
        96,
        "global batch: samples the optimizer sees in one step, over all ranks; auto: the largest that fits",
        minimum=1,
    )
    memory_fraction: float = key(
        0.9, "global_batch_size=auto: share of the free memory that the ranks may take", minimum=0, free=True
    )
    epochs: int = key(15, "passes over the training set", minimum=1)
    max_steps: int | None = key(None, "end after this many steps, if epochs does not end first", minimum=1, free=True)
    metric: str | None = key(
        None, "what is best, and what `patience` watches: eval_loss, eval_accuracy, … (null: what the task says)"
    )
    metric_mode: str = key(
        AUTO, "whether `metric` is better when larger (auto: what the task says)", (AUTO, "max", "min")
    )
    patience: int | None = key(None, "end after so many evaluations without a better `metric` (null: never)", minimum=1)
    accumulate: int = key(1, "micro-batches per step", minimum=1)
    checkpoint_activations: Any = key(
        "none",
        "what blocks compute again in backward, and do not keep: none, full, selective (all but the dear operations), "
        "or K: every K-th block in full",
        free=True,
    )
    memory: str | None = key(
        None, "report: count what each layer holds during the first step, into memory.json", ("report",), free=True
    )
    seed: int = key(0, "seed of the weights, of the data order and of the augmentation", minimum=0, maximum=2**32 - 1)
    precision: str = key(
        "fp32",
        "arithmetic; bf16, fp16: by autocast, weights stay fp32; fp64: for proofs; auto: bf16 where the device is fast "
        "at it",
        ("fp32", "bf16", "fp16", "fp64", AUTO),
    )
    loss_scale: float = key(2.0**16, "precision=fp16: what the loss is multiplied by at first", minimum=1)
    tf32: bool = key(True, "cuda: allow TensorFloat-32 in fp32 matrix products and convolutions")
    compile: bool = key(
        False, "torch.compile the model; of equal blocks, such as a GPT's, each block, which share a compilation"
    )
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
        0,
        "steps after the warm-up that torch.profiler records, into profile.json and ranks/",
        minimum=0,
        maximum=100,  # all that they do is kept in memory
        free=True,
    )
    record_tensors: int = key(
        0,
        "first steps of which every layer's tensors are recorded, into tensors/, to be compared (docs/diff.md)",
        minimum=0,
        maximum=100,  # each as large as all activations and three times the weights
        free=True,
    )
    detect_anomaly: bool = key(False, "name the operation whose backward made a NaN (slow)", free=True)
    nproc: int | None = key(
        None, "ranks on this machine (null: one per GPU, else 2)", minimum=1, maximum=MOST_RANKS, free=True
    )
    device: str = key("auto", "where the ranks compute", ("auto", "cpu", "cuda"), free=True)
    backend: str = key("auto", "collectives (auto: nccl on cuda, gloo on cpu)", ("auto", "gloo", "nccl"), free=True)
    threads: int | None = key(
        None,
        "CPU threads per rank (null: OMP_NUM_THREADS, else the host's cores divided)",
        minimum=1,
        maximum=MOST_THREADS,
        free=True,
    )
    timeout_seconds: int = key(
        300, "longest wait for another rank, or for a worker", minimum=1, maximum=LONGEST_WAIT, free=True
    )
    max_restarts: int = key(0, "times that all ranks are started again after one has died", minimum=0, free=True)
    sample_order: str = key(
        AUTO,
        "order of an epoch's samples: stored (8 bytes each, on every rank) or computed (auto: above 2^27 samples)",
        (AUTO, "stored", "computed"),
    )
    eval_every: int = key(1, "epochs between two evaluations (0: only at the end)", minimum=0)
    eval_batch_size: int = key(128, "samples in one evaluation batch", minimum=1)
    log_every: int = key(10, "steps between two lines of metrics.jsonl", minimum=1, free=True)
    resume: str = key(
        "auto",
        "auto: continue what is in `out`; last: the newest unfinished run of these settings; never; or a PATH: a run, a "
        "checkpoint, or a file of weights",
        free=True,
    )
    logs: str = key(
        AUTO,
        "ranks whose logs are kept in ranks/: all, or first: each host's first and those that fail (auto: all of up to "
        "64 ranks)",
        (AUTO, "all", "first"),
        free=True,
    )
    resume_prefix: str | None = key(
        None, "what stands before the model's names in resume=FILE, such as model_ema. (null: found out)", free=True
    )
    out: str | None = key(None, "run directory (null: outputs/<recipe>/<time>)", free=True)
    launcher: str = key("torchrun", "what starts the ranks where there is no cluster, or a module of yours", free=True)
    start: str = key(
        "auto",
        "ranks on this machine: spawn, an interpreter each, or fork, copies of this process (auto: on the CPU)",
        ("auto", "spawn", "fork"),
        free=True,
    )


@dataclass
class ToolConfig(Config):
    """Of a tool that starts trainings: it may have the keys of a recipe that cuts its model, and cuts none itself."""

    model_parallel_key: ClassVar[str] = ""
    shares_activations: ClassVar[bool] = False

    @property
    def pipeline_stages(self) -> int:
        return 1

    @property
    def pipeline_micro_batches(self) -> int:
        return 1


def to_yaml(config: Config) -> str:
    """The frozen form of a config: plain YAML, nothing left to resolve."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str, schema: type[ConfigT]) -> ConfigT:
    """Read `to_yaml`'s text back through the schema of the recipe that it belongs to.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key or a type that the schema does not know.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(text))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def shared_part(text: str) -> Config:
    """What every recipe has of a frozen config, whichever recipe's it is; its own keys are left out.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a type that the schema does not know.
    """
    from omegaconf import DictConfig, OmegaConf

    content = OmegaConf.create(text)
    assert isinstance(content, DictConfig)
    if isinstance(content.get("task"), DictConfig):  # its other keys are the task's own
        content.task = {"name": content.task.name}
    known = {entry.name for entry in fields(Config)}
    merged = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.masked_copy(content, [str(name) for name in content if name in known])
    )
    return OmegaConf.to_object(merged)  # type: ignore[return-value]
