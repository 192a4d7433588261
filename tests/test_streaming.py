"""Pruning checkpoints on disk: the same as loading, pruning and exporting them, for every family, without loading."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
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
from moeprune.interop.weights import _header as header
from moeprune.pruning.calibration import WEIGHTS, record
from moeprune.pruning.plan import Merge, PrunePlan
from moeprune.pruning.surgery import apply_plan

pytestmark = pytest.mark.filterwarnings("ignore")
SHARD = 40_000  # bytes, so that every checkpoint has several


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))


def saved(
    family: str, folder: Path, shard: int | str = SHARD, dtype: torch.dtype | None = None, **changes: Any
) -> Path:
    """A checkpoint with a tokenizer's file beside it."""
    model = build(family, **changes)
    if dtype is not None:
        model.to(dtype).save_pretrained(folder)
        model = load(folder).model  # some families keep some tensors in float32
        shutil.rmtree(folder)
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
    return PrunePlan(
        tuple(kept), before, tuple(layer.n_original for layer in layers), disk.model.top_k, {"how": "test"}
    )


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


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "ernie4_5_moe", "nemotron_h"])
@pytest.mark.parametrize(
    "numbers", [([4, 4, 4], [4, 2, 4]), ([6, 4, 8], [4, 4, 4])], ids=["equal first", "unequal first"]
)
def test_pruned_twice(family: str, numbers: tuple[list[int], list[int]], tmp_path: Path) -> None:
    """From an earlier export: ids stay those of the first model, also where unequal layers become equal again."""
    source = saved(family, tmp_path / "source")
    prune_streaming(source, tmp_path / "once", keep(source, numbers[0]), max_shard_size=SHARD)
    later = keep(tmp_path / "once", numbers[1])
    prune_streaming(tmp_path / "once", tmp_path / "twice", later, max_shard_size=SHARD)
    in_memory(tmp_path / "once", tmp_path / "exported", later)
    same(tmp_path / "twice", tmp_path / "exported")
    names = json.loads((tmp_path / "twice" / "config.json").read_text())["architectures"]
    assert all(name.startswith("Pruned") == (len(set(later.n_kept)) > 1) for name in names)
    assert len(read_record(tmp_path / "twice")["plans"]) == 2
    assert [list(layer.ids) for layer in load(tmp_path / "twice").moe_layers] == [list(ids) for ids in later.kept]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_the_weights_without_the_model(family: str, tmp_path: Path) -> None:
    """From a checkpoint with unequal layers, whose projections lie in different shards, in bfloat16."""
    source = saved(family, tmp_path / "source", dtype=torch.bfloat16, shard=SHARD // 2)
    prune_streaming(source, tmp_path / "pruned", keep(source, [6, 4, 8]), max_shard_size=SHARD // 4)
    disk = OnDisk(tmp_path / "pruned")
    found = weight_statistics(disk, WEIGHTS)
    expected = record(load(tmp_path / "pruned"), [], WEIGHTS)
    assert found.top_k == expected.top_k
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert (a.ids, a.n_original) == (b.ids, b.n_original)
        for name in WEIGHTS:
            np.testing.assert_allclose(a.stats[name], b.stats[name], rtol=1e-6, atol=0)
    assert all(p.is_meta for p in disk.model.model.parameters())  # what was read is gone


@pytest.mark.parametrize("pruner", ["magnitude", "aimer", "router_norm", "random"])
def test_pruners_that_need_no_data_need_no_model(pruner: str, tmp_path: Path) -> None:
    source = saved("gpt_oss", tmp_path / "source")
    made = create("pruner", pruner, ratio=0.5)
    plan = made.plan(weight_statistics(source, made.needs))
    assert plan.kept == made.plan(record(load(source), [], made.needs)).kept
    assert plan.n_kept == (4, 4, 4)


@pytest.mark.parametrize("needs", ["counts", "g1f1"])
def test_statistics_of_data_are_refused(needs: str, tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    with pytest.raises(UserError, match=f"{needs} cannot be read off the weights"):
        weight_statistics(source, frozenset({needs, "w1"}))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "nemotron_h", "gemma4_text"])
@pytest.mark.parametrize("align", [False, True], ids=["", "aligned"])
def test_merges(family: str, align: bool, tmp_path: Path) -> None:
    """Per-expert and fused storage, interleaved and transposed, with biases, without a gate; ids that are not positions."""
    source = saved(family, tmp_path / "source", dtype=torch.bfloat16)
    prune_streaming(source, tmp_path / "pruned", keep(source, [6, 6, 6]), max_shard_size=SHARD)
    plan = keep(tmp_path / "pruned", [3, 4, 6])
    merges = []
    for before, kept in zip(plan.before, plan.kept, strict=True):
        gone = [i for i in before if i not in kept]
        groups = [Merge(kept[0], (*gone[:2], kept[0]), (0.5, 0.2, 0.3)), Merge(kept[2], (kept[2],), (1.0,))]
        merges.append(tuple(groups) if gone else ())
    plan = replace(plan, merges=tuple(merges), align=align)
    done = prune_streaming(tmp_path / "pruned", tmp_path / "streamed", plan, max_shard_size=SHARD)
    in_memory(tmp_path / "pruned", tmp_path / "exported", plan)
    same(tmp_path / "streamed", tmp_path / "exported")
    assert done.read > done.written  # members beside the survivors
    plain = tmp_path / "without merges"
    prune_streaming(tmp_path / "pruned", plain, replace(plan, merges=()), max_shard_size=SHARD)
    left, right = contents(tmp_path / "streamed"), contents(plain)
    assert 0 < sum(not torch.equal(left[name], right[name]) for name in left) < len(left) / 2


def test_shared_experts_of_the_same_sizes_are_left_alone(tmp_path: Path) -> None:
    """Hidden size, widths of routed and shared experts, and the number of experts are all 8, as are the expert's and layers'."""
    sizes = {"hidden_size": 8, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_hidden_layers": 8}
    source = saved("qwen2_moe", tmp_path / "source", **sizes, num_attention_heads=1, num_key_value_heads=1)
    plan = keep(source, [4] * 8)
    prune_streaming(source, tmp_path / "streamed", plan)
    in_memory(source, tmp_path / "exported", plan)
    same(tmp_path / "streamed", tmp_path / "exported")
    before, after = contents(source), contents(tmp_path / "streamed")
    shared = [name for name in before if "shared_expert" in name]
    assert len(shared) == 8 * 4
    assert all(torch.equal(before[name], after[name]) for name in shared)


def edit(source: Path, change: Any, **config: Any) -> None:
    """Change the tensors of a checkpoint with one shard, and its configuration."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | config))


def test_packed_experts_are_cut_and_not_read(tmp_path: Path) -> None:
    """gpt-oss as it is published: blocks and scales of MXFP4 in place of the fused matrices."""
    source = saved("gpt_oss", tmp_path / "source", shard="1GB", intermediate_size=64)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            E, width, out = tensors.pop(name).shape
            for end, shape in (("blocks", (E, out, width // 32, 16)), ("scales", (E, out, width // 32))):
                tensors[f"{name}_{end}"] = torch.randint(0, 255, shape, dtype=torch.uint8)

    edit(source, pack, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    plan = keep(source, [4, 4, 4])
    prune_streaming(source, tmp_path / "pruned", plan, max_shard_size=SHARD)
    before, after = contents(source), contents(tmp_path / "pruned")
    assert before.keys() == after.keys()
    for name in before:
        experts = "experts" in name or "router" in name
        expected = before[name][list(plan.kept[int(name.split(".")[2])])] if experts else before[name]
        assert torch.equal(after[name], expected)
    with pytest.raises(UserError, match=r"quantised.*unequal size"):
        prune_streaming(source, tmp_path / "unequal", keep(source, [4, 5, 4]))
    with pytest.raises(UserError, match=r"quantised \(model.*_blocks is U8\).*dequantise"):
        weight_statistics(source, frozenset({"w1"}))
    merge = replace(plan, merges=((Merge(7, (0, 7), (0.5, 0.5)),), (), ()))
    with pytest.raises(UserError, match=r"quantised.*the mean of experts unknown"):
        prune_streaming(source, tmp_path / "merged", merge)


def quantised(source: Path, **config: Any) -> None:
    """Make every linear layer's weight 8-bit floating-point numbers with a scale beside it; not the routers'."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[f"{name}_scale_inv"] = torch.rand(2, 2)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit(source, change, quantization_config={"quant_method": "fp8", **config})


def test_scales_beside_the_weights_go_with_their_expert(tmp_path: Path) -> None:
    source = saved("qwen2_moe", tmp_path / "source", shard="1GB")
    quantised(source)
    plan = keep(source, [4, 4, 4])
    prune_streaming(source, tmp_path / "pruned", plan, max_shard_size=SHARD)
    before, after = contents(source), contents(tmp_path / "pruned")
    gone = [name for name in before if any(f".experts.{i}." in name for i in range(4, 8))]
    assert after.keys() == before.keys() - set(gone)
    for name, tensor in after.items():
        layer, _, rest = name.partition(".experts.")
        number, _, kind = rest.partition(".")
        old = f"{layer}.experts.{plan.kept[0][int(number)]}.{kind}" if rest else name
        rows = list(plan.kept[0]) if name.endswith("mlp.gate.weight") else slice(None)
        assert torch.equal(tensor.view(torch.uint8), before[old][rows].view(torch.uint8))
    with pytest.raises(UserError, match="F8_E4M3"):
        weight_statistics(source, frozenset({"w2"}))


def test_a_quantisation_that_names_single_experts_is_refused(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source", shard="1GB")
    quantised(source, modules_to_not_convert=["model.layers.0.mlp.experts.5.down_proj"])
    with pytest.raises(UserError, match=r"names single experts \(model\.layers\.0\.mlp\.experts\.5\.down_proj\)"):
        prune_streaming(source, tmp_path / "pruned", keep(source, [4, 4, 4]))


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        (
            "model.layers.1.mlp.expert_scale",
            (8,),
            "transformers knows no tensor model.layers.1.mlp.expert_scale in Qwen3",
        ),
        ("model.layers.1.mlp.experts.scale", (8,), "transformers knows no tensor"),
        ("model.extra.experts.0.weight", (3,), "transformers knows no tensor"),
        ("model.layers.1.mlp.gate.weight_scale", (8,), "lies beside model.layers.1.mlp.gate.weight"),
        ("model.layers.1.mlp.experts.down_proj_scales", (4,), "one entry per expert"),
        ("model.layers.1.mlp.experts.8.up_proj.weight", (16, 32), "is there for 9 experts, MoE layer 1 has 8"),
    ],
)
def test_what_cannot_be_attributed_is_an_error(name: str, shape: tuple[int, ...], what: str, tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source", shard="1GB")
    edit(source, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(UserError, match=what):
        OnDisk(source)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.1.mlp.gate.weight", "lacks model.layers.1.mlp.gate.weight of MoE layer 1"),
        ("model.layers.1.mlp.experts.3.up_proj.weight", r"mlp.experts.\*.up_proj.weight is there for 7 experts"),
        (".up_proj.weight", "lacks model.layers.0.mlp.experts.gate_up_proj of MoE layer 0, or a part of it"),
    ],
)
def test_what_is_missing_is_an_error(name: str, what: str, tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source", shard="1GB")
    edit(source, lambda tensors: [tensors.pop(each) for each in list(tensors) if each.endswith(name)])
    with pytest.raises(UserError, match=what):
        OnDisk(source)


def test_unknown_tensors_elsewhere_are_copied_and_ignored_ones_left_out(tmp_path: Path) -> None:
    """As transformers loads them: a layer that predicts further tokens has experts of its own, of which it knows nothing."""
    source = saved("qwen3_next", tmp_path / "source", shard="1GB")
    extra = {
        "model.layers.1.self_attn.q_proj.input_scale": torch.ones(1),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2),
        "mtp.layers.0.mlp.gate.weight": torch.ones(8, 2),
    }
    edit(source, lambda tensors: tensors.update(extra))
    done = prune_streaming(source, tmp_path / "pruned", keep(source, [4, 4, 4]), {"step": 7})
    left_out = ("mtp.layers.0.mlp.experts.0.up_proj.weight", "mtp.layers.0.mlp.gate.weight")
    assert tuple(sorted(done.left_out)) == left_out
    found = contents(tmp_path / "pruned")
    assert extra.keys() & found.keys() == extra.keys() - set(left_out)
    provenance = read_record(tmp_path / "pruned")["provenance"]
    assert (provenance["step"], sorted(provenance["left_out"])) == (7, list(left_out))
    load(tmp_path / "pruned")


@pytest.mark.parametrize("refused", [errno.EXDEV, None])
def test_bytes_go_through_memory_where_the_system_does_not_copy(
    refused: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between some file systems, and where there is no such call."""
    source = saved("qwen3_moe", tmp_path / "source")
    plan = keep(source, [4, 4, 4])

    def refuse(*_: Any) -> int:
        raise OSError(refused, "no")

    if refused is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    prune_streaming(source, tmp_path / "pruned", plan, max_shard_size=SHARD)
    in_memory(source, tmp_path / "exported", plan)
    same(tmp_path / "pruned", tmp_path / "exported")


KILLED = """
import os, signal, sys
from moeprune.interop import streaming
from moeprune.pruning.plan import PrunePlan
copy, calls = streaming._copy, 0
def killed(*args):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(*args)
streaming._copy = killed
streaming.prune_streaming(sys.argv[1], sys.argv[2], PrunePlan.load(sys.argv[3]), max_shard_size=40000)
"""


def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    plan, output = keep(source, [4, 4, 4]), tmp_path / "out" / "pruned"
    plan.save(tmp_path / "plan.json")
    call = [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(output), str(tmp_path / "plan.json"), "9"]
    ran = subprocess.run(call, capture_output=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    assert not output.exists()
    (left,) = output.parent.iterdir()
    assert len(list(left.glob("*.safetensors"))) > 1
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    prune_streaming(source, output, plan, max_shard_size=SHARD)
    assert [p.name for p in output.parent.iterdir()] == ["pruned"]
    in_memory(source, tmp_path / "exported", plan)
    same(output, tmp_path / "exported")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "what"),
    [
        (
            OSError(28, "No space left on device"),
            UserError,
            "cannot write .*No space left on device; free space or choose",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
    ids=["disk full", "interrupt"],
)
def test_what_fails_in_the_middle_leaves_everything_as_it_was(
    error: BaseException, raised: Any, what: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    plan, output = keep(source, [4, 4, 4]), tmp_path / "pruned"
    if overwrite:
        output.mkdir()
        (output / "precious.safetensors").write_text("mine")
    calls: list[int] = []
    copy = streaming._copy

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise error
        return copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_copy", fails)
        with pytest.raises(raised, match=what):
            prune_streaming(source, output, plan, overwrite=overwrite, max_shard_size=SHARD)
    assert {p.name for p in tmp_path.iterdir()} == {"source"} | ({"pruned"} if overwrite else set())
    assert not overwrite or [p.name for p in output.iterdir()] == ["precious.safetensors"]
    prune_streaming(source, output, plan, overwrite=overwrite, max_shard_size=SHARD)
    assert not (output / "precious.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"source", "pruned"}


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    plan = keep(source, [4, 4, 4])
    output = tmp_path / "pruned"
    for size in ("5 parsecs", "0", "-3GB", "GB"):
        with pytest.raises(UserError, match="max_shard_size must be"):
            prune_streaming(source, output, plan, max_shard_size=size)
    for where in (source, tmp_path):
        with pytest.raises(UserError, match="holds the source itself"):
            prune_streaming(source, where, plan, overwrite=True)
    two = PrunePlan(plan.kept[:2], plan.before[:2], plan.n_original[:2], plan.top_k)
    with pytest.raises(UserError, match="the plan has 2 layers, the model has 3"):
        prune_streaming(source, output, two)
    with pytest.raises(UserError, match="other experts than layer 0"):
        prune_streaming(source, output, replace(plan, before=plan.kept))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs 0\.00 GB, .* has 0\.00 GB free; free space"):
        prune_streaming(source, output, plan)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder with a transformers checkpoint"):
        OnDisk(tmp_path / "empty")
    shutil.copy(source / "config.json", tmp_path / "empty" / "config.json")
    with pytest.raises(UserError, match=r"holds no model\.safetensors and no index"):
        OnDisk(tmp_path / "empty")
    shard = next(iter(sorted(source.glob("*.safetensors"))))
    whole = shard.read_bytes()
    for broken, what in (
        (whole[:-1], "it ends before its tensors do"),
        (b"junk" * 5, "no safetensors file"),
        (None, "cannot read"),
    ):
        shard.unlink() if broken is None else shard.write_bytes(broken)
        with pytest.raises(UserError, match=what):
            OnDisk(source)


def test_sizes_of_shards() -> None:
    sizes = {
        "5GB": 5 * 10**9,
        "500 MB": 5 * 10**8,
        "1.5kb": 1500,
        "2GiB": 2**31,
        "1T": 10**12,
        "77": 77,
        77: 77,
        "8B": 8,
    }
    assert {size: streaming._bytes_of(size) for size in sizes} == sizes


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    with streaming._scratch(tmp_path / "pruned") as made:
        with pytest.raises(UserError, match="another process is writing"):
            prune_streaming(source, tmp_path / "pruned", keep(source, [4, 4, 4]))
        (made / "mine").write_text("here still")
    assert (tmp_path / "pruned" / "mine").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_entries_are_those_of_index_select(data: st.DataObject) -> None:
    """Any shape, dimension and choice: the ranges, put together, are what the tensor cut in memory holds."""
    import tempfile

    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dim = data.draw(st.integers(0, len(shape) - 1))
    kept = sorted(data.draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1)))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
    limit = data.draw(st.integers(1, 300))
    tensor = torch.randint(0, 100, shape).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.safetensors"
        save_file({"t": tensor, "u": tensor[None].clone()}, file)
        found = {each.name: each for each in header(file)}
        pieces = list(streaming._entries(found["t"], dim, kept, 0, set()))
        raw = file.read_bytes()
        merged = [piece for piece in streaming._runs(iter(pieces)) if isinstance(piece, streaming._Range)]
        cut = b"".join(raw[piece.start : piece.stop] for piece in merged)
        expected = tensor.index_select(dim, torch.tensor(kept)).contiguous()
        assert cut == expected.view(torch.uint8).numpy().tobytes()
        assert all(a.stop != b.start for a, b in pairwise(merged))
        out = streaming._Out("t", found["t"].dtype, tuple(expected.shape), list(pieces))
        shards = streaming._shards([out] * 5, limit)
        assert all(sum(each.size for each in shard) <= limit or len(shard) == 1 for shard in shards)
        assert sum(map(len, shards)) == 5


def test_wide_types_come_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    """Bytes at the end of the first shard would put what follows them in the output where it cannot be read in place."""
    source = saved("minimax_m2", tmp_path / "source", dtype=torch.bfloat16)
    first = min(source.glob("*.safetensors"))
    extra = {"a": torch.zeros(3, dtype=torch.uint8), "zz": torch.ones(2, dtype=torch.float64)}
    save_file(load_file(first) | extra, first, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(extra, first.name)
    index.write_text(json.dumps(listed))
    prune_streaming(source, tmp_path / "pruned", keep(source, [4, 4, 4]))
    stored = header(tmp_path / "pruned" / "model.safetensors")
    assert {each.dtype for each in stored} >= {"U8", "BF16", "F64"}
    assert all(each.start % {"U8": 1, "BF16": 2, "F32": 4, "F64": 8}[each.dtype] == 0 for each in stored)
    with safe_open(tmp_path / "pruned" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("zz").tolist() == [1, 1]


GROWTH = """
import sys
from moeprune.interop.streaming import prune_streaming
from moeprune.pruning.plan import PrunePlan
def peak():
    with open("/proc/self/status") as file:
        return 1024 * int(file.read().partition("VmHWM:")[2].split()[0])
plan = PrunePlan.load(sys.argv[3])
prune_streaming(sys.argv[1], sys.argv[4] + "/small", plan, max_shard_size=sys.argv[5])
before = peak()
prune_streaming(sys.argv[2], sys.argv[4] + "/large", plan, max_shard_size=sys.argv[5])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of 60 MB in shards of 4 MB, after a small one has had the libraries loaded: less than a quarter of a shard more."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "head_dim": 8}
    small, large = saved("qwen3_moe", tmp_path / "small"), saved("qwen3_moe", tmp_path / "large", "4MB", **sizes)
    assert sum(p.stat().st_size for p in large.glob("*.safetensors")) > 60e6
    keep(small, [6, 6, 6]).save(tmp_path / "plan.json")
    call = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        GROWTH,
        *map(str, (small, large, tmp_path / "plan.json", tmp_path / "out")),
        "4MB",
    ]
    ran = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert int(ran.stdout) < 1e6
