"""A training step of a 41 M model against its floor and against a transformers model of the same shape, in one process.

    python benchmarks/training_step.py [--quick] [--json PATH] [--rounds N] [--allocator kept|glibc]

Model: 6 layers, D 256, 8 heads, 32 experts of width 256, top-4, vocabulary 4096: 41.4 M parameters, 7.6 M of them used by a token.
A step is forward, cross-entropy, backward, AdamW. Tokens are drawn anew for every step; both models see the same.

Floor: dense matrix products of the same FLOPs, forward and backward: 7.4 M multiply-adds per token forward (experts 4.7 M,
attention's projections 1.6 M, head 1.0 M), twice that backward; 181 GFLOP for 16 x 256 tokens, 11 for 2 x 128. Bytes: the
optimizer reads and writes parameters, gradients and two moments, 28 bytes per parameter or 1.2 GB a step, which is most of what
a step of 2 x 128 tokens does besides.

Peer: Qwen3-MoE of transformers with its grouped_mm experts, scaled_dot_product_attention and no auxiliary loss, under the same
fused AdamW, the same cross-entropy and the same allocator (see experts.py). One thread, CPU time, ratios of steps of the same round,
in random order.

"Experts at the limit": an expert layer replaced by dense products of its FLOPs, with no dispatch and no activation, and the
weights' gradients written: what no expert layer can beat, so what everything else in the step leaves.

--quick: 2 minutes. Otherwise about 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench import Row, arguments, interleave, ratios, report, row
from experts import keep_freed_memory
from torch import Tensor, nn

from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan
from moeprune.training.module import sequence_losses

L, D, WIDTH, E, K, V, HEADS = 6, 256, 256, 32, 4, 4096, 8
SHAPES = {(16, 256): 0.87, (2, 128): 0.92}  # (sequences, tokens of each): target against transformers
Step = Callable[[], None]


def ours(max_seq_len: int, backend: str = "blocks") -> MoETransformer:
    """The model, in the form of Qwen3-MoE."""
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=V,
        d_model=D,
        n_layers=L,
        n_heads=HEADS,
        n_experts=E,
        top_k=K,
        d_expert=WIDTH,
        max_seq_len=max_seq_len,
        qk_norm="head",
        head_bias=False,
        expert_backend=backend,
    )
    return MoETransformer(config).train()


def theirs(max_seq_len: int, n_experts: int = E) -> nn.Module:
    """Its counterpart in transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D // HEADS,
        moe_intermediate_size=WIDTH,
        num_experts=n_experts,
        num_experts_per_tok=K,
        norm_topk_prob=True,
        max_position_embeddings=max_seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        output_router_logits=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = Qwen3MoeForCausalLM(config).train()
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    return model


def step_of(model: nn.Module, logits: Callable[[Tensor], Tensor], batches: Iterator[Tensor]) -> Step:
    """One step on the next batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        tokens = next(batches)
        loss = sequence_losses(logits(tokens[:, :-1]), tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_of(T: int) -> Step:
    """The matrix products of T tokens, outputs allocated beforehand."""
    shapes = [(T * K, 2 * WIDTH, D), (T * K, D, WIDTH), (T, 3 * D, D), (T, D, D)]
    per_layer = [tuple(torch.randn(*size) for size in ((m, k), (n, k), (m, n), (n, k))) for m, n, k in shapes]
    head = tuple(torch.randn(*size) for size in ((T, D), (V, D), (T, V), (V, D)))

    def products(x: Tensor, w: Tensor, y: Tensor, dw: Tensor) -> None:
        torch.mm(x, w.t(), out=y)
        torch.mm(y.t(), x, out=dw)
        torch.mm(y, w, out=x)
        x.clamp_(-1, 1)  # numbers stay numbers

    def run() -> None:
        for operands in itertools.chain(per_layer * L, [head]):
            products(*operands)

    return run


class _Products(torch.autograd.Function):
    """Nothing of an expert layer but its matrix products, as dense ones, and the weights' gradients written once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(weights, gate_up, down)
        xs, gu, h, y = ctx.buffers = [torch.ones(weights.numel(), n) for n in (D, 2 * WIDTH, WIDTH, D)]
        torch.mm(xs, gate_up[0].t(), out=gu)
        torch.mm(h, down[0].t(), out=y)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        weights, gate_up, down = ctx.saved_tensors
        xs, gu, h, y = ctx.buffers
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for a, b, d_a, d_b in ((xs, gu, d_gate_up, gate_up), (h, y, d_down, down)):
            torch.mm(b.t(), a, out=d_a[0])
            torch.mm(b, d_b[0], out=a)
        return grads[0], torch.zeros_like(weights), d_gate_up, d_down


