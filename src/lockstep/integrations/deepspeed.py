"""DeepSpeed among lockstep's ranks: on their process group, quiet, and with its files inside lockstep's checkpoints.

Imported by the recipe that uses DeepSpeed, and nowhere else. What its files hold is lockstep.integrations.deepspeed_files'
matter.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler, torch_autocast
from deepspeed.utils import groups, logger, safe_get_full_grad, safe_set_full_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.config.schema import GradientsConfig
from lockstep.distributed.process_group import collective_timeout
from lockstep.integrations.deepspeed_files import (
    CheckpointBuffers,
    TensorsByName,
    load_checkpoint,
    load_first_file,
    section_places,
)
from lockstep.run import Run
from lockstep.training.clip import call_clip_pre_hooks, clip_gradients, limits
from lockstep.training.local_gradients import LocalGradients
from lockstep.training.precision import Scaler


@contextlib.contextmanager
def prepared(run: Run) -> Iterator[None]:
    """A context in which DeepSpeed can be initialised: with the variables of its own launcher, its output in the rank's log."""
    for handler in logger.handlers:  # it warns on stdout
        handler.setStream(run.report.log)
    # Its launcher would set it: the number of this rank's device.
    local = run.device.index if run.device.type == "cuda" else run.world.local_rank
    os.environ["LOCAL_RANK"] = str(local)
    # It would probe with a compiler which of its C++ operators can be built here, and build one for the CPU at once, an
    # all-reduce within a host, while the ranks wait: half a minute, and a toolchain that many machines lack. Told that
    # none can, it leaves the tensors to gloo and the update to torch's optimizer.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    vars(torch_autocast)["TORCH_AUTOCAST_INITIALIZED"] = False  # by an earlier run in this process
    if groups._WORLD_GROUP is not None and not is_registered(groups._WORLD_GROUP):  # an earlier run's, which has ended
        groups._release_process_group_references(group=None)
        vars(deepspeed.comm.comm)["cdb"] = None
    with contextlib.redirect_stdout(run.report.log):
        # When it looks whether an optimizer is Muon, it has that one's functions compiled: 3 s in each rank.
        compiled, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            compiler.compile = compiled
        yield


