"""Routers against slow references in loops, through surgery, checkpoints and training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune import checkpoints, registry
from moeprune.cli import main
from moeprune.errors import UserError
from moeprune.files import read_rows
from moeprune.model.config import MoEConfig
from moeprune.model.router import Router
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan, only
from moeprune.testing import masked
from moeprune_plugins.routers import attention as attention_module

ROOT = Path(__file__).parent.parent
INF = math.inf

# Every built-in router, with options that fit 12 experts and top-2, 3 or 4.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "softmax-raw": ("softmax", {"renormalize": False}),
    "softmax-bias": ("softmax", {"selection_bias": True}),
    "sigmoid": ("sigmoid", {}),
    "sigmoid-raw": ("sigmoid", {"renormalize": False, "scale": 2.5}),
    "sigmoid-groups": ("sigmoid", {"n_groups": 4, "top_groups": 2, "scale": 1.5}),
    "sigmoid-single-groups": ("sigmoid", {"n_groups": 12, "top_groups": 5}),
    "attention": ("attention", {}),
}
E, D = 12, 10
each_case = pytest.mark.parametrize("case", CASES)


def make(case: str, E: int = E, K: int = 2, D: int = D, seed: int = 0) -> Router:
    """A router whose choices differ from token to token, with a bias where it takes one."""
    name, options = CASES[case]
    torch.manual_seed(seed)
    router: Router = registry.create("router", name, d_model=D, n_experts=E, top_k=K, **options)
    liven(router)
    return router


def liven(router: Router) -> None:
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.5)
        if getattr(router, "selection_bias", None) is not None:
            router.selection_bias.normal_(std=0.2)


def tokens(T: int, D: int = D, seed: int = 1) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def test_every_registered_router_has_a_case() -> None:
    built_in = {entry.name for entry in registry.entries("router") if entry.distribution == "moeprune"}
    assert {name for name, _ in CASES.values()} == built_in


# -- slow references, one token at a time, in Python's floats ----------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def sigmoid(v: float) -> float:
    return 0.0 if v == -INF else 1 / (1 + math.exp(-v))


def highest(values: list[float], n: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: values[i], reverse=True)[:n]


def reference_logits(router: Router, x: list[float]) -> list[float]:
    def rows(weight: torch.Tensor) -> list[float]:
        return [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight.tolist()]

    if not hasattr(router, "query"):
        return rows(router.weight)
    q, k, v = rows(router.query), rows(router.key), rows(router.value)
    return [sum(a * value for a, value in zip(softmax([qi * kj for kj in k]), v, strict=True)) for qi in q]


def reference_choice(case: str, router: Router, logits: list[float]) -> tuple[list[float], list[int], list[float]]:
    """Probabilities, chosen experts, their weights."""
    name, options = CASES[case]
    n, K = len(logits), router.top_k
    bias = router.selection_bias.tolist() if getattr(router, "selection_bias", None) is not None else [0.0] * n
    if name == "attention":
        chosen = highest(logits, K)
        return softmax(logits), chosen, softmax([logits[i] for i in chosen])
    if name == "softmax":
        probs = scores = softmax(logits)
    else:
        scores = [sigmoid(v) for v in logits]
        probs = [s / sum(scores) for s in scores]
    biased = [-INF if logit == -INF else s + b for logit, s, b in zip(logits, scores, bias, strict=True)]
    groups, allowed = options.get("n_groups", 1), set(range(n))
    if groups > 1:
        size = n // groups
        worth = []
        for g in range(groups):
            best = [v for v in sorted(biased[g * size : (g + 1) * size], reverse=True)[:2] if v > -INF]
            worth.append(sum(best) if best else -INF)
        allowed = {g * size + i for g in highest(worth, options["top_groups"]) for i in range(size)}
    chosen = highest([v if i in allowed else -INF for i, v in enumerate(biased)], K)
    weights = [scores[i] for i in chosen]
    if options.get("renormalize", True):
        weights = [w / sum(weights) for w in weights]
    return probs, chosen, [w * options.get("scale", 1.0) for w in weights]


@each_case
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(1, 4), gone=st.sets(st.integers(0, E - 1), max_size=4))
def test_choose_equals_the_loops(case: str, seed: int, K: int, gone: set[int]) -> None:
    router = make(case, K=K, seed=seed)
    logits = torch.randn(5, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    reachable = CASES[case][1].get("top_groups", 1) * E // CASES[case][1].get("n_groups", 1)
    if reachable - len(gone) >= K:
        logits[:, sorted(gone)] = -INF
    probs, weights, indices = router.choose(logits)
    for t in range(5):
        expected = reference_choice(case, router, logits[t].tolist())
        assert indices[t].tolist() == expected[1]
        torch.testing.assert_close(probs[t].tolist(), expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights[t].tolist(), expected[2], rtol=1e-12, atol=1e-12)


@each_case
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 9), D=st.sampled_from([1, 3, 10]))
def test_logits_equal_the_loops(case: str, seed: int, T: int, D: int) -> None:
    router = make(case, D=D, seed=seed)
    x = tokens(T, D, seed)
    expected = torch.tensor([reference_logits(router, row) for row in x.tolist()])
    torch.testing.assert_close(router.logits(x), expected, rtol=1e-4, atol=1e-4)


# -- what every router promises -----------------------------------------------------------------------------------------


@each_case
def test_float32_under_mixed_precision(case: str) -> None:
    router, x = make(case), tokens(40)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = router(x)
    for field in ("logits", "probs", "weights"):
        assert getattr(mixed, field).dtype == torch.float32
        assert torch.equal(getattr(mixed, field), getattr(plain, field))
    assert torch.equal(mixed.indices, plain.indices)
    half = router.bfloat16()(x.bfloat16())
    assert half.logits.dtype == half.probs.dtype == half.weights.dtype == torch.float32


@each_case
def test_permuting_experts_permutes(case: str) -> None:
    router, x = make(case, K=3), tokens(40)
    n_groups = router.n_groups
    groups = torch.randperm(n_groups, generator=torch.Generator().manual_seed(2)).tolist()
    size = E // n_groups
    inner = [torch.randperm(size, generator=torch.Generator().manual_seed(g)) for g in range(n_groups)]
    order = torch.cat([inner[g] + g * size for g in groups])  # groups move, experts within a group move
    permuted = copy.deepcopy(router)
    with torch.no_grad():
        for name, dim in router.expert_dims.items():
            if getattr(router, name) is not None:
                getattr(permuted, name).copy_(getattr(router, name).index_select(dim, order))
    before, after = router(x), permuted(x)
    torch.testing.assert_close(after.probs, before.probs[:, order])
    assert torch.equal(order[after.indices], before.indices)
    torch.testing.assert_close(after.weights, before.weights)


@each_case
def test_gradients(case: str) -> None:
    router = make(case, K=3)
    logits = torch.randn(4, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: router.choose(z)[:2], (logits,))
    routing = router(tokens(40))
    (routing.weights[:, 0].sum() + routing.probs[:, 0].sum()).backward()
    for parameter in router.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
    assert "selection_bias" not in dict(router.named_parameters())


@each_case
def test_ties_and_all_experts_chosen(case: str) -> None:
    router = make(case, K=3)
    if getattr(router, "selection_bias", None) is not None:
        router.selection_bias.zero_()
    probs, weights, indices = router.choose(torch.zeros(7, E))
    torch.testing.assert_close(probs, torch.full((7, E), 1 / E))
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert (weights == weights[:, :1]).all()
    name, options = CASES[case]
    if options.get("renormalize", True):
        torch.testing.assert_close(weights.sum(1), torch.full((7,), options.get("scale", 1.0)))
    options = {key: value for key, value in options.items() if key not in ("n_groups", "top_groups")}
    for n in (1, 5):
        every = registry.create("router", name, d_model=D, n_experts=n, top_k=n, **options)
        routing = every(tokens(6))
        assert routing.indices.sort(1).values.tolist() == [list(range(n))] * 6
        torch.testing.assert_close(routing.probs.sum(1), torch.ones(6))
        if options.get("renormalize", True):
            torch.testing.assert_close(routing.weights.sum(1), torch.full((6,), options.get("scale", 1.0)))


@each_case
def test_minus_infinity_is_never_chosen(case: str) -> None:
    router = make(case, K=3)
    gone = [0, 4, 5, 11]
    if getattr(router, "selection_bias", None) is not None:
        router.selection_bias[gone] = 100.0
    logits = torch.randn(200, E, generator=torch.Generator().manual_seed(0)) * 10
    logits[:, gone] = -INF
    probs, weights, indices = router.choose(logits)
    assert not torch.isin(indices, torch.tensor(gone)).any()
    assert (probs[:, gone] == 0).all()
    assert weights.isfinite().all()


@pytest.mark.parametrize("case", ["sigmoid", "sigmoid-groups"])
def test_a_token_that_nobody_scores_stays_finite(case: str) -> None:
    router = make(case)
    logits = torch.full((2, E), -INF)
    logits[1] = -200.0  # scores of zero in float32
    logits.requires_grad_()
    probs, weights, _ = router.choose(logits)
    assert probs.tolist() == [[0.0] * E] * 2
    (probs.sum() + weights.sum()).backward()
    assert logits.grad.isfinite().all()


def test_experts_chosen_for_their_bias_alone_get_finite_weights() -> None:
    router = make("softmax-bias")
    router.selection_bias.zero_()[:2] = 2.0
    logits = torch.zeros(1, E)
    logits[:, :2] = -300.0  # probability zero in float32
    _, weights, indices = router.choose(logits)
    assert sorted(indices[0].tolist()) == [0, 1]
    assert weights.isfinite().all()


# -- the bias of softmax is an option that changes nothing unless asked for ---------------------------------------------


def test_selection_bias_is_off_by_default() -> None:
    torch.manual_seed(0)
    plain = registry.create("router", "softmax", d_model=D, n_experts=E, top_k=2)
    torch.manual_seed(0)
    biased = registry.create("router", "softmax", d_model=D, n_experts=E, top_k=2, selection_bias=True)
    assert plain.selection_bias is None
    assert list(plain.state_dict()) == ["weight"]
    assert biased.state_dict().keys() == {"weight", "selection_bias"}
    assert biased.selection_bias.dtype == torch.float32
    assert not biased.selection_bias.any()
    a, b = plain(tokens(50)), biased(tokens(50))
    for field in ("logits", "probs", "weights", "indices"):
        assert torch.equal(getattr(a, field), getattr(b, field))  # a bias of zero is none


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    for case in ("softmax-bias", "sigmoid"):
        router, x = make(case, K=2), tokens(50)
        router.selection_bias.zero_()
        before = router(x)
        router.selection_bias[3] = 10.0
        after = router(x)
        assert (after.indices[:, 0] == 3).all()
        assert torch.equal(after.probs, before.probs)
        scores = before.probs if case == "softmax-bias" else before.logits.sigmoid()
        chosen = scores.gather(1, after.indices)
        torch.testing.assert_close(after.weights, chosen / chosen.sum(1, keepdim=True))


# -- sigmoid: groups ------------------------------------------------------------------------------------------------------


def sigmoid_router(E: int, K: int, **options: Any) -> Router:
    made: Router = registry.create("router", "sigmoid", d_model=4, n_experts=E, top_k=K, **options)
    return made


def test_groups_worked_example() -> None:
    """Scores .9 .1 | .6 .6 | .5 .4 | .8 .05: the sums are 1, 1.2, .9, .85; of the best two groups the best two experts."""
    router = sigmoid_router(8, 2, n_groups=4, top_groups=2)
    assert router.n_groups == 4
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.59, 0.5, 0.4, 0.8, 0.05]])
    assert router.choose(scores.logit())[2].tolist() == [[0, 2]]
    router.selection_bias[6] = 0.5  # 1.35: now the last group and the second; its expert's biased score 1.3 is highest
    assert router.choose(scores.logit())[2].tolist() == [[6, 2]]


def test_masked_experts_come_after_other_groups() -> None:
    """Where masking leaves the best groups too few experts, others fill up, masked ones never."""
    router = make("sigmoid-groups", K=4)
    router.selection_bias.zero_()
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        finite = torch.arange(4) * 3 + torch.randint(3, (4,), generator=rng)  # one expert is left in each group
        logits = torch.full((1, E), -INF)
        logits[0, finite] = torch.randn(4, generator=rng)
        chosen = router.choose(logits)[2][0]
        assert sorted(chosen.tolist()) == finite.tolist()
        assert set(chosen[:2].tolist()) == set(logits[0].topk(2).indices.tolist())


def test_min_experts_is_the_fewest_it_can_be_made_with() -> None:
    for K, n_groups, top_groups in ((1, 1, 1), (4, 1, 1), (4, 4, 2), (5, 4, 2), (3, 4, 4), (8, 3, 1)):
        fewest = None
        for E in range(1, 40):
            try:
                made = sigmoid_router(E, K, n_groups=n_groups, top_groups=top_groups)
            except UserError:
                continue
            fewest = fewest or E
            assert made.min_experts == fewest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_groups": 5}, "8 experts do not divide into n_groups=5"),
        ({"n_groups": 0}, "n_groups"),
        ({"n_groups": 4, "top_groups": 5}, "top_groups"),
        ({"n_groups": 4, "top_groups": 0}, "top_groups"),
        ({"n_groups": 4, "top_groups": 1}, "top_k=3 is more than the 2 experts in top_groups=1"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"groups": 2}, "n_groups"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sigmoid_router(8, 3, **options)


def test_pruned_below_what_the_groups_need_is_a_sentence() -> None:
    model = small("sigmoid-groups", K=4)
    apply_plan(model, plan([[0, 3, 6, 9]] * 2, 4))  # one expert per group, two groups: two candidates for K = 4
    with pytest.raises(UserError, match="keep at least 8 experts"):
        model(torch.zeros(1, 3, dtype=torch.int64))
    model = small("sigmoid-groups", K=2)
    apply_plan(model, plan([[0, 1, 3, 6, 9]] * 2, 2))
    with pytest.raises(UserError, match="5 experts do not divide into n_groups=4"):
        model(torch.zeros(1, 3, dtype=torch.int64))


# -- attention across experts ---------------------------------------------------------------------------------------------


def test_attention_logits_gradcheck() -> None:
    router = make("attention", E=5, D=4).double()
    x = tokens(3, 4).double().requires_grad_()

    def logits(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            _Logits(router), {f"router.{n}": w for n, w in zip(("query", "key", "value"), weights, strict=True)}, (x,)
        )

    assert torch.autograd.gradcheck(logits, (x, router.query, router.key, router.value))


class _Logits(torch.nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router.logits(x)


@pytest.mark.parametrize("width", [1, 4])
def test_attention_over_experts_does_not_hold_the_square(width: int) -> None:
    T, E = 64, 96
    q, k, v = (torch.randn(T, E, requires_grad=True) for _ in range(3))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        mixed = attention_module.mix_experts(torch.cat([q, k, v], 1), width)
    assert 0 < max(saved) <= T * E * width
    expected = torch.einsum("tij,tj->ti", (q[:, :, None] * k[:, None, :]).softmax(-1), v)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(mixed.square().sum(), (q, k, v))
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_attention_in_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x = make("attention"), tokens(11)
    whole = router.logits(x)
    monkeypatch.setattr(attention_module, "TOKENS_PER_CALL", 4)
    torch.testing.assert_close(router.logits(x), whole, rtol=1e-6, atol=1e-6)


def test_attention_routes_anew_among_the_survivors() -> None:
    kept = [0, 2, 3, 7, 10]
    model = small("attention", K=2)
    layer = model.moe_layers[1]
    x = tokens(6, layer.router.d_model)
    rows = [getattr(layer.router, name)[kept].clone() for name in ("query", "key", "value")]
    masked_logits = layer.router.logits(x)[:, kept]
    apply_plan(model, plan([kept] * 2, 2))
    assert [tuple(p.shape) for p in layer.router.parameters()] == [(5, layer.router.d_model)] * 3
    assert layer.router.n_experts == 5
    fresh = registry.create("router", "attention", d_model=layer.router.d_model, n_experts=5, top_k=2)
    with torch.no_grad():
        for parameter, row in zip(fresh.parameters(), rows, strict=True):
            parameter.copy_(row)
    assert torch.equal(layer.router.logits(x), fresh.logits(x))
    assert layer.router.experts_interact
    assert (layer.router.logits(x) - masked_logits).abs().max() > 1e-2  # why pruned does not equal masked here


# -- surgery and checkpoints ---------------------------------------------------------------------------------------------


def small(case: str, K: int = 2, attention: str = "standard") -> MoETransformer:
    name, options = CASES[case]
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=31,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_experts=E,
        top_k=K,
        d_expert=6,
        max_seq_len=16,
        router=name,
        router_options=options,
        attention=attention,
    )
    model = MoETransformer(config)
    for layer in model.moe_layers:
        liven(layer.router)
        torch.nn.init.normal_(layer.experts.down, std=0.3)
    return model.eval()


def plan(kept: list[list[int]], K: int) -> PrunePlan:
    return PrunePlan(tuple(map(tuple, kept)), (tuple(range(E)),) * len(kept), (E,) * len(kept), K)


def kept_lists(n_groups: int, fewest: int) -> Iterator[list[list[int]]]:
    """Some ways to keep equally many experts of every group, down to `fewest` in all."""
    rng = torch.Generator().manual_seed(0)
    size = E // n_groups
    for each in range(size, 0, -1):
        if each * n_groups >= fewest:
            layers = [
                sorted(
                    g * size + i for g in range(n_groups) for i in torch.randperm(size, generator=rng)[:each].tolist()
                )
                for _ in range(2)
            ]
            yield layers


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] != "attention"])
def test_pruned_equals_masked(case: str) -> None:
    x = torch.randint(31, (4, 16), generator=torch.Generator().manual_seed(3))
    whole = small(case)
    assert not whole.moe_layers[0].router.experts_interact
    lists = list(kept_lists(whole.n_groups, whole.min_experts))
    for kept in lists:
        pruned, the_plan = small(case), plan(kept, 2)
        apply_plan(pruned, the_plan)
        with torch.no_grad():
            assert (pruned(x) - masked(whole, the_plan, x)).abs().max() <= 1e-5
    assert len(lists) >= (1 if whole.n_groups == E else 3)


@pytest.mark.parametrize("case", ["softmax", "softmax-bias", "sigmoid-groups", "attention"])
def test_router_survives_surgery_and_checkpoints(case: str, tmp_path: Path) -> None:
    x = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(3))
    model, whole = small(case), small(case)
    kept = [[0, 2, 3, 5, 6, 7, 9, 11], [1, 2, 4, 5, 6, 8, 10, 11]]
    with torch.no_grad(), only(model, kept):  # and back again
        model(x)
    assert checkpoints.fingerprint(model.state_dict()) == checkpoints.fingerprint(whole.state_dict())
    apply_plan(model, plan(kept, 2))
    for layer, old, ids in zip(model.moe_layers, whole.moe_layers, kept, strict=True):
        for name in old.router.state_dict():
            assert torch.equal(layer.router.state_dict()[name], old.router.state_dict()[name][ids])
    assert ("blocks.0.moe.router.selection_bias" in model.state_dict()) == (case in ("softmax-bias", "sigmoid-groups"))
    ids = [list(layer.ids) for layer in model.moe_layers]
    checkpoints.export(checkpoints.Checkpoint(model.config, ids, model.state_dict()), tmp_path / "out")
    again = checkpoints.read(tmp_path / "out").model()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


# -- training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--model.config.router=sigmoid", '--model.config.router_options={"n_groups": 4, "top_groups": 2}'],
        ["--model.config.router=attention"],
        ["--model.config.attention=lfa"],
    ],
    ids=["sigmoid-groups", "attention", "lfa"],
)
def test_trains_and_prunes(options: list[str], corpus: Path, tmp_path: Path) -> None:
    """Five steps of the real sizes on the tiny corpus, pruned at step 3."""
    where = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=5", "--trainer.enable_progress_bar=false"]
    data = [f"--data.source={corpus}", "--data.vocab_size=300", "--pruning.window=1"]
    prune = ["--pruning.pruner=frequency", "--pruning.trigger=at_step", "--pruning.trigger.step=3"]
    assert main(["fit", f"--config={ROOT / 'recipes' / 'base.yaml'}", *where, *data, *prune, *options]) == 0
    assert len(read_rows(tmp_path / "history.jsonl")) == 5
    [checkpoint] = list(tmp_path.rglob("last.ckpt"))
    model = checkpoints.read(checkpoint).model()
    assert [layer.n_experts for layer in model.moe_layers] == [24] * 4
    for layer in model.moe_layers:
        groups = [sum(i // 8 == g for i in layer.ids) for g in range(4)]
        assert model.n_groups == 1 or groups == [6] * 4
    assert model(torch.zeros(1, 8, dtype=torch.int64)).isfinite().all()