def no_more_than_products(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """An expert layer at its limit; its result means nothing."""
    out: Tensor = _Products.apply(x, weights, gate_up, down)  # type: ignore[no-untyped-call]
    return out


def pruned(model: MoETransformer, n: int) -> MoETransformer:
    """The model with the first `n` experts of each layer."""
    layers = model.moe_layers
    everything = tuple(layer.ids for layer in layers)
    apply_plan(model, PrunePlan(tuple(ids[:n] for ids in everything), everything, (E,) * L, K))
    return model


def of_shape(B: int, S: int, rounds: int, with_pruned: bool) -> list[Row]:
    """Ours with both backends, the floor, the peer; and ours and the peer with two thirds of the experts."""
    g = torch.Generator().manual_seed(0)
    batches = iter(itertools.tee(iter(lambda: torch.randint(V, (B, S + 1), generator=g), None), 6))
    model, compiled, limit, peer = ours(S), ours(S, "compiled"), ours(S), theirs(S)
    for layer in limit.moe_layers:
        layer.experts.backend = no_more_than_products
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, peer)]
    assert sizes[0] == sizes[1], sizes
    calls = {
        "blocks": step_of(model, model, next(batches)),
        "compiled": step_of(compiled, compiled, next(batches)),
        "experts at the limit": step_of(limit, limit, next(batches)),
        "transformers": step_of(peer, lambda tokens: peer(input_ids=tokens).logits, next(batches)),
        "floor": floor_of(B * S),
    }
    n = 21
    if with_pruned:
        small, small_peer = pruned(ours(S), n), theirs(S, n)
        calls["pruned"] = step_of(small, small, next(batches))
        calls["transformers pruned"] = step_of(
            small_peer, lambda tokens: small_peer(input_ids=tokens).logits, next(batches)
        )
    seconds = interleave(calls, rounds, warm=3)
    rows = []
    for backend in ("blocks", "compiled", "experts at the limit"):
        case = f"{B} x {S} tokens, float32, {backend}"
        target = None if backend == "experts at the limit" else SHAPES[B, S]
        rows += [
            row("training step / transformers", case, ratios(seconds[backend], seconds["transformers"]), target),
            row("training step / dense products", case, ratios(seconds[backend], seconds["floor"])),
        ]
    if with_pruned:
        case = f"{B} x {S} tokens, float32, blocks"
        against = ratios(seconds["pruned"], seconds["transformers pruned"])
        rows.append(row("training step / transformers", f"{case}, {n} of {E} experts", against, SHAPES[B, S]))
        less = ratios(seconds["pruned"], seconds["blocks"])
        rows.append(row(f"training step with {n} of {E} experts / with all", case, less))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="of 16 x 256 tokens; 2 x 128 tokens run three times as many")
    parser.add_argument("--allocator", choices=("kept", "glibc"), default="kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.allocator == "kept":
        keep_freed_memory()
    rounds = options.rounds or (4 if options.quick else 15)
    rows = of_shape(16, 256, rounds, with_pruned=not options.quick)
    rows += of_shape(2, 128, 3 * rounds, with_pruned=True)
    report(rows, options)


if __name__ == "__main__":
    main()
