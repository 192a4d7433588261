"""Pruning a checkpoint on disk against copying as many bytes as are kept, and its memory.

    python benchmarks/streaming.py [--gigabytes 4] [--shard-mb 500] [--rounds 5] [--folder /tmp] [--quick] [--json PATH]

(3 min and 7 GB of disk; 1 GB in 45 s with --quick.) A Qwen3-MoE checkpoint of random bfloat16 (64 experts of three 1 MB matrices per
layer) is written once, and beside it one with three quarters of the experts. Every round, in random order: `prune_streaming` of a
quarter of the experts of the first, in a process of its own, its libraries imported and Python's garbage from that collected; `cp` of
the second; `cp` and then `sync` of the copied files, which is what pruning does as well: it does not return before its output is on
the disk. The system's dirty pages are written out before every measurement; the sources are in its cache. Wall seconds, ratios round
by round. Floor: every kept byte read once and written once, nothing else. Targets: 1.5 x the copy, peak resident memory of the
pruning process, all libraries included, below two shards.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import arguments, quartiles, ratios, report, row
from safetensors.torch import save_file

from moeprune.interop.streaming import prune_streaming
from moeprune.interop.transformers import on_meta
from moeprune.interop.weights import OnDisk
from moeprune.pruning.plan import PrunePlan

EXPERTS, HIDDEN, WIDTH = 64, 1024, 512
LAYER = EXPERTS * 3 * HIDDEN * WIDTH * 2  # bytes


def write(folder: Path, n_layers: int, n_experts: int, shard: int) -> None:
    """The checkpoint, in shards of about `shard` bytes."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=n_experts, num_experts_per_tok=8,
        num_hidden_layers=n_layers, num_attention_heads=16, num_key_value_heads=4, head_dim=64, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in on_meta(config).state_dict().items():
        base, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i in range(n_experts):
                shapes |= {f"{base}.{i}.{kind}.weight": (WIDTH, HIDDEN) for kind in ("gate_proj", "up_proj")}
        elif last == "down_proj" and base.endswith("experts"):
            shapes |= {f"{base}.{i}.down_proj.weight": (HIDDEN, WIDTH) for i in range(n_experts)}
        else:
            shapes[name] = tuple(tensor.shape)
    noise = torch.randn(32 << 20).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + size > shard:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    weight_map = {}
    for number, part in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in part.items():
            size = torch.Size(shape).numel()
            start = random.randrange(len(noise) - size)
            tensors[name] = noise[start : start + size].view(shape).clone()
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def prune(source: Path, output: Path, shard: int) -> None:
    """What the process of its own does; prints one line of JSON."""
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    importlib.import_module("transformers.models.auto.modeling_auto")
    gc.collect()
    gc.freeze()
    os.sync()
    began = time.perf_counter()
    disk = OnDisk(source)
    n_layers = len(disk.model.moe_layers)
    kept = tuple(i for i in range(EXPERTS) if i % 4)
    plan = PrunePlan((kept,) * n_layers, (tuple(range(EXPERTS)),) * n_layers, (EXPERTS,) * n_layers, 8)
    opened = time.perf_counter()
    done = prune_streaming(disk, output, plan, max_shard_size=shard, progress=False)
    ended = time.perf_counter()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's, if that was larger
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    found = {"seconds": ended - began, "open": opened - began, "peak": peak, "read": done.read, "written": done.written}
    print(json.dumps(found))


def main() -> None:
    """Write, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, help="4, or 1 with --quick")
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--prune", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shard = options.shard_mb * 10**6
    if options.prune:
        prune(*options.prune, shard)
        return
    gigabytes = options.gigabytes or (1 if options.quick else 4)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="streaming-") as scratch:
        source, output, kept = (Path(scratch) / name for name in ("source", "pruned", "kept"))
        n_layers = max(1, round(gigabytes * 1e9 / LAYER))
        write(source, n_layers, EXPERTS, shard)
        write(kept, n_layers, EXPERTS * 3 // 4, shard)
        call = [sys.executable, __file__, f"--shard-mb={options.shard_mb}", "--prune", str(source)]
        seconds: dict[str, list[float]] = {"cp": [], "cp, sync": [], "prune": []}
        peaks, opened, found = [], [], {}
        for _ in range(options.rounds):
            for what in random.sample(list(seconds), 3):
                os.sync()
                began = time.perf_counter()
                if what == "prune":
                    ran = subprocess.run([*call, str(output)], check=True, capture_output=True, text=True)
                    found = json.loads(ran.stdout)
                    seconds[what].append(found["seconds"])
                    opened.append(found["open"])
                    peaks.append(found["peak"])
                else:
                    subprocess.run(["cp", "-r", str(kept), str(output)], check=True)
                    if what == "cp, sync":
                        subprocess.run(["sync", *map(str, output.iterdir())], check=True)
                    seconds[what].append(time.perf_counter() - began)
                shutil.rmtree(output)
    case = f"{found['read'] / 1e9:.1f} GB kept of {n_layers * LAYER / 1e9:.1f} GB"
    over = {what: ratios(seconds["prune"], seconds[what]) for what in ("cp", "cp, sync")}
    rows = [
        row("streaming surgery / cp and sync", case, over["cp, sync"], 1.5),
        row("streaming surgery / cp into the page cache", case, over["cp"], 1.5),
        row(
            "streaming surgery, peak memory / shard",
            f"{case}, shards of {options.shard_mb} MB",
            [p / shard for p in peaks],
            2,
        ),
        row(
            "streaming surgery",
            f"{case}; {quartiles(opened)[1]:.2f} s of it finding tensors",
            seconds["prune"],
            None,
            "seconds",
        ),
    ]
    rows += [row(what, case, seconds[what], None, "seconds") for what in over]
    report(rows, options)


if __name__ == "__main__":
    main()
