"""Calibration beside CerebrasResearch/reap, on the same random models and tokens, in one run.

    git clone https://github.com/CerebrasResearch/reap ../reap
    python benchmarks/peer_reap.py --reap ../reap

Agreement: every criterion that both compute, from the peer's own observer. The peer expects the MoE blocks of an older
transformers (a list of expert modules, router logits in the output), so each block is shown to it in that form; its code runs
unchanged. Time: medians of interleaved rounds against a plain forward pass. Memory: growth of the peak resident size over that of
a plain forward pass, each in a process of its own.

Floor: a plain forward pass computes T K expert rows per layer; running every expert on every token computes T E, E / K times as
many.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moeprune import create
from moeprune.interop.transformers import TransformersModel
from moeprune.pruning.calibration import record

NEEDS = frozenset({"counts", "g0f0", "g0f1", "g1f0", "g1f1", "max_f"})
# criterion of the peer -> ours
CRITERIA = {
    "expert_frequency": "frequency",
    "ean_sum": "ean",
    "ean_mean": "man",
    "weighted_expert_frequency_sum": "seer_soft",
    "weighted_ean_sum": "weighted_ean",
    "reap": "reap",
}


def build(family: str, n_experts: int, width: int, seed: int = 0) -> Any:
    """A random model with spread-out routers."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    count = {"glm4_moe": "n_routed_experts", "mixtral": "num_local_experts"}.get(family, "num_experts")
    extra = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0} if family == "glm4_moe" else {}
    config = CONFIG_MAPPING[family](
        vocab_size=512, hidden_size=width, intermediate_size=width // 2, moe_intermediate_size=width // 2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4, max_position_embeddings=2048, pad_token_id=0,
        num_experts_per_tok=8, **{count: n_experts}, **extra,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "experts" in name and "shared" not in name:
                tensor.normal_(std=0.05)
            elif name.endswith("gate.weight"):
                tensor.normal_(std=0.1)
            elif "correction_bias" in name:
                tensor.uniform_(0, 0.3)
    return model


class _One(nn.Module):
    """Expert `e` of fused ones, as a module of its own."""

    def __init__(self, fused: Any, e: int) -> None:
        super().__init__()
        object.__setattr__(self, "fused", fused)
        self.e = e

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x, self.fused.gate_up_proj[self.e]).chunk(2, -1)
        return nn.functional.linear(self.fused.act_fn(gate) * up, self.fused.down_proj[self.e])


def show_as_before(model: Any) -> None:
    """Give every MoE block the form that the peer's observer hooks."""
    for layer in TransformersModel(model).moe_layers:
        block, fused, router = layer.block, layer.experts, layer.router

        def forward(self: Any, x: torch.Tensor) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            logits, weights, indices = self.router_(flat if not self.three else x)
            out = self.fused_(flat, indices, weights).view_as(x)
            if self.shared_ is not None:
                out = out + self.shared_(x)
            return out, logits.reshape(-1, logits.shape[-1])

        cls = type(type(block).__name__, (nn.Module,), {"forward": forward})
        shown: Any = cls()
        shown.experts = nn.ModuleList(_One(fused, e) for e in range(layer.n_experts))
        for name, value in (
            ("router_", router),
            ("fused_", fused),
            ("shared_", getattr(block, "shared_experts", None)),
        ):
            object.__setattr__(shown, name, value)
        shown.num_experts, shown.top_k, shown.config, shown.three = layer.n_experts, router.top_k, model.config, False
        parent, _, name = layer.where.block.rpartition(".")
        holder = model.get_submodule(parent)

        class Plain(nn.Module):  # the decoder layer wants the hidden states alone
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x)[0]

        setattr(holder, name, Plain(shown))


def peer(model: Any, reap: Path, renormalize: bool) -> Any:
    """The peer's observer on `model`."""
    sys.path.insert(0, str(reap / "src"))
    from reap import observer

    logging.disable(logging.INFO)
    config = observer.OBSERVER_CONFIG_REGISTRY[type(model).__name__]()
    config.record_pruning_metrics_only, config.renormalize_router_weights = True, renormalize
    return observer.MoETransformerObserver(model, config)


