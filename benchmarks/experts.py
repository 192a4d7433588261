"""The expert layer, forward and backward, against its floor and against peers, in one process, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/experts.py [--size A] [--rounds 15] [--dtype float32]

Floor: a dense matrix product of the same FLOPs (6 T K D F multiply-adds forward, 12 T K D F backward), nothing else.
Peers: torch's grouped_mm under plain autograd; transformers' best expert backend, if transformers is installed.
Routing is drawn anew for every round, uniform or Zipf; every round runs all implementations in random order on the same
routing. Printed: median time over the floor's median in the same round, with quartiles.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moeprune.compare.results import quartiles
from moeprune.model.experts import grouped_swiglu

SIZES = {"A": (2048, 256, 256, 32, 4), "B": (4096, 512, 512, 64, 8), "C": (8192, 256, 128, 64, 2)}  # T, D, F, E, K
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def grouped_mm(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sorted tokens, torch.nn.functional.grouped_mm, plain autograd."""
    order = indices.flatten().argsort(stable=True)
    token = order // indices.shape[1]
    ends = torch.bincount(indices.flatten(), minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x.index_select(0, token), gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    h = F.silu(gate) * up * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, F.grouped_mm(h, down.transpose(1, 2), offs=ends))


def transformers_layer(E: int, D: int, width: int, K: int) -> Layer | None:
    """Qwen3-MoE experts of transformers with its grouped_mm backend; None if transformers is not installed."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=width, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config)

    def layer(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        module.gate_up_proj, module.down_proj = gate_up, down  # type: ignore[assignment]
        return module(x, indices, weights)  # type: ignore[no-any-return]

    return layer


def dense(S: int, D: int, width: int, dtype: torch.dtype) -> Callable[[], None]:
    """The six matrix products of the floor, outputs allocated beforehand."""
    x, h, y = torch.randn(S, D, dtype=dtype), torch.randn(S, width, dtype=dtype), torch.randn(S, D, dtype=dtype)
    gu, a, b = (
        torch.randn(S, 2 * width, dtype=dtype),
        torch.randn(2 * width, D, dtype=dtype),
        torch.randn(D, width, dtype=dtype),
    )
    d_a, d_b = torch.empty_like(a), torch.empty_like(b)

    def run() -> None:
        torch.mm(x, a.t(), out=gu)
        torch.mm(h, b.t(), out=y)
        torch.mm(y, b, out=h)
        torch.mm(y.t(), h, out=d_b)
        torch.mm(gu, a, out=x)
        torch.mm(gu.t(), x, out=d_a)

    return run


def route(T: int, E: int, K: int, zipf: float) -> Tensor:
    """[T, K] experts, without repetition, drawn with probabilities proportional to rank^-zipf."""
    weight = torch.arange(1, E + 1).float() ** -zipf
    return torch.multinomial(weight.expand(T, E), K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="A")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    T, D, width, E, K = SIZES[args.size]
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weights = (torch.rand(T, K) / K).to(dtype).requires_grad_()
    gate_up = torch.nn.Parameter((torch.randn(E, 2 * width, D) * D**-0.5).to(dtype))
    down = torch.nn.Parameter((torch.randn(E, D, width) * width**-0.5).to(dtype))
    upstream = torch.randn(T, D, dtype=dtype)
    layers: dict[str, Layer] = {"moeprune grouped_swiglu": grouped_swiglu, "torch grouped_mm, autograd": grouped_mm}
    peer = transformers_layer(E, D, width, K)
    if peer is not None:
        layers["transformers grouped_mm"] = peer
    floor = dense(T * K, D, width, dtype)
    print(
        f"size {args.size}: T={T} D={D} F={width} E={E} K={K}, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )
    for load, zipf in (("uniform", 0.0), ("Zipf", 1.0)):
        times: dict[str, list[float]] = {name: [] for name in ("floor", *layers)}
        for turn in range(args.rounds + 2):
            indices = route(T, E, K, zipf)
            for name in random.Random(turn).sample(list(times), len(times)):
                for tensor in (x, weights, gate_up, down):
                    tensor.grad = None
                began = time.perf_counter()
                if name == "floor":
                    floor()
                else:
                    layers[name](x, indices, weights, gate_up, down).backward(upstream)
                if turn >= 2:
                    times[name].append(time.perf_counter() - began)
        print(f"{load} load; floor {1e3 * quartiles(times['floor'])['median']:.1f} ms")
        for name in layers:
            q = quartiles([a / b for a, b in zip(times[name], times["floor"], strict=True)])
            print(f"  {name:<28} {q['median']:.2f} x floor ({q['q1']:.2f} to {q['q3']:.2f})")


if __name__ == "__main__":
    main()
