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

--quick: 80 s. Otherwise about 4 minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

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


def ours(max_seq_len: int) -> MoETransformer:
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


def pruned(model: MoETransformer, n: int) -> MoETransformer:
    """The model with the first `n` experts of each layer."""
    layers = model.moe_layers
    everything = tuple(layer.ids for layer in layers)
    apply_plan(model, PrunePlan(tuple(ids[:n] for ids in everything), everything, (E,) * L, K))
    return model


def of_shape(B: int, S: int, rounds: int, with_pruned: bool) -> list[Row]:
    """Ours, the floor, the peer; and both with two thirds of the experts."""
    g = torch.Generator().manual_seed(0)
    batches = itertools.tee(iter(lambda: torch.randint(V, (B, S + 1), generator=g), None), 4)
    model, peer = ours(S), theirs(S)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, peer)]
    assert sizes[0] == sizes[1], sizes
    calls = {
        "ours": step_of(model, model, batches[0]),
        "transformers": step_of(peer, lambda tokens: peer(input_ids=tokens).logits, batches[1]),
        "floor": floor_of(B * S),
    }
    n = 21
    if with_pruned:
        small, small_peer = pruned(ours(S), n), theirs(S, n)
        calls["pruned"] = step_of(small, small, batches[2])
        calls["transformers pruned"] = step_of(
            small_peer, lambda tokens: small_peer(input_ids=tokens).logits, batches[3]
        )
    seconds = interleave(calls, rounds)
    case = f"{B} x {S} tokens, float32"
    rows = [
        row("training step / transformers", case, ratios(seconds["ours"], seconds["transformers"]), SHAPES[B, S]),
        row("training step / dense products", case, ratios(seconds["ours"], seconds["floor"])),
    ]
    if with_pruned:
        against = ratios(seconds["pruned"], seconds["transformers pruned"])
        rows.append(row("training step / transformers", f"{case}, {n} of {E} experts", against, SHAPES[B, S]))
        less = ratios(seconds["pruned"], seconds["ours"])
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