def agreement(family: str, reap: Path, renormalize: bool) -> None:
    tokens = torch.randint(1, 512, (4, 129), generator=torch.Generator().manual_seed(1))
    ours = record(TransformersModel(build(family, 32, 64)), [tokens], NEEDS, gate="topk" if renormalize else "softmax")
    model = build(family, 32, 64)
    show_as_before(model)
    watching = peer(model, reap, renormalize)
    with torch.no_grad():
        model(input_ids=tokens[:, :-1], use_cache=False)
    state = watching.report_state()
    errors = {}
    for theirs, mine in CRITERIA.items():
        pairs = [
            (np.asarray(state[i][theirs], dtype=np.float64), create("criterion", mine).score(layer, i))
            for i, layer in enumerate(ours.layers)
        ]
        errors[mine] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    moved = sum(
        float(np.abs(np.asarray(state[i]["expert_frequency"]) - layer.counts).sum()) / 2
        for i, layer in enumerate(ours.layers)
    ) / sum(float(layer.counts.sum()) for layer in ours.layers)
    line = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"  {family:<10} renormalised={renormalize!s:<5} {line}   assignments counted elsewhere: {moved:.1%}")


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def runs(kind: str, n_experts: int, width: int, length: int, reap: Path) -> Any:
    """A function that does one pass of `kind`: plain, ours or peer."""
    model = build("qwen3_moe", n_experts, width)
    tokens = torch.randint(1, 512, (1, length + 1), generator=torch.Generator().manual_seed(1))
    if kind == "peer":
        show_as_before(model)
        watching = peer(model, reap, True)
        del watching

    def once() -> None:
        with torch.no_grad():
            if kind == "ours":
                record(wrapped, [tokens], NEEDS)
            else:
                model(input_ids=tokens[:, :-1], use_cache=False)

    wrapped = TransformersModel(model) if kind == "ours" else None
    return once


def resident(field: str) -> float:
    """MB of this process, from Linux's own account."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def growth(kind: str, n_experts: int, width: int, length: int, reap: Path) -> float:
    """MB by which the peak resident size of a process grows when it does one pass of `kind`."""
    code = [
        __file__,
        "--memory",
        kind,
        "--experts",
        str(n_experts),
        "--width",
        str(width),
        "--length",
        str(length),
        "--reap",
        str(reap),
    ]
    out = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=True).stdout
    return float(json.loads(out.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reap", type=Path, required=True, help="checkout of the peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the one sequence")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--memory", default="")
    options = parser.parse_args()
    if options.memory:
        once = runs(options.memory, options.experts, options.width, options.length, options.reap)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        once()
        print(json.dumps(resident("VmHWM") - before))
        return
    print("largest relative difference of scores, all layers and experts:")
    for family, renormalize in (("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", True), ("glm4_moe", True)):
        agreement(family, options.reap, renormalize)
    print(
        f"\none calibration pass, 2 layers, top-8, D={options.width}, F={options.width // 2}, {options.length} tokens:"
    )
    for n_experts in (64, 128):
        passes = {
            kind: runs(kind, n_experts, options.width, options.length, options.reap)
            for kind in ("plain", "ours", "peer")
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in passes}
        for once in passes.values():
            once()
        for _ in range(options.rounds):
            for kind, once in passes.items():
                seconds[kind].append(timed(once))
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        memory = {kind: growth(kind, n_experts, options.width, options.length, options.reap) for kind in passes}
        print(
            f"  E={n_experts:<4} plain {median['plain']:.3f} s   ours {median['ours'] / median['plain']:.2f} x plain   "
            f"peer {median['peer'] / median['plain']:.2f} x plain   peer / ours {median['peer'] / median['ours']:.1f} x time   "
            f"peak growth: plain {memory['plain']:.0f} MB, ours {memory['ours']:.0f} MB, peer {memory['peer']:.0f} MB"
        )


if __name__ == "__main__":
    main()
