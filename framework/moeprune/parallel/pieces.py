"""Checkpoints in pieces: a folder into which every process writes what it holds (torch.distributed.checkpoint).

    meta.pt                 a Lightning checkpoint with None in the place of every large tensor
    .metadata, *.distcp     these tensors, each under its path: state_dict/NAME, optimizer_states/0/12/exp_avg

A tensor whose rows are experts on several processes is stored row by row, under PATH#POSITION. What was written by any number
of processes is read by any other: whole, or the part that a process needs. Nothing is unpickled but tensors and plain data.
"""

from __future__ import annotations

import importlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from moeprune.errors import UserError

DESCRIPTION, INDEX = "meta.pt", ".metadata"
# All that the index of such a folder is made of: it is a pickle, and a pickle can name anything.
PLAIN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of which other processes hold the others.

    Args:
        tensor: [n, ...].
        positions: n, where each stands in the whole tensor.
    """

    tensor: Tensor
    positions: Sequence[int]


def is_folder(path: str | Path) -> bool:
    """Whether a checkpoint in pieces is there, complete or not."""
    return (Path(path) / DESCRIPTION).is_file() or (Path(path) / INDEX).is_file()


def places(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """(path, dictionary, key) of every weight and every value of an optimizer's state, in a Lightning checkpoint."""
    for name in checkpoint["state_dict"]:
        yield f"state_dict/{name}", checkpoint["state_dict"], name
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for number, state in optimizer["state"].items():
            for name in state:
                yield f"optimizer_states/{index}/{number}/{name}", state, name


def write(checkpoint: dict[str, Any], path: Path, first: bool) -> None:
    """Write a checkpoint, every process its part. Collective.

    Args:
        checkpoint: a Lightning checkpoint; its tensors are DTensors, `Rows`, or the same on all processes. They are taken out.
        path: of the folder; the same on all processes.
        first: whether this is process 0.

    Raises:
        OSError: it cannot be written; on all processes if it is a tensor, on process 0 if it is the rest.
    """
    tensors: dict[str, Tensor] = {}
    for where, holder, name in places(checkpoint):
        value = holder[name]
        if isinstance(value, Rows):
            for row, position in zip(value.tensor, value.positions, strict=True):
                tensors[f"{where}#{position}"] = row
        elif isinstance(value, Tensor) and value.ndim:
            tensors[where] = value
        else:
            continue
        holder[name] = None
    try:
        save(tensors, storage_writer=FileSystemWriter(path))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        known = [cause for cause in causes if isinstance(cause, OSError)]
        raise (known[0] if known else OSError(str(causes[0]))) from error
    if first:
        buffer = io.BytesIO()  # torch.save does not tell a full disk from other errors
        torch.save(checkpoint, buffer)
        (path / DESCRIPTION).write_bytes(buffer.getbuffer())


class Folder:
    """A checkpoint in pieces, opened for reading.

    Args:
        path: of it.

    Raises:
        UserError: it is not complete, or holds what is not a checkpoint's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for name in (DESCRIPTION, INDEX):
            if not (self.path / name).is_file():
                raise UserError(f"the checkpoint {self.path} is not complete: it lacks {name}; take another one")

    @cached_property
    def _index(self) -> dict[str, TensorStorageMetadata]:
        entries = _Reader(self.path).read_metadata().state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Of tensors stored row by row, how many rows there are."""
        numbers: dict[str, int] = {}
        for name in self._index:
            where, mark, _ = name.rpartition("#")
            if mark:
                numbers[where] = numbers.get(where, 0) + 1
        return numbers

    def description(self) -> dict[str, Any]:
        """The checkpoint with None in the place of every tensor that `tensor` reads."""
        try:
            found = torch.load(self.path / DESCRIPTION, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.path / DESCRIPTION} is not readable: it is cut short or of another kind") from error
        if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
            raise UserError(f"{self.path} is no checkpoint that `moeprune fit` wrote: it holds no state_dict")
        return found

    def checkpoint(self, optimizer: bool = True) -> dict[str, Any]:
        """The whole checkpoint, as one process would have written it into a file; or None in the place of what the optimizer has."""
        found = self.description()
        missing = [
            (where, holder, name)
            for where, holder, name in places(found)
            if holder[name] is None and (optimizer or holder is found["state_dict"])
        ]
        targets: dict[str, Tensor] = {}
        for where, holder, name in missing:
            holder[name] = self._empty(where, targets)
        self._load(targets)
        return found

    def tensor(self, where: str, positions: Sequence[int] | None = None) -> Tensor:
        """The tensor of this path; or its rows at these positions.

        Raises:
            UserError: there is none.
        """
        targets: dict[str, Tensor] = {}
        if positions is None or where not in self._rows:
            tensor = self._empty(where, targets)
            self._load(targets)
            return tensor if positions is None else tensor[torch.tensor(positions, dtype=torch.int64)]
        entry = self._entry(f"{where}#0")
        tensor = torch.empty(len(positions), *entry.size, dtype=entry.properties.dtype)
        self._load({f"{where}#{position}": tensor[row] for row, position in enumerate(positions)})
        return tensor

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read into tensors; of a DTensor the part of this process."""
        direct = {where: target for where, target in targets.items() if where in self._index}
        for where, target in direct.items():
            if self._index[where].size != target.shape:
                raise UserError(
                    f"{where} in the checkpoint {self.path} has shape {tuple(self._index[where].size)}, not {tuple(target.shape)}"
                )
        self._load(direct)
        for where, target in targets.items():
            if where not in direct:
                target.copy_(spread(self.tensor(where).to(target.device), target))

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._index:
            raise UserError(f"the checkpoint {self.path} lacks {name}; take another one")
        return self._index[name]

    def _empty(self, where: str, targets: dict[str, Tensor]) -> Tensor:
        """A tensor for `where`; what is read into it is added to `targets`."""
        if where in self._rows:
            entry, n = self._entry(f"{where}#0"), self._rows[where]
            tensor = torch.empty(n, *entry.size, dtype=entry.properties.dtype)
            targets.update({f"{where}#{position}": tensor[position] for position in range(n)})
        else:
            entry = self._entry(where)
            targets[where] = tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        return tensor

    def _load(self, targets: dict[str, Tensor]) -> None:
        if not targets:
            return
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
                load(targets, storage_reader=_Reader(self.path), no_dist=True)
        except (CheckpointException, RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
            causes = [c for c, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
            reason = (str(causes[0]) or type(causes[0]).__name__).splitlines()[0]
            raise UserError(f"the checkpoint {self.path} is not readable ({reason}); take another one") from error


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every process has, sharded as `like` is; itself if that is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class _Reader(FileSystemReader):
    """Reads the index without unpickling anything else than indices."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, TypeError) as error:
            raise UserError(f"{path} is not readable: {str(error) or 'it is cut short'}") from error
        if not isinstance(found, Metadata):
            raise UserError(f"{path} is not the index of a checkpoint")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in PLAIN.get(module, ()):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is never unpickled")