def is_registered(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows a process group."""
    try:
        return dist.get_global_rank(group, 0) >= 0
    except (ValueError, RuntimeError):
        return False


# The engine ---------------------------------------------------------------------------------------------------------


class ZeroEngine:
    """DeepSpeed's state as an Engine of lockstep's checkpoints (lockstep.checkpoint.state).

    On as many ranks as saved it, DeepSpeed itself restores it. On others, or in another stage, it is assembled from
    the files and cut anew: DeepSpeed's own converter for this case, ds_to_universal, knows Adam's states alone.
    """

    name = "deepspeed"

    def __init__(self, run: Run, engine: Any, scaler: Scaler) -> None:
        # Its collectives have a group of their own, in which a rank would wait half an hour for one that hangs.
        if run.world.backend != "fake":  # a plan's: it waits for nobody, and in torch 2.11 it refuses to be told
            engine.data_parallel_group.set_timeout(collective_timeout(run.config.timeout_seconds, run.world.backend))
        self.engine, self.module, self.optimizer = engine, engine.module, engine.basic_optimizer
        self.stage = engine.zero_optimization_stage()
        self.names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        engine.checkpoint_engine = self.memory = CheckpointBuffers()
        engine._copy_recovery_script = lambda _: None  # a script it would write past the checkpoint engine
        # In the order of the optimizer's groups, by which stage 0 numbers its state.
        groups = self.optimizer.param_groups if self.stage == 0 else []
        self._trained = [self.names[id(parameter)] for group in groups for parameter in group["params"]]
        self.scaler, self.gradient_bytes = scaler, 0
        self.before_update(self._measure)
        if scaler.is_enabled():
            self._replace_scaler()

    def files(self) -> dict[str, memoryview]:
        self.engine.save_checkpoint("checkpoints", self.name, {"trained": self._trained}, save_latest=False)
        kept, self.memory.kept = self.memory.kept, {}
        return kept

    def restore(self, folder: Path, same_ranks: bool) -> None:
        # Its optimizer's settings come from the config, as they do everywhere else, and not from the checkpoint.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        first = load_first_file(folder)
        if same_ranks and first["ds_config"] == self.engine.config:
            self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        else:
            weights, moments = load_checkpoint(folder)
            self.load(weights)
            self._load_moments(moments)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def load(self, weights: TensorsByName) -> None:
        if self.stage == 0:
            self.module.load_state_dict(weights)
            return
        with torch.no_grad():
            for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
                with gathered(tensor, writes=True):
                    if tensor.shape == weights[name].shape:
                        tensor.copy_(weights[name])
        self.engine.optimizer.refresh_fp32_params()

    def weights(self, folder: Path) -> TensorsByName:
        return load_checkpoint(folder)[0]

    def parts(self, module: nn.Module, optimizer: Optimizer) -> LocalGradients:
        return ZeroGradients(self) if self.stage else LocalGradients(module, optimizer)

    def clip_gradients(self, config: GradientsConfig) -> None:
        """What `clip_gradients` does in every recipe; to be called between the last backward and `engine.step`.

        From stage 1 on it clips by value alone: by norm DeepSpeed does it (`gradient_clipping`), in its own step.
        """
        if self.stage == 0:
            clip_gradients(self.module, self.optimizer, self.scaler, config)
            return
        call_clip_pre_hooks(self.module)
        found = limits(config, list(self.names.values())) if config.clip_value else {}
        for name, parameter in self.module.named_parameters() if found else ():
            gradient = safe_get_full_grad(parameter) if name in found else None
            if gradient is not None:
                limit = found[name] * self.scale
                # An overflow stays one, for the step to be left out.
                safe_set_full_grad(parameter, gradient.clamp(-limit, limit).where(gradient.isfinite(), gradient))

    def before_update(self, call: Callable[[], None]) -> None:
        """Have something called on all ranks in each step, between the last backward and the update."""
        outer = self.engine.optimizer
        if isinstance(outer, Optimizer):  # stage 0: the one that was handed in
            outer.register_step_pre_hook(lambda *_: call())
        else:
            self._around_update(call, lambda: None)

    def after_update(self, call: Callable[[], None]) -> None:
        """Have something called on all ranks in each step, when stage 1 to 3 has updated the weights."""
        self._around_update(lambda: None, call)

    def _around_update(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        outer = self.engine.optimizer
        update = outer.step

        def step(*args: Any, **options: Any) -> Any:
            before()
            result = update(*args, **options)
            after()
            return result

        outer.step = step

    def held_bytes(self) -> dict[str, int]:
        """What this rank holds: its weights, the gradients before the first update, what the update needs besides.

        Buffers in which gradients or weights travel are not counted.
        """
        parameters = list(self.module.parameters())
        weights = storage_bytes([*(p.data for p in parameters), *(getattr(p, "ds_tensor", None) for p in parameters)])
        masters = self._masters()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        others = {
            address: size for address, size in storage_bytes([*masters, *states]).items() if address not in weights
        }
        return {
            "weights": sum(weights.values()),
            "gradients": self.gradient_bytes,
            "optimizer": sum(others.values()),
        }

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """The tensors that this rank has before an update, by what they are for."""
        zero, parameters = self.engine.optimizer, list(self.module.parameters())
        buckets = getattr(zero, "ipg_buckets", {}).values()
        averaged = getattr(zero, "averaged_gradients", {}).values()
        named: dict[str, list[Any]] = {
            "parameters": [*(p.data for p in parameters), *(getattr(p, "ds_tensor", None) for p in parameters)],
            "gradients": [*(p.grad for p in parameters), *(part for group in averaged for part in group or [])],
            "optimizer": self._masters(),
            "communication": [part for bucket in buckets for part in as_list(getattr(bucket, "buffer", None))],
        }
        return {part: [each for each in given if isinstance(each, Tensor)] for part, given in named.items()}

    def offloaded_tensors(self) -> list[Tensor]:
        """What offload=true keeps in the host's memory now, but for the optimizer's states."""
        zero, masters = self.engine.optimizer, self._masters()
        buffers = [
            *getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []),
            *getattr(zero, "accumulated_grads_in_cpu", {}).values(),
            getattr(zero, "temp_grad_buffer_for_cpu_offload", None),
            getattr(zero, "grad_partitions_flat_buffer", None),
        ]
        found = [*masters, *(each.grad for each in masters), *buffers]
        return [each for each in found if isinstance(each, Tensor)]

    @property
    def copies_hide(self) -> bool:
        """Whether gradients are copied to the host beside backward."""
        return bool(self.engine.zero_overlap_comm())

    def _masters(self) -> list[Tensor]:
        """The fp32 weights that the update is made in."""
        zero = self.engine.optimizer
        if self.stage == 0:
            return []
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def unsharded_bytes(self) -> int:
        """What a rank of DDP's holds: weights, gradients, and as much again for each moment of the optimizer's."""
        moments = {key for state in self.optimizer.state.values() for key, value in state.items() if value.dim()}
        numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.module.parameters())
        return 4 * numel * (2 + len(moments))

    def _measure(self) -> None:
        if not self.gradient_bytes:
            gradients = [parameter.grad for parameter in self.module.parameters()]
            averaged = getattr(self.engine.optimizer, "averaged_gradients", {})  # stage 1 to 3
            parts = [part for group in averaged.values() for part in group or []]
            self.gradient_bytes = sum(storage_bytes([*gradients, *parts]).values())

    @property
    def scale(self) -> float:
        """What gradients are multiplied by before the update: from stage 1 on they are unscaled within it."""
        return self.scaler.get_scale() if self.stage else 1.0

    def _replace_scaler(self) -> None:
        """Put our scaler in the place of DeepSpeed's, which no checkpoint holds.

        From stage 1 on DeepSpeed looks at the gradients' norm before it comes to the scaler. Where that is not finite
        it leaves the step out by itself, on all ranks, and would never tell the scaler, which would never be halved. It
        clips before, too, so its limit has to grow with what is scaled.
        """
        if self.stage == 0:
            self.engine.torch_autocast_z0_gradscaler = self.scaler
            return
        outer = self.engine.optimizer
        outer.torch_autocast_gradscaler = self.scaler
        limit = outer.clip_grad

        def before() -> None:
            outer.clip_grad = limit * self.scale

        def after() -> None:
            if outer.overflow:
                self.scaler.leave_out()

        self._around_update(before, after)

    def _load_moments(self, moments: dict[str, TensorsByName]) -> None:
        if self.stage == 0:
            packed = self.optimizer.state_dict()
            packed["state"] = {number: moments[name] for number, name in enumerate(self._trained) if moments}
            self.optimizer.load_state_dict(packed)
            return
        for flat, name, at, start, size in self._held():
            for key, value in moments.get(name, {}).items():
                if not value.dim():
                    self.optimizer.state[flat][key] = value.clone()
                    continue
                mine = self.optimizer.state[flat].setdefault(key, torch.zeros_like(flat, requires_grad=False))
                mine[at : at + size] = value.flatten()[start : start + size]

    def _held(self) -> Iterator[tuple[Tensor, str, int, int, int]]:
        """What this rank's optimizer holds: (vector, parameter, place in the vector, place in the parameter, size)."""
        zero = self.engine.optimizer
        if self.stage == 3:
            rank, ranks = dist.get_rank(), dist.get_world_size()
            for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
                shapes = {self.names[id(parameter)]: parameter.ds_shape for parameter in group}
                for name, (at, size) in section_places(shapes, ranks).items():
                    yield flat, name, at, rank * size, max(0, min(size, shapes[name].numel() - rank * size))
            return
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else all of it is another rank's
                    at, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                    yield flat, self.names[id(parameter)], at.start, start, at.numel


class ZeroGradients(LocalGradients):
    """What a rank holds of gradients and weights in stage 1 to 3.

    The sections of gradients are no parameters' own, so each one is put together on every rank, one after the other.
    """

    def __init__(self, zero: ZeroEngine) -> None:
        super().__init__(zero.module, zero.optimizer, owns=dist.get_rank() == 0, differ=True)
        self._zero = zero

    def before_update(self, call: Callable[[], None]) -> None:
        self._zero.before_update(call)

    def after_update(self, call: Callable[[], None]) -> None:
        self._zero.after_update(call)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        found: Tensor | None = safe_get_full_grad(parameter)
        return found if found is None or self._zero.scale == 1 else found / self._zero.scale

    def full_gradient(self, parameter: nn.Parameter, device: torch.device) -> Tensor | None:
        return self.gradient(parameter)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        section = getattr(parameter, "ds_tensor", None)
        if section is None:
            return parameter.detach()
        size = section.numel()  # the last ranks' are padded
        return section.flatten()[: max(0, min(size, vars(parameter)["ds_numel"] - dist.get_rank() * size))].detach()

    def counts(self, parameter: nn.Parameter, gradient: bool) -> bool:
        return self._owns or (not gradient and hasattr(parameter, "ds_tensor"))


# Stage 3 ----------------------------------------------------------------------------------------------------------


def gathered(tensor: Tensor, writes: bool = False) -> Any:
    """A context in which a partitioned parameter is there in full, on every rank; others are anyway.

    Args:
        writes: what rank 0 writes into it is what remains.
    """
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if writes else None)


def as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def storage_bytes(tensors: list[Any]) -> dict[int, int]:
    """{address: bytes} of the memory behind tensors, each block once however many tensors look into it."""
    blocks = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {block.data_ptr(): block.nbytes() for block in blocks if block.nbytes()}


def gather_module(module: nn.Module, into: nn.Module) -> nn.Module:
    """Copy a partitioned module into a plain one on the meta device, a parameter at a time. All ranks call it."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    some = next(module.parameters())
    into.to(some.dtype).to_empty(device=some.device)
    with torch.no_grad():
        for name, tensor in into.state_dict().items():
            with gathered(tensors[name]):
                tensor.copy_(tensors[name])
    return into
