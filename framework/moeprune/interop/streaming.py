"""Prunes a transformers checkpoint where it lies: tensor by tensor, shard by shard, without the model in memory.

What stays is copied as bytes, whatever its type, through a small buffer, so memory does not grow with the checkpoint. Only
experts that a plan merges are read as numbers, one group at a time.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moeprune.errors import UserError
from moeprune.files import locked, model_folder, read_json, write_text
from moeprune.interop.checkpoint import finish
from moeprune.interop.weights import OnDisk, Stored, unquantised
from moeprune.pruning.merging import merge_experts
from moeprune.pruning.plan import Merge, PrunePlan

SPAN = 16 << 20  # bytes that the system copies at a time
BLOCK = 256 << 10  # bytes copied at a time through memory; 1 MB and more took several times as long
FLUSH = 256 << 20  # bytes after which the system is asked to write to the disk, beside the copying
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Streamed:
    """What streaming did.

    Args:
        read: bytes of the source's tensors that were copied or merged.
        written: bytes of tensors in the output.
        left_out: tensors that transformers does not load for this family, and that stayed behind.
    """

    read: int
    written: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Range:
    """Bytes of a file."""

    file: Path
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class _Merged:
    """The share of one merged expert in the tensor that is called `name` in the source."""

    layer: int
    into: int
    name: str
    size: int


@dataclass
class _Out:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: list[_Range | _Merged] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def prune_streaming(
    source: Path | str | OnDisk,
    output: Path | str,
    plan: PrunePlan,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Streamed:
    """Apply a plan to a checkpoint on disk: writes what `surgery.apply_plan` and `checkpoint.export` would.

    Args:
        source: folder with safetensors; may be an earlier export.
        output: folder to write; it is complete or not there, whatever interrupts the call.
        plan: original ids to keep; made for the experts that the source has.
        provenance: written into the record.
        overwrite: replace an existing folder.
        max_shard_size: of the safetensors files, bytes or with a unit such as 5GB; a larger tensor has a file of its own.
        progress: show a bar, if this is a terminal.

    Raises:
        UserError: the plan was made for another model, tensors that cannot be cut, the folder exists, or the disk is full.
    """
    output = Path(output)
    limit = _bytes_of(max_shard_size)
    disk = source if isinstance(source, OnDisk) else OnDisk(source)
    model_folder(output, overwrite, disk.path)
    earlier = [PrunePlan.from_dict(each) for each in disk.record.get("plans", [])]
    tensors = _cut(disk, plan)
    shards = _shards(tensors, limit)
    total = sum(tensor.size for tensor in tensors)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if total > free:
            raise UserError(
                f"{output} needs {total / 1e9:.2f} GB, {output.parent} has {free / 1e9:.2f} GB free; free space or choose "
                f"another --output"
            )
        with _scratch(output) as made, _bar(total, progress) as bar:
            read = _write(disk, plan, shards, made, bar)
            shutil.copyfile(disk.path / "config.json", made / "config.json")
            _without_router_loss(made / "config.json")
            saved = [layer.expert_ids for layer in disk.model.moe_layers]
            try:
                _renumber(disk, plan)
                left_out = {"left_out": list(disk.left_out)} if disk.left_out else {}
                kept = [layer.ids for layer in disk.model.moe_layers]
                finish(disk.model, made, [*earlier, plan], disk.path, {**(provenance or {}), **left_out}, kept)
            finally:
                for layer, ids in zip(disk.model.moe_layers, saved, strict=True):
                    layer.expert_ids = ids
            _settle(made)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; free space or choose another --output"
        ) from error
    return Streamed(read, total, disk.left_out)


def _cut(disk: OnDisk, plan: PrunePlan) -> list[_Out]:
    """Every tensor of the output, in the source's order.

    Raises:
        UserError: the plan was made for another model, or the checkpoint's quantisation stands in its way.
    """
    layers = disk.model.moe_layers
    if len(layers) != len(plan.kept):
        raise UserError(f"the plan has {len(plan.kept)} layers, the model has {len(layers)}")
    for index, (layer, before) in enumerate(zip(layers, plan.before, strict=True)):
        if tuple(sorted(layer.ids)) != before:
            raise UserError(f"the plan was made for other experts than layer {index} of this model has")
    if any(plan.merges):
        unquantised(disk, "the mean of experts")
    if (how := getattr(disk.model.config, "quantization_config", None)) is not None:
        if len(set(plan.n_kept)) > 1:
            raise UserError(
                f"{disk.path} is quantised, and transformers cannot load quantised layers of unequal size; keep as many experts "
                f"in every layer (constraints with min_keep and max_keep), or dequantise the checkpoint first"
            )
        if numbered := re.search(
            r"[\w.]*\bexperts\.\d+[\w.]*", json.dumps(how if isinstance(how, dict) else how.to_dict())
        ):
            raise UserError(
                f"the quantisation of {disk.path} names single experts ({numbered[0]}), whose numbers change; dequantise the "
                f"checkpoint first"
            )
    positions = [
        [i for i, expert in enumerate(layer.ids) if expert in set(kept)]
        for layer, kept in zip(layers, plan.kept, strict=True)
    ]
    renumbered = [{old: new for new, old in enumerate(kept)} for kept in positions]
    merged = [
        {layer.ids.index(merge.into) for merge in merges} for layer, merges in zip(layers, plan.merges, strict=False)
    ]
    merged += [set() for _ in layers[len(merged) :]]
    left_out = set(disk.left_out)
    made = []
    for name, stored in disk.tensors.items():
        if name in left_out:
            continue
        role = disk.roles.get(name)
        if role is None:
            made.append(_Out(name, stored.dtype, stored.shape, [_Range(stored.file, stored.start, stored.size)]))
        elif role.expert is not None:
            if role.expert in renumbered[role.layer]:
                a, b = role.number
                piece: _Range | _Merged = _Range(stored.file, stored.start, stored.size)
                if role.expert in merged[role.layer]:
                    piece = _Merged(role.layer, role.expert, name, stored.size)
                new = f"{name[:a]}{renumbered[role.layer][role.expert]}{name[b:]}"
                made.append(_Out(new, stored.dtype, stored.shape, [piece]))
        else:
            kept = positions[role.layer]
            shape = (*stored.shape[: role.dim], len(kept), *stored.shape[role.dim + 1 :])
            of_experts = role.path.startswith(f"{layers[role.layer].where.experts}.")
            replaced = merged[role.layer] if of_experts else set()
            made.append(_Out(name, stored.dtype, shape, list(_entries(stored, role.dim, kept, role.layer, replaced))))
    return made


def _entries(
    stored: Stored, dim: int, kept: Sequence[int], layer: int, replaced: set[int]
) -> Iterator[_Range | _Merged]:
    """The entries `kept` of a tensor's dimension `dim`."""
    outer = math.prod(stored.shape[:dim])
    size, rest = divmod(stored.size, outer * stored.shape[dim])
    if rest:
        raise UserError(
            f"{stored.name} ({stored.dtype}) has entries that share a byte, and cannot be cut; dequantise it first"
        )
    for row in range(outer):
        for entry in kept:
            if entry in replaced:
                yield _Merged(layer, entry, stored.name, size)
            else:
                yield _Range(stored.file, stored.start + (row * stored.shape[dim] + entry) * size, size)


