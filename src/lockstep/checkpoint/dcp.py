"""Tensors of all ranks in one folder, through torch.distributed.checkpoint.

Apart from lockstep.checkpoint.directory because importing torch's part takes a second, which a run that neither saves nor
loads need not wait for. Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from lockstep.checkpoint.directory import FileContents, commit, fingerprint
from lockstep.config.own_files import open_own
from lockstep.distributed.dtensor import is_sharded
from lockstep.errors import UserError
from lockstep.utils.files import sync_folder, write_atomically


class HashedFile(io.RawIOBase):
    """A file, and the hash of what it was handed, taken while that is in the cache: nothing is read again."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file, self._hash = open_own(path, "wb", buffering=0), hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            done = self._file.write(rest[:CHUNK])
            self._hash.update(rest[:done])
            rest = rest[done:]
        self.size += size
        return size

    def sync(self) -> dict[str, Any]:
        """Flush it to disk; its fingerprint."""
        os.fsync(self._file.fileno())
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()
        super().close()


CHUNK = 2**19  # bytes, half of a core's cache; both calls on a chunk leave the interpreter to training


class Writer(FileSystemWriter):
    """torch's writer, which in the end seals the folder with a manifest and gives it its name."""

    def __init__(
        self,
        temporary: Path,
        tensors: dict[str, Tensor],
        files: FileContents,
        facts: dict[str, Any],
        keep: int,
        best: bool,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(temporary, single_file_per_rank=True, sync_files=True, overwrite=False)
        self.tensors, self.moved = tensors, moved
        self.temporary, self.files, self.facts, self.keep, self.best = temporary, files, facts, keep, best

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's files and, beside them, their hashes: reading all ranks' is too much for one of them."""
        prefix = plan.storage_data.prefix
        try:
            done, sums = self._write_tensors(f"{prefix}0.distcp", plan, planner)
            for name, content in self.files.items():
                (self.temporary / name).parent.mkdir(exist_ok=True)
                write_atomically(self.temporary / name, content)
                size, digest = memoryview(content).nbytes, hashlib.sha256(content).hexdigest()
                sums[name] = {"bytes": size, "sha256": digest}
            for folder in {(self.temporary / name).parent for name in self.files}:
                sync_folder(folder)
            write_atomically(self.temporary / f"{prefix}hash.json", json.dumps(sums))
        except (OSError, RuntimeError) as error:
            mine = [self.temporary / name for name in self.files]
            for path in [*self.temporary.glob(f"{prefix}*"), *mine]:  # a full disk is needed by others
                path.unlink(missing_ok=True)
            # Where the disk is full, torch's zip writer raises an error of its own while the OSError is being handled.
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OSError):
                raise cause from None
            raise
        result: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        result.set_result(done)
        return result

    def _write_tensors(self, name: str, plan: Any, planner: Any) -> tuple[list[WriteResult], dict[str, Any]]:
        """One file as torch's writer makes it, one torch.save after the other; (where each is, {name: fingerprint})."""
        done = []
        with HashedFile(self.temporary / name) as file:
            stream = io.BufferedWriter(file, CHUNK)  # the many small writes of torch.save are not Python's
            for item in plan.items:
                held = self.tensors[item.index.fqn]
                part = planner.resolve_data(item) if is_sharded(held) else held  # torch looks for a part in four ways
                tensor = part.detach().cpu()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # a part of a larger storage, all of which would be written
                self.moved()
                start = file.size
                torch.save(tensor, stream)
                stream.flush()
                size = file.size - start
                done.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
            return done, {name: file.sync()}

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0, when every rank has written: make the checkpoint one."""
        super().finish(metadata, results)
        files = {".metadata": fingerprint(self.temporary / ".metadata")}
        notes = sorted(self.temporary.glob("__*_hash.json"))
        for note in notes:
            files |= json.loads(note.read_text(encoding="utf-8"))
            note.unlink()
        unseen = {result.storage_data.relative_path for part in results for result in part} - set(files)
        if unseen:
            raise OSError(f"rank 0 does not see {', '.join(sorted(unseen))}: `out` must be on a shared file system")
        commit(self.temporary, self.facts | {"files": files}, keep=self.keep, best=self.best)


class Reader(FileSystemReader):
    """torch's reader, but it unpickles nothing except the description of tensors."""

    def __init__(self, path: Path, others: bool = False) -> None:
        super().__init__(path)
        self.others = others

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path), self.others)


def tensor_metadata(path: Path, others: bool = False) -> dict[str, TensorStorageMetadata]:
    """What tensors a checkpoint holds: {name: shape, dtype and the pieces it is stored in}; raises as `read_metadata`."""
    entries = read_metadata(path, others).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_metadata(path: Path, others: bool = False) -> Metadata:
    """torch's description of a checkpoint.

    Args:
        others: it may hold more than tensors, as other projects' do; the rest is left out, and never read.

    Raises:
        UserError: reading it would run code.
    """
    try:
        with (path / ".metadata").open("rb") as stream:
            metadata = _TensorsOnly(stream).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
    except Exception as error:  # garbled bytes may raise anything
        raise UserError(f"{path}: refused, for it is not a description of tensors alone ({error})") from None
    other = [
        name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)
    ]
    if others:
        for name in other:
            del metadata.state_dict_metadata[name]
    elif other:
        raise UserError(f"{path}: refused, for {other[0]} is not a tensor, and reading it could run code")
    return metadata


class _TensorsOnly(pickle.Unpickler):
    """Resolves a closed list of names: a module is no boundary, since a pickle may ask for `os.system` in any that
    imports os."""

    METADATA = """Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata
        TensorProperties _MEM_FORMAT_ENCODING""".split()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" and name in self.METADATA:
            return super().find_class(module, name)
        if (module, name) in {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("torch", "device"),
            ("pathlib", "PosixPath"),
            ("pathlib", "PurePosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13
            ("collections", "OrderedDict"),
        }:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def load_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
    others: bool = False,
) -> None:
    """Fill tensors, in place, with those of the same name in a checkpoint, whichever ranks and devices saved them.

    Args:
        tensors: {name: tensor of the shape that was saved}, on any device, sharded (DTensor) or not.
        alone: only this rank calls it.
        others: as `read_metadata` has it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `alone` is meant
        dcp_load(tensors, storage_reader=Reader(path, others), process_group=group, no_dist=alone)
