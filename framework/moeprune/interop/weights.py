"""A transformers checkpoint as it lies on disk: which of its tensors hold experts, found without loading any.

Most families store one tensor per expert and projection (`...experts.3.up_proj.weight`), some store all experts in one tensor
(`...experts.down_proj`), and names on disk differ from those in memory. What a tensor on disk becomes in memory is asked of
transformers, by the mapping that it loads with; which tensors in memory count experts, of `locate`. Nothing is told from names
or shapes alone: a tensor in a MoE layer whose place in memory is unknown is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeprune.errors import UserError
from moeprune.files import read_json
from moeprune.interop.checkpoint import complete, configuration, library, read_record, refuse_view
from moeprune.interop.transformers import (
    TransformersLayer,
    TransformersModel,
    count_field,
    modules_tensor,
    on_meta,
    text_config,
    with_experts,
)
from moeprune.pruning.calibration import WEIGHTS, Recording
from moeprune.pruning.evidence import Evidence, LayerEvidence

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ("_blocks", "_scales", "_scale_inv")  # endings of what takes a fused tensor's place, or lies beside it
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Args:
        name: on disk.
        file: that holds it.
        dtype: as the format spells it: BF16, F8_E4M3, ...
        shape: of the tensor.
        start: first byte, from the beginning of the file.
        stop: byte after the last.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Role:
    """What a tensor on disk that holds something of one expert, or of each of them, becomes in memory.

    Args:
        layer: position among the MoE layers.
        path: of the tensor in memory.
        dim: dimension that counts experts, of a tensor that holds all of them.
        expert: position of the only expert, of a tensor that holds one.
        number: where the name says so, from and to.
        part: which of the tensors that are concatenated in memory, with `expert`.
        parts: how many those are.
        join: dimension of one expert's tensors along which they are concatenated.
        exact: it is the tensor itself; else what a quantised checkpoint stores in its place or beside it.
    """

    layer: int
    path: str
    dim: int = 0
    expert: int | None = None
    number: tuple[int, int] = (0, 0)
    part: int = 0
    parts: int = 1
    join: int = 0
    exact: bool = True


class OnDisk:
    """A folder of safetensors, without its weights in memory.

    Args:
        path: the folder; may be an earlier export of a pruned model.

    Raises:
        UserError: no such checkpoint, a family that is not supported, files that are missing or cut short, or a tensor in a
            MoE layer that cannot be attributed.
    """

    path: Path
    record: Mapping[str, Any]  # what moeprune wrote beside an earlier export
    model: TransformersModel  # on the meta device; its `expert_ids` are those on disk
    tensors: Mapping[str, Stored]  # in the order in which they lie on disk
    roles: Mapping[str, Role]  # of the tensors that go with experts
    left_out: tuple[str, ...]  # what transformers does not load for this family: layers that predict further tokens

    def __init__(self, path: Path | str) -> None:
        library()
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise UserError(f"{path} is no folder with a transformers checkpoint (config.json and safetensors)")
        self.record = read_record(self.path)
        refuse_view(self.path)
        config = configuration(self.path)
        n_original = self.record.get("n_original") or getattr(text_config(config), count_field(config))
        whole = on_meta(with_experts(config, n_original))
        self.model = TransformersModel(whole, self.record.get("expert_ids"), n_original)
        self.tensors = _stored(self.path)
        self._attribute(_Names(whole))
        self._check()
        self._fused: dict[str, Stored] = {}
        self._parts: dict[tuple[str, int], list[tuple[Stored, Role]]] = defaultdict(list)
        for name, role in sorted(self.roles.items(), key=lambda item: item[1].part):
            if role.exact and role.expert is None:
                self._fused[role.path] = self.tensors[name]
            elif role.exact and role.expert is not None:
                self._parts[role.path, role.expert].append((self.tensors[name], role))

    @property
    def quantised(self) -> str | None:
        """The first tensor of an expert that is stored as anything but floating-point numbers; None if there is none."""
        return next(
            (n for n, role in self.roles.items() if not role.exact or self.tensors[n].dtype not in FLOATS), None
        )

    def read(self, stored: Stored, entry: int | None = None) -> Tensor:
        """A tensor of floating-point numbers, or of its first dimension only `entry` (kept, of size 1)."""
        if stored.dtype not in FLOATS:
            raise UserError(
                f"{stored.name} in {self.path} is {stored.dtype}, not floating-point numbers; dequantise it first"
            )
        shape, start, size = stored.shape, stored.start, stored.size
        if entry is not None:
            size //= shape[0]
            shape, start = (1, *shape[1:]), start + entry * size
        data = bytearray(size)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < size:
                n = file.readinto(memoryview(data)[done:])
                if not n:
                    raise UserError(f"{stored.file} is cut short; complete the download")
                done += n
        return torch.frombuffer(data, dtype=FLOATS[stored.dtype]).view(shape)

    @contextmanager
    def holding(
        self, layer: int, experts: Sequence[int] | None = None, router: bool = False
    ) -> Iterator[TransformersLayer]:
        """A MoE layer whose experts are these alone, read from disk, for as long as the context lasts.

        Args:
            layer: its position.
            experts: positions of the experts to read; none by default.
            router: read the router as well, all of it.
        """
        held = self.model.moe_layers[layer]
        ids = held.expert_ids
        saved: list[tuple[Any, str, Tensor]] = []
        try:
            for path, dim in held.where.tensors.items():
                if path.startswith(f"{held.where.experts}.") and experts is not None:
                    tensor = torch.cat([self._expert(path, dim, expert) for expert in experts])
                elif path.startswith(f"{held.where.router}.") and router and path in self._fused:
                    tensor = self.read(self._fused[path])
                else:
                    continue
                owner, _, name = path.rpartition(".")
                module = self.model.model.get_submodule(owner)
                old = getattr(module, name)
                saved.append((module, name, old))
                is_parameter = isinstance(old, nn.Parameter)
                setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
            if experts is not None:
                held.expert_ids = ids[list(experts)]
            yield held
        finally:
            held.expert_ids = ids
            for module, name, old in saved:
                setattr(module, name, old)

    def as_stored(self, layer: int, expert: int, held: int) -> dict[str, bytes]:
        """What the experts that `holding` holds look like on disk: name -> bytes of one expert.

        Args:
            layer: position of the layer.
            expert: position of the expert on disk.
            held: position of the expert among those held.
        """
        found = {}
        where = self.model.where[layer]
        for path in where.tensors:
            if not path.startswith(f"{where.experts}."):
                continue
            tensor = modules_tensor(self.model.model, path).detach()[held]
            if path in self._fused:
                found[self._fused[path].name] = _bytes(tensor)
                continue
            parts = self._parts[path, expert]
            sizes = [stored.shape[role.join] for stored, role in parts]
            pieces = torch.split(tensor, sizes, parts[0][1].join)
            found |= {stored.name: _bytes(piece) for (stored, _), piece in zip(parts, pieces, strict=True)}
        return found

    def _expert(self, path: str, dim: int, expert: int) -> Tensor:
        """[1, ...] what the tensor at `path` holds of one expert."""
        if (stored := self._fused.get(path)) is not None:
            if dim != 0:
                raise UserError(
                    f"{stored.name} counts experts in dimension {dim}; they cannot be read one by one, load the model"
                )
            return self.read(stored, expert)
        parts = self._parts[path, expert]
        tensor = torch.cat([self.read(stored) for stored, _ in parts], parts[0][1].join)[None]
        expected = (1, *modules_tensor(self.model.model, path).shape[1:])
        if tensor.shape != expected:
            raise UserError(
                f"{parts[0][0].name} makes an expert of shape {tuple(tensor.shape[1:])}, not {expected[1:]}"
            )
        return tensor

    def _attribute(self, names: _Names) -> None:
        """Find `roles` and `left_out`."""
        found: dict[str, Role] = {}
        unknown: list[str] = []
        cut = {
            path: Role(layer, path, dim)
            for layer, where in enumerate(self.model.where)
            for path, dim in where.tensors.items()
            if path in names.state  # else it is computed when the model is built, and not saved
        }

        there: set[str] = set()

        def role_of(name: str) -> Role | None:
            """None for a tensor that does not go with experts.

            Raises:
                KeyError: transformers knows no such tensor.
            """
            path, converter, part = names(name)
            targets = [path] if converter is None else names.targets(path, converter)
            there.update(targets)
            if converter is None:
                if path not in names.state:
                    raise KeyError(name)
                return cut.get(path)
            hit = [target for target in targets if target in cut]
            if not hit:
                if path not in names.state:
                    raise KeyError(name)
                return None
            operations = [type(op).__name__ for op in converter.operations]
            span = names.expert_number(name, path)
            if (
                targets != hit[:1]
                or operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
                or converter.operations[0].dim != 0
                or span is None
            ):
                raise UserError(
                    f"{self.path} stores {name} in a form that cannot be cut ({', '.join(operations)} makes {targets[0]} of it); "
                    f"load the model and prune it in memory"
                )
            join = converter.operations[1].dim - 1 if len(operations) == 2 else 0
            number = int(name[slice(*span)])
            n_parts = len(converter.source_patterns)
            return replace(cut[path], dim=0, expert=number, number=span, part=part, parts=n_parts, join=join)

        for name in self.tensors:
            try:
                role = role_of(name)
            except KeyError:
                unknown.append(name)
                continue
            if role is not None:
                found[name] = role
        inside = [
            _common([name for name, role in found.items() if role.layer == i]) for i in range(len(self.model.where))
        ]
        left_out = []
        for name in unknown:
            path, _, _ = names(name)
            if names.ignored(path):
                left_out.append(name)
                continue
            fused = next((path.removesuffix(end) for end in QUANTISED if path.removesuffix(end) in cut), None)
            try:
                role = cut[fused] if fused is not None else role_of(f"{name.rpartition('.')[0]}.weight")
            except KeyError:
                role = None
                if any(name.startswith(prefix) for prefix in inside) or "experts" in name.split("."):
                    raise UserError(
                        f"{self.path}: transformers knows no tensor {name} in {type(self.model.model).__name__}, so whether it "
                        f"goes with an expert is unknown; remove it, or load the model and prune it in memory"
                    ) from None
            if role is not None and role.expert is None and fused is None:
                raise UserError(
                    f"{self.path}: {name} lies beside {role.path}, which has an entry per expert, and cannot be cut; "
                    f"dequantise the checkpoint first"
                )
            if role is not None:
                found[name] = replace(role, exact=False)
        there |= {path.removesuffix(end) for path in there for end in QUANTISED}
        complete(
            self.path, (name for name in names.state.keys() - there if name not in cut and not names.optional(name))
        )
        self.roles, self.left_out = found, tuple(left_out)
        self._expected = {path: names.state[path].shape for path in cut}

    def _check(self) -> None:
        """Every tensor that goes with experts is there, with an entry for each of them."""
        fused: set[str] = set()
        numbers: dict[str, dict[tuple[int, str], list[int]]] = defaultdict(lambda: defaultdict(list))
        parts: dict[str, int] = {}
        for name, role in self.roles.items():
            if role.expert is not None:
                a, b = role.number
                numbers[role.path][role.part, f"{name[:a]}*{name[b:]}"].append(role.expert)
                parts[role.path] = role.parts
                continue
            fused.add(role.path)
            n_experts, shape = self.model.moe_layers[role.layer].n_experts, self.tensors[name].shape
            expected = list(self._expected[role.path])
            expected[role.dim] = n_experts
            if shape != tuple(expected) if role.exact else role.dim != 0 or shape[:1] != (n_experts,):
                wanted = tuple(expected) if role.exact else f"a first dimension of {n_experts}, one entry per expert"
                raise UserError(f"{self.path}: {name} has shape {shape}, expected {wanted}")
        for layer, where in enumerate(self.model.where):
            n_experts = self.model.moe_layers[layer].n_experts
            for path in where.tensors:
                if path not in self._expected:
                    continue
                if path not in fused and len({part for part, _ in numbers[path]}) < parts.get(path, 1):
                    raise UserError(
                        f"{self.path} lacks {path} of MoE layer {layer}, or a part of it; complete the download"
                    )
                for (_, name), experts in numbers[path].items():
                    if sorted(experts) != list(range(n_experts)):
                        raise UserError(
                            f"{self.path}: {name} is there for {len(experts)} experts, MoE layer {layer} has {n_experts}; "
                            f"complete the download"
                        )


class _Names:
    """What names on disk become in memory, by the mapping that transformers loads with."""

    def __init__(self, model: Any) -> None:
        from transformers import conversion_mapping, core_model_loading

        self._loading: Any = core_model_loading
        mapping = conversion_mapping.get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, self._loading.WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, self._loading.WeightConverter)]
        self._by_pattern = {p: (c, i) for c in self._converters for i, p in enumerate(c.source_patterns)}
        self._prefix = model.base_model_prefix
        self._numbers: dict[str, int | None] = {}
        self._ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        self._tied = set(model.all_tied_weights_keys)
        self._made = [*(model._keys_to_ignore_on_load_missing or ())]
        self.state: dict[str, Tensor] = model.state_dict()

    def __call__(self, name: str) -> tuple[str, Any, int]:
        """Path in memory, what converts the tensor (None: nothing), and which of its sources this is."""
        rename = self._loading.rename_source_key
        path, pattern = rename(name, self._renamings, self._converters, self._prefix, self.state)
        if path not in self.state and name in self.state:
            path, pattern = rename(name, [], [], self._prefix, self.state)
        converter, part = self._by_pattern[pattern] if pattern is not None else (None, 0)
        return path, converter, part

    @staticmethod
    def targets(path: str, converter: Any) -> list[str]:
        """Every path that the conversion of which `path` is the first result writes to."""
        first, *others = converter.target_patterns
        return [path, *(path.replace(first, other) for other in others)]

    def expert_number(self, name: str, path: str) -> tuple[int, int] | None:
        """Where in `name` the number is that makes no difference to `path`; None if there is not exactly one."""
        spans = [match.span() for match in re.finditer(r"(?<=\.)\d+(?=\.)", name)]
        template = re.sub(r"\d+", "#", name)
        if template not in self._numbers:
            free = [i for i, (a, b) in enumerate(spans) if self(f"{name[:a]}{int(name[a:b]) + 1}{name[b:]}")[0] == path]
            self._numbers[template] = free[0] if len(free) == 1 else None
        which = self._numbers[template]
        return None if which is None else spans[which]

    def optional(self, path: str) -> bool:
        """Whether transformers does without such a tensor: it is another's, or made when the model is built."""
        return path in self._tied or any(re.search(pattern, path) for pattern in self._made)

    def ignored(self, path: str) -> bool:
        """Whether transformers leaves such a tensor in the file by intent."""
        return any(re.search(pattern, path) for pattern in self._ignored)