def _shards(tensors: Sequence[_Out], limit: int) -> list[list[_Out]]:
    """Tensors file by file: in order, as many as fit; inside a file, wider types first, so that all are aligned."""
    shards: list[list[_Out]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return [sorted(shard, key=lambda each: -each.size / max(1, math.prod(each.shape))) for shard in shards]


def _write(disk: OnDisk, plan: PrunePlan, shards: Sequence[Sequence[_Out]], folder: Path, bar: Any) -> int:
    """Write the shards and their index; bytes read."""
    read = 0
    experts = _MergedExperts(disk, plan)
    weight_map: dict[str, str] = {}
    sources: dict[Path, FileIO] = {}
    view = memoryview(bytearray(BLOCK))
    with ExitStack() as stack:
        flusher = _Flusher(stack.enter_context(ThreadPoolExecutor(1)))
        for number, shard in enumerate(shards):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            weight_map |= {tensor.name: name for tensor in shard}
            target = stack.enter_context((folder / name).open("xb", buffering=0))
            header = _header(shard)
            _reserve(target, len(header) + sum(tensor.size for tensor in shard))
            _put(target, memoryview(header))
            for piece in _runs(piece for tensor in shard for piece in tensor.pieces):
                if isinstance(piece, _Merged):
                    data = experts.share(piece)
                    _put(target, memoryview(data))
                    read += len(data) * len(experts.members(piece))
                    bar(len(data))
                    continue
                if piece.file not in sources:
                    sources[piece.file] = stack.enter_context(piece.file.open("rb", buffering=0))
                for size in _copy(sources[piece.file], piece, target, view):
                    flusher.wrote(target, size)
                    bar(size)
                read += piece.size
            flusher.ends(target)
        flusher.finish()
    if len(shards) > 1:
        size = sum(tensor.size for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return read


def _header(shard: Sequence[_Out]) -> bytes:
    """The head of a safetensors file: its length, then JSON, padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(pieces: Iterator[_Range | _Merged]) -> Iterator[_Range | _Merged]:
    """The same bytes in fewer pieces: neighbours in the source become one."""
    last: _Range | None = None
    for piece in pieces:
        if isinstance(piece, _Range) and last is not None and (piece.file, piece.start) == (last.file, last.stop):
            last = _Range(last.file, last.start, last.size + piece.size)
            continue
        if last is not None:
            yield last
            last = None
        if isinstance(piece, _Merged):
            yield piece
        else:
            last = piece
    if last is not None:
        yield last


class _Flusher:
    """Writes files to the disk, in a thread, while they grow: at the end little is left to wait for."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._waiting = 0  # bytes
        self._calls: list[Future[None]] = []

    def wrote(self, target: FileIO, size: int) -> None:
        """So many more bytes are in the file."""
        self._waiting += size
        if self._waiting >= FLUSH and (not self._calls or self._calls[-1].done()):
            self.ends(target)

    def ends(self, target: FileIO) -> None:
        """Flush what the file holds now."""
        self._waiting = 0
        self._calls.append(self._pool.submit(os.fsync, target.fileno()))

    def finish(self) -> None:
        """Wait.

        Raises:
            OSError: something did not reach the disk.
        """
        for call in self._calls:
            call.result()


def _reserve(target: FileIO, size: int) -> None:
    """Have the file system set bytes aside, where it can do so without writing them.

    Raises:
        OSError: the disk is full.
    """
    try:
        reserve = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError, TypeError):
        return  # not Linux
    if reserve(target.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _put(target: FileIO, data: memoryview) -> None:
    """Write all of `data`."""
    while data:
        data = data[target.write(data) :]


def _copy(source: FileIO, piece: _Range, target: FileIO, view: memoryview) -> Iterator[int]:
    """Copy bytes from file to file, inside the system where it can, otherwise through the buffer `view`; yields how many, as it
    goes.
    """
    left = piece.size
    while left and hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(source.fileno(), target.fileno(), min(left, SPAN), piece.stop - left)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            break  # not between these file systems
        if not n:
            break
        left -= n
        yield n
    source.seek(piece.stop - left)
    while left:
        n = source.readinto(view[: min(left, len(view))])
        if not n:
            raise OSError(errno.EIO, f"{piece.file} became shorter while it was read")
        _put(target, view[:n])
        left -= n
        yield n


class _MergedExperts:
    """Experts that a plan merges, as bytes; one at a time is kept, since its tensors follow one another on disk."""

    def __init__(self, disk: OnDisk, plan: PrunePlan) -> None:
        self._disk, self._plan = disk, plan
        self._last: tuple[tuple[int, int] | None, dict[str, bytes]] = (None, {})

    def members(self, piece: _Merged) -> tuple[int, ...]:
        """Original ids of those that become one."""
        return self._merge(piece).members

    def share(self, piece: _Merged) -> bytes:
        """What `piece` stands for."""
        if self._last[0] != (piece.layer, piece.into):
            layer, merge = self._disk.model.moe_layers[piece.layer], self._merge(piece)
            order = [layer.ids.index(member) for member in merge.members]
            with self._disk.holding(piece.layer, order) as held:
                merge_experts(held, [merge], self._plan.align)
                made = self._disk.as_stored(piece.layer, piece.into, order.index(piece.into))
            self._last = ((piece.layer, piece.into), made)
        return self._last[1][piece.name]

    def _merge(self, piece: _Merged) -> Merge:
        into = self._disk.model.moe_layers[piece.layer].ids[piece.into]
        return next(merge for merge in self._plan.merges[piece.layer] if merge.into == into)


def _renumber(disk: OnDisk, plan: PrunePlan) -> None:
    """Let the skeleton say what the output holds: the kept experts, in the order of the source."""
    for layer, kept in zip(disk.model.moe_layers, plan.kept, strict=True):
        stay = set(kept)
        layer.expert_ids = layer.expert_ids[[i for i, expert in enumerate(layer.ids) if expert in stay]]


def _without_router_loss(file: Path) -> None:
    """As `TransformersModel` does: the router loss of transformers cannot take layers of unequal size."""
    data = read_json(file, "configuration")
    for part in (data, data.get("text_config", {})):
        if part.get("output_router_logits"):
            part["output_router_logits"] = False
            write_text(file, json.dumps(data, indent=2) + "\n")


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, which takes its place at the end; what a killed run left there goes first.

    Raises:
        UserError: another process writes the same output.
    """
    made = output.parent / f".{output.name}.partial"
    old = output.parent / f".{output.name}.old"
    made.mkdir(exist_ok=True)
    with locked(made, f"another process is writing {output}; wait for it, or choose another --output"):
        try:
            for left in made.iterdir():
                if left.name != ".lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield made
            (made / ".lock").unlink()
            shutil.rmtree(old, ignore_errors=True)
            if replaced := output.exists():
                output.rename(old)
            try:
                made.rename(output)
            except OSError:
                if replaced:
                    old.rename(output)
                raise
            _flush(output.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def _settle(folder: Path) -> None:
    """Flush every file that is not a shard, and the folder itself, to the disk."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            _flush(file)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A function to call with every number of bytes written."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("pruning", total=total)
        yield lambda size: progress.advance(task, size)


def _bytes_of(size: int | str) -> int:
    """5GB -> 5,000,000,000.

    Raises:
        UserError: no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", str(size).strip().upper())
    unit = UNITS.get(found[2].removesuffix("B") + "B" if found[2] not in ("", "B") else "") if found else None
    if found is None or unit is None or int(float(found[1]) * unit) < 1:
        raise UserError(
            f"max_shard_size must be a number of bytes, or one with a unit (5GB, 500MB, 2GiB), got {size!r}"
        )
    return int(float(found[1]) * unit)
