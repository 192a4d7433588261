"""Pruning checkpoints on disk: the same as loading, pruning and exporting them, for every family, without loading."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune import create
from moeprune.errors import UserError
from moeprune.interop import streaming
from moeprune.interop.checkpoint import export, load, read_record
from moeprune.interop.streaming import prune_streaming
from moeprune.interop.weights import OnDisk, weight_statistics
from moeprune.pruning.calibration import WEIGHTS, record
from moeprune.pruning.plan import Merge, PrunePlan
from moeprune.pruning.surgery import apply_plan

pytestmark = pytest.mark.filterwarnings("ignore")
SHARD = 40_000  # bytes, so that every checkpoint has several


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))


def saved(family: str, folder: Path, shard: int | str = SHARD, dtype: torch.dtype | None = None, **changes: Any) -> Path:
    """A checkpoint with a tokenizer's file beside it."""
    model = build(family, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def keep(path: Path, numbers: Sequence[int]) -> PrunePlan:
    """A plan that keeps the highest ids' experts, of every group of the router as many, and never a prefix of the layer."""
    disk = OnDisk(path)
    layers, groups = disk.model.moe_layers, disk.model.n_groups
    kept = []
    for layer, number in zip(layers, numbers, strict=False):
        size = layer.n_original // groups
        of_groups = [[i for i in sorted(layer.ids) if i // size == group] for group in range(groups)]
        kept.append(tuple(i for ids in of_groups for i in ids[len(ids) - number // groups :]))
    before = tuple(tuple(sorted(layer.ids)) for layer in layers)
    return PrunePlan(tuple(kept), before, tuple(layer.n_original for layer in layers), disk.model.top_k, {"how": "test"})


def contents(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder's safetensors files, each in the file that the index says."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & found.keys()
        found |= part
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            assert all(weight_map[name] == file.name for name in part)
    return found


def in_memory(path: Path, output: Path, plan: PrunePlan) -> Any:
    """The slow way."""
    model = load(path)
    apply_plan(model, plan)
    export(model, output, [*(PrunePlan.from_dict(p) for p in read_record(path).get("plans", [])), plan], path)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """On copies of the weights: where a file was mapped to in memory decides the last bit of a matrix product."""
    for tensor in [*model.model.parameters(), *model.model.buffers()]:
        tensor.data = tensor.data.clone()
    out: Tensor = model.logits(tokens())
    return out


def same(a: Path, b: Path) -> None:
    """Two exports hold the same tensors, configuration, record and files beside."""
    left, right = contents(a), contents(b)
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)
    for name in ("config.json", "moeprune.json"):
        assert json.loads((a / name).read_text()) == json.loads((b / name).read_text())
    assert {p.name for p in a.iterdir() if p.suffix != ".safetensors"} - {"model.safetensors.index.json"} == {
        p.name for p in b.iterdir() if p.suffix != ".safetensors"
    } - {"model.safetensors.index.json"}
    assert (a / "modeling_moeprune.py").exists() == ("moeprune" in json.loads((a / "config.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_is_what_loading_pruning_and_exporting_gives(family: str, equal: bool, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source")
    assert len(list(source.glob("*.safetensors"))) > 2
    plan = keep(source, [4, 4, 4] if equal else [6, 4, 8])
    done = prune_streaming(source, tmp_path / "streamed", plan, max_shard_size=SHARD)
    model = in_memory(source, tmp_path / "exported", plan)
    same(tmp_path / "streamed", tmp_path / "exported")
    assert done.written == sum(t.numel() * t.element_size() for t in contents(tmp_path / "streamed").values())
    again = load(tmp_path / "streamed")
    assert [layer.ids for layer in again.moe_layers] == list(plan.kept)
    assert torch.equal(logits(again), logits(model))
    # pruned once more, from the pruned folder
    later = keep(tmp_path / "streamed", [4, 4, 4] if not equal else [4, 2, 4])
    prune_streaming(tmp_path / "streamed", tmp_path / "twice", later, max_shard_size=SHARD)
    in_memory(tmp_path / "streamed", tmp_path / "exported twice", later)
    same(tmp_path / "twice", tmp_path / "exported twice")
    assert len(read_record(tmp_path / "twice")["plans"]) == 2
