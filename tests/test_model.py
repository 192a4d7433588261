"""The model: pruned equals masked, order of experts does not matter, padding counts for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import moeprune
from moeprune.errors import UserError
from moeprune.model.attention import LocalFilter, LocalizedFilteringAttention
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan

CONFIG = MoEConfig(vocab_size=61, d_model=24, n_layers=3, n_heads=2, n_experts=7, top_k=2, d_expert=10, max_seq_len=16)


def model(seed: int = 0, config: MoEConfig = CONFIG) -> MoETransformer:
    torch.manual_seed(seed)
    made = MoETransformer(config)
    for layer in made.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.5)  # choices that differ from token to token
        torch.nn.init.normal_(layer.experts.down, std=0.3)
    return made.eval()


def tokens(seed: int = 1, B: int = 3, S: int = 16) -> torch.Tensor:
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(seed))


def plan(kept: list[list[int]], n: int = 7) -> PrunePlan:
    return PrunePlan(tuple(map(tuple, kept)), (tuple(range(n)),) * len(kept), (n,) * len(kept), 2)


def masked_logits(whole: MoETransformer, kept: list[list[int]], x: torch.Tensor) -> torch.Tensor:
    """The unpruned model with the logits of the experts not kept at minus infinity."""
    handles = []
    for layer, ids in zip(whole.moe_layers, kept, strict=True):
        gone = torch.tensor([i for i in range(7) if i not in ids], dtype=torch.int64)

        def route(router, args, gone=gone):
            x, mask = args if len(args) == 2 else (args[0], None)
            logits = torch.nn.functional.linear(x, router.weight).index_fill(1, gone, -torch.inf)
            probs = logits.softmax(-1)
            weights, indices = probs.topk(router.top_k, -1)
            return moeprune.model.router.Routing(logits, probs, weights / weights.sum(-1, keepdim=True), indices, mask)

        handles.append(layer.router.register_forward_hook(lambda router, args, out, route=route: route(router, args)))
    with torch.no_grad():
        out = whole(x)
    for handle in handles:
        handle.remove()
    return out


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6), min_size=2, max_size=7), min_size=3, max_size=3), st.integers(0, 1000))
def test_pruned_equals_masked(sets: list[set[int]], seed: int) -> None:
    kept = [sorted(ids) for ids in sets]
    pruned = model(seed)
    apply_plan(pruned, plan(kept))
    assert [list(layer.ids) for layer in pruned.moe_layers] == kept
    with torch.no_grad():
        difference = (pruned(tokens()) - masked_logits(model(seed), kept, tokens())).abs().max()
    assert difference <= 1e-5


def test_nothing_pruned_is_bit_identical() -> None:
    whole, same = model(), model()
    parameters = list(same.parameters())
    apply_plan(same, plan([list(range(7))] * 3))
    assert all(a is b for a, b in zip(parameters, same.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(whole(tokens()), same(tokens()))


def test_order_of_experts_does_not_matter() -> None:
    whole, permuted = model(), model()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    with torch.no_grad():
        for layer in permuted.moe_layers:
            for owner, name, dim in layer.expert_tensors():
                getattr(owner, name).copy_(getattr(owner, name).index_select(dim, order))
        torch.testing.assert_close(permuted(tokens()), whole(tokens()), rtol=0, atol=1e-5)


def test_padding_counts_for_nothing() -> None:
    whole, x = model(), tokens()
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[0, 9:] = mask[2, 4:] = False
    with torch.no_grad():
        logits, routings = whole.forward_with_routing(x, mask)
        plain = whole(x)
        alone = sum(whole.forward_with_routing(x[b : b + 1, :n])[1][1].counts for b, n in ((0, 9), (1, 16), (2, 4)))
    assert torch.equal(logits[mask], plain[mask])  # right padding changes no valid position
    for routing in routings:
        assert routing.counts.sum() == 2 * mask.sum()
    assert torch.equal(routings[1].counts, alone)


def test_tokens_routed_equal_tokens_counted() -> None:
    _, routings = model().forward_with_routing(tokens(B=2, S=11))
    for routing in routings:
        assert routing.counts.tolist() == [(routing.indices == e).sum().item() for e in range(7)]
        assert routing.counts.sum() == 2 * 22


def test_router_is_float32_under_bfloat16() -> None:
    whole = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routings = whole.forward_with_routing(tokens())
    assert all(r.probs.dtype == torch.float32 for r in routings)
    assert logits.isfinite().all()
    with torch.no_grad():
        exact = whole(tokens())
    assert (logits.float() - exact).norm() / exact.norm() < 0.05


def test_single_expert_layer() -> None:
    config = MoEConfig(
        vocab_size=61, d_model=8, n_layers=1, n_heads=2, n_experts=1, top_k=1, d_expert=5, max_seq_len=16
    )
    made = MoETransformer(config)
    made(tokens()).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_grouped_query_attention_equals_repeated_heads() -> None:
    grouped = MoETransformer(replace(CONFIG, d_model=32, n_heads=4, n_kv_heads=2))
    full = MoETransformer(replace(CONFIG, d_model=32, n_heads=4))
    state = grouped.state_dict()
    for name in [n for n in state if "qkv" in n]:
        q, k, v = state[name].split([32, 16, 16])
        state[name] = torch.cat([q, *(t.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for t in (k, v))])
    full.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(full(tokens()), grouped(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["standard", "lfa"])
def test_causal(attention: str) -> None:
    whole, x = model(config=replace(CONFIG, attention=attention)), tokens()
    with torch.no_grad():
        for layer in whole.modules():
            if isinstance(layer, LocalFilter):  # not a whisper beside the residual
                for parameter in layer.parameters():
                    parameter.normal_(std=0.5)
        before = whole(x)
        for t in range(16):
            changed = x.clone()
            changed[:, t] = (changed[:, t] + 1) % 61
            after = whole(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
            assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize(("S", "D"), [(1, 2), (2, 6), (9, 4)])
def test_local_filter_is_two_causal_convolutions(S: int, D: int) -> None:
    made = LocalFilter(D, 1e-6).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, S, D, dtype=torch.float64)
    inner = torch.zeros(3, S + 1, D // 2, dtype=torch.float64)  # one zero in front
    padded = torch.cat([torch.zeros(3, 1, D, dtype=torch.float64), x], 1)
    outer = torch.zeros(3, S, D, dtype=torch.float64)
    for t in range(S):
        inner[:, t + 1] = (
            padded[:, t] @ made.narrow.weight[:, :D].T
            + padded[:, t + 1] @ made.narrow.weight[:, D:].T
            + made.narrow.bias
        ).detach()
        outer[:, t] = (
            inner[:, t] @ made.widen.weight[:, : D // 2].T
            + inner[:, t + 1] @ made.widen.weight[:, D // 2 :].T
            + made.widen.bias
        ).detach()
    expected = x + outer
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * made.norm.weight
    torch.testing.assert_close(made(x), expected)
    for layer, size in ((made.narrow, D), (made.widen, D // 2)):  # the same as torch's own convolution
        kernel = torch.stack([layer.weight[:, :size], layer.weight[:, size:]], -1)
        y = torch.randn(3, S, size, dtype=torch.float64)
        shifted = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        torch.testing.assert_close(
            layer(torch.cat([shifted, y], -1)),
            F.conv1d(F.pad(y.mT, (1, 0)), kernel, layer.bias).mT,
        )


def test_lfa_filters_queries_and_keys_and_not_values() -> None:
    """Standard attention on the filtered input, with values taken from the plain one."""
    config = replace(CONFIG, d_model=32, n_heads=4, n_kv_heads=2, attention="lfa")
    lfa = LocalizedFilteringAttention(config)
    x = torch.randn(2, 5, 32)
    filtered, plain = lfa.qkv(lfa.filter(x)), lfa.qkv(x)
    torch.testing.assert_close(lfa.project(x)[..., :48], filtered[..., :48])
    torch.testing.assert_close(lfa.project(x)[..., 48:], plain[..., 48:])
    whole = MoETransformer(config)
    logits = whole(tokens())
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in whole.blocks[0].attention.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mixed = whole(tokens()).float()
    assert (mixed - logits).norm() / logits.norm() < 0.05


def test_standard_attention_is_the_default_and_has_no_filter() -> None:
    """Checkpoints from before there was a choice load as they are."""
    old = CONFIG.to_dict()
    del old["attention"]
    assert MoEConfig.from_dict(old) == CONFIG
    names = {name.partition(".attention.")[2] for name in model().state_dict() if ".attention." in name}
    assert names == {"qkv.weight", "out.weight"}


def test_expert_tensors_are_tensors() -> None:
    for options in ({}, {"selection_bias": True}):
        layer = model(config=replace(CONFIG, router_options=options)).moe_layers[0]
        found = {name: getattr(owner, name) for owner, name, _ in layer.expert_tensors()}
        assert ("selection_bias" in found) == bool(options)
        assert all(tensor.shape[0] == 7 for tensor in found.values())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_k", 8, "top_k=8"),
        ("n_heads", 5, "n_heads=5"),
        ("n_experts", 0, "n_experts"),
        ("router", "softmx", "softmax"),
        ("n_kv_heads", 3, "n_kv_heads=3"),
        ("attention", "lfs", "no attention 'lfs'; did you mean 'lfa'.*known: standard, lfa"),
        ("attention", None, "no attention 'None'"),
    ],
)
def test_bad_config(field: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        MoETransformer(replace(CONFIG, **{field: value}))


def test_too_long_sequence() -> None:
    with pytest.raises(UserError, match="max_seq_len=16"):
        model()(tokens(S=17))


def test_config_round_trip() -> None:
    assert MoEConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(UserError, match="n_experts"):
        MoEConfig.from_dict({"n_expert": 3})


def test_plan_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="layer 0"):
        apply_plan(model(), plan([[0, 1]] * 3, n=6))
    with pytest.raises(UserError, match="2 layers"):
        apply_plan(model(), plan([[0, 1]] * 2))


def test_prune_twice_composes() -> None:
    first = plan([[0, 2, 3, 5], [1, 2, 3], [0, 1, 2, 3, 4]])
    second = PrunePlan(((0, 3), (1, 2, 3), (1, 2, 4)), first.kept, first.n_original, 2)
    twice, once = model(), model()
    apply_plan(twice, first)
    apply_plan(twice, second)
    apply_plan(once, first.then(second))
    with torch.no_grad():
        assert torch.equal(twice(tokens()), once(tokens()))


def test_evidence_is_not_tied_to_the_callers_list() -> None:
    counts = [[1, 2, 3]]
    evidence = Evidence.from_counts(counts)
    counts[0][0] = 100
    assert evidence.layers[0].counts.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        evidence.layers[0].counts[0] = 5
