"""Groups that call themselves nccl: gloo carries what NCCL would, and what NCCL refuses is refused."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn.parallel import comm
from torch.utils._pytree import tree_flatten, tree_map

from .memory import current_gpu, host_view, on_gpu

NCCL: set[str] = set()  # names of the groups
# As long as a collective may still be under way, so is its memory.
UNDER_WAY: list[tuple[Any, list[Tensor]]] = []
# gloo knows nothing of a GPU's memory in these: it would hand a device's pointer to a socket.
NOT_OF_GLOO = ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")


def carrier(args: Any) -> str | None:
    """The name of the group that an operation of c10d is given."""
    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                return str(torch._C._distributed_c10d.ProcessGroup.unbox(each).group_name)
            except (RuntimeError, TypeError):
                continue
    return None


def collective(func: Any, name: str, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
    """Carry it, by NCCL's rules where the group is NCCL's.

    Raises:
        RuntimeError: NCCL could not: tensors of the host, or of another GPU than this rank's; gloo could not: GPU to GPU.
        ValueError: NCCL could not: a tensor with gaps.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    is_nccl = carrier(args) in NCCL
    gpus = [x for x in tensors if x.is_cuda]
    if is_nccl and len(gpus) < len(tensors) and name not in ("c10d::barrier", "c10d::monitored_barrier_"):
        raise RuntimeError(f"No backend type associated with device type cpu ({name} in an NCCL group)")
    if not gpus:
        return func(*args, **kwargs)
    if is_nccl and any(x.device != current_gpu() for x in gpus):
        places = ", ".join(str(x.device) for x in gpus)
        raise RuntimeError(f"NCCL error: {name} of tensors on {places} by a rank whose device is {current_gpu()}")
    if is_nccl and not all(x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) for x in gpus):
        raise ValueError(f"Tensors must be contiguous ({name})")
    if not is_nccl and name in NOT_OF_GLOO:
        raise RuntimeError(f"gloo: writev: Bad address ({name} of a GPU's memory)")
    mine, named = tree_map(flat_host_view, args), tree_map(flat_host_view, kwargs)
    result = func(*mine, **named)
    given = {id(view): x for x, view in zip(leaves, tree_flatten((mine, named))[0], strict=True) if on_gpu(x)}
    UNDER_WAY[:] = [each for each in UNDER_WAY if not each[0].is_completed()]
    works = [x for x in tree_flatten(result)[0] if isinstance(x, torch.ScriptObject)]
    UNDER_WAY.extend((torch._C._distributed_c10d.Work.unbox(work), tensors) for work in works)
    return tree_map(lambda y: given.get(id(y), y) if isinstance(y, Tensor) else y, result)


def flat_host_view(x: Any) -> Any:
    """Of channels_last tensors, too, which NCCL takes and gloo does not: their memory as it lies."""
    if on_gpu(x) and not x.is_contiguous():
        return host_view(x).as_strided((x.numel(),), (1,), x.storage_offset())
    return host_view(x)


def recorded(c10d: Any) -> dict[str, Any]:
    """torch's flight recorder as it is with NCCL: its groups' collectives are not among gloo's.

    One function with a backend or, in earlier versions of torch, one for each.
    """
    dump = c10d._dump_fr_trace_json

    def of_groups(nccl: bool | None, *args: Any, **kwargs: Any) -> bytes:
        found = json.loads(dump(*args, **kwargs))
        entries = found.get("entries", [])
        found["entries"] = [entry for entry in entries if (entry["process_group"][0] in NCCL) == nccl]
        return json.dumps(found).encode()

    def of_backend(*args: Any, backend: str = "gloo", **kwargs: Any) -> bytes:
        return of_groups({"gloo": False, "nccl2": True}.get(backend), *args, backend="gloo", **kwargs)

    if "backend" in str(dump.__doc__):  # its signature
        return {"_dump_fr_trace_json": of_backend}
    return {"_dump_fr_trace_json": partial(of_groups, False), "_dump_nccl_trace_json": partial(of_groups, True)}


def install() -> None:
    c10d: Any = torch._C._distributed_c10d
    for name, dump in recorded(c10d).items():
        setattr(c10d, name, dump)
    init, new, told = dist.init_process_group, dist.new_group, dist.get_backend

    def is_nccl(group: Any) -> bool:
        return (group or distributed_c10d._get_default_group()).group_name in NCCL

    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init("gloo" if backend == "nccl" else backend, *args, **kwargs)
        if backend == "nccl":
            refuse_two_on_one_gpu()
            NCCL.add(distributed_c10d._get_default_group().group_name)

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kind = backend or ("nccl" if is_nccl(None) else "gloo")
        group = new(ranks, timeout, "gloo" if kind == "nccl" else backend, **kwargs)
        if kind == "nccl" and isinstance(group, dist.ProcessGroup):
            NCCL.add(group.group_name)
        return group

    def get_backend(group: Any = None) -> str:
        return "nccl" if is_nccl(group) else told(group)

    import torch.distributed.device_mesh as device_mesh

    modules: list[Any] = [dist, distributed_c10d, device_mesh]
    for module in modules:
        module.init_process_group, module.new_group, module.get_backend = init_process_group, new_group, get_backend
    private: Any = distributed_c10d
    private._get_pg_default_device = lambda group=None: current_gpu() if is_nccl(group) else torch.device("cpu")
    private._get_object_coll_device = lambda group=None: "cuda" if is_nccl(group) else "cpu"
    # DataParallel's, which are C++ over NCCL.
    comm.broadcast_coalesced, comm.reduce_add_coalesced = broadcast_coalesced, reduce_add_coalesced
    torch._C._broadcast_coalesced = broadcast_coalesced


def refuse_two_on_one_gpu() -> None:
    """NCCL does so when it connects; the runtime's UUID tells GPUs apart whatever a rank calls them."""
    mine = [os.uname().nodename, str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len({tuple(each) for each in everyone}) < len(everyone):
        raise dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU detected")


def broadcast_coalesced(tensors: Any, devices: Any, buffer_size: int = 0) -> Any:
    gpus = [torch.device("cuda", each) if isinstance(each, int) else torch.device(each) for each in devices]
    return tuple([list(tensors) if not number else [x.to(gpu) for x in tensors] for number, gpu in enumerate(gpus)])


def reduce_add_coalesced(inputs: Any, destination: int | None = None, buffer_size: int = 0) -> Any:
    gpu = torch.device("cuda", destination)
    return tuple(sum(x.to(gpu) for x in each) for each in zip(*inputs, strict=True))