def weight_statistics(
    source: Path | str | OnDisk,
    needs: frozenset[str],
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evidence:
    """Statistics of the weights of a checkpoint, as `calibration.record` gives them, with one expert in memory at a time.

    Args:
        source: folder with safetensors.
        needs: of w1, w2, w_n, router_w2; see evidence.py.
        provenance: kept with the evidence.
        progress: called with MoE layers done and in all.

    Raises:
        UserError: a statistic that is measured on data, or weights that are quantised.
    """
    if other := sorted(needs - WEIGHTS):
        raise UserError(
            f"{', '.join(other)} cannot be read off the weights; only {', '.join(sorted(WEIGHTS))} can: load the model instead"
        )
    disk = source if isinstance(source, OnDisk) else OnDisk(source)
    of_experts = sorted(needs - {"router_w2"})
    if of_experts:
        unquantised(disk, "their weights' statistics")
    model: Any = disk.model
    recording = Recording(model, frozenset(of_experts))
    of_router = Recording(model, needs & {"router_w2"})
    layers = []
    for index, layer in enumerate(disk.model.moe_layers):
        rows = []
        for expert in range(layer.n_experts) if of_experts else ():
            with disk.holding(index, [expert]):
                rows.append(recording.weights_of(index))
        stats = {name: np.concatenate([row[name] for row in rows]) for name in of_experts}
        with disk.holding(index, router=True):
            stats |= of_router.weights_of(index)
        layers.append(LayerEvidence(layer.ids, layer.n_original, stats))
        progress(index + 1, len(disk.model.moe_layers))
    return Evidence(tuple(layers), disk.model.top_k, provenance or {})


def unquantised(disk: OnDisk, what: str) -> None:
    """Check that experts are stored as floating-point numbers, without which there is no `what`.

    Raises:
        UserError: they are not.
    """
    if (name := disk.quantised) is not None:
        raise UserError(
            f"the experts in {disk.path} are quantised ({name} is {disk.tensors[name].dtype}), which leaves {what} unknown; "
            f"dequantise the checkpoint first"
        )


def _bytes(tensor: Tensor) -> bytes:
    raw: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return raw


def _common(names: Sequence[str]) -> str:
    """The longest run of whole components, with a dot at its end, that all names start with."""
    first, last = min(names).split("."), max(names).split(".")
    return "".join(f"{a}." for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor in the folder, file by file in the order of their bytes; only headers are read.

    Raises:
        UserError: no safetensors, a file that is missing, cut short or garbled.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        listed = None
        files = [single]
    elif index.is_file():
        listed = read_json(index, "index of the shards").get("weight_map", {})
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        raise UserError(
            f"{folder} holds no model.safetensors and no index of shards; save the model as safetensors first"
        )
    found: dict[str, Stored] = {}
    for file in files:
        for stored in _header(file):
            if listed is None or listed.get(stored.name) == file.name:
                found[stored.name] = stored
    if listed is not None and (lost := sorted(listed.keys() - found.keys())):
        raise UserError(
            f"{folder / listed[lost[0]]} lacks {lost[0]}, which the index says is there; complete the download"
        )
    return found


def _header(file: Path) -> list[Stored]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(opened.read(length))
            end = opened.seek(0, os.SEEK_END)
        header.pop("__metadata__", None)
        stored = [
            Stored(name, file, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"]))
            for name, entry in header.items()
        ]
        if any(not 0 <= each.start <= each.stop <= end for each in stored):
            raise ValueError("it ends before its tensors do")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; complete the download") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no safetensors file ({error}); complete the download") from error
    return sorted(stored, key=lambda each: each.start)
