"""Load metrics and balancers against their definitions; placements."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeprune.balancing.metrics import ExpertLoad, load_metrics
from moeprune.errors import UserError
from moeprune.model.router import Router, Routing
from moeprune.parallel.placement import lower_bound, max_load_factor
from moeprune.registry import create

counts = st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any)


@given(counts)
def test_load_metrics_from_their_definitions(load: list[int]) -> None:
    metrics = load_metrics(np.array(load))
    mean, E, total = sum(load) / len(load), len(load), sum(load)
    assert metrics["max_vio"] == pytest.approx(max(load) / mean - 1)
    assert metrics["gini"] == pytest.approx(sum(abs(a - b) for a in load for b in load) / (2 * E * E * mean))
    assert metrics["entropy"] == pytest.approx(-sum(c / total * math.log(c / total) for c in load if c) / math.log(E))
    assert metrics["cv"] == pytest.approx(math.sqrt(sum((c - mean) ** 2 for c in load) / E) / mean)
    assert metrics["dead"] == pytest.approx(sum(c / total < 1e-3 for c in load) / E)


def test_balanced_and_degenerate_loads() -> None:
    balanced = {"max_vio": 0.0, "entropy": 1.0, "cv": 0.0, "gini": 0.0, "dead": 0.0}
    for load in ([7, 7, 7], [0, 0], [5]):
        assert load_metrics(np.array(load)) == pytest.approx(balanced, abs=1e-12)


def test_expert_load_sums_unequal_layers() -> None:
    metric = ExpertLoad([3, 1])
    metric.update([torch.tensor([1, 2, 3]), torch.tensor([4])])
    metric.update([torch.tensor([1, 0, 0]), torch.tensor([1])])
    assert [t.tolist() for t in metric.totals()] == [[2, 2, 3], [5]]


class Biased(Router):
    """Linear, softmax; chooses by probability + selection_bias."""

    expert_dims: ClassVar = {"weight": 0, "selection_bias": 0}
    selection_bias: torch.Tensor

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.weight = torch.nn.Parameter(torch.randn(n_experts, d_model, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("selection_bias", torch.zeros(n_experts))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.to(x.dtype).T

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probs = logits.softmax(-1)
        indices = (probs + self.selection_bias).topk(self.top_k, -1).indices
        weights = probs.gather(1, indices)
        return probs, weights / weights.sum(1, keepdim=True), indices


def routed(
    T: int, E: int, K: int, mask: torch.Tensor | None = None, n_sequences: int = 1, seed: int = 0, sigmoid: bool = False
) -> Routing:
    """Of random float64 logits, which ask for gradients; probabilities sum to 1, or are E sigmoids of them."""
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return from_logits(logits, K, mask, n_sequences, sigmoid)


def from_logits(
    logits: torch.Tensor,
    K: int,
    mask: torch.Tensor | None = None,
    n_sequences: int = 1,
    sigmoid: bool = False,
    indices: torch.Tensor | None = None,
) -> Routing:
    probs = logits.sigmoid() if sigmoid else logits.softmax(-1)
    indices = probs.topk(K).indices if indices is None else indices
    return Routing(logits, probs, probs.gather(1, indices), indices, mask, n_sequences)


def balanced(B: int, S: int, E: int, K: int) -> Routing:
    """Equal probabilities, and every expert chosen equally often in every sequence; E divides S K."""
    indices = (torch.arange(S * K).view(S, K) % E).repeat(B, 1)
    return from_logits(torch.zeros(B * S, E), K, n_sequences=B, indices=indices)


def slow_switch(r: Routing, counts: list[int] | None = None) -> torch.Tensor:
    """E sum_i f_i P_i by the definition; `counts` in place of the routing's own."""
    T, E, K = *r.logits.shape, r.indices.shape[1]
    tokens = [t for t in range(T) if r.mask is None or r.mask[t]]
    loss = 0 * r.probs.sum()
    for i in range(E):
        c = sum(int(r.indices[t, k]) == i for t in tokens for k in range(K)) if counts is None else counts[i]
        total = K * len(tokens) if counts is None else sum(counts)
        loss = loss + E * c / max(1, total) * sum(r.probs[t, i] for t in tokens) / max(1, len(tokens))
    return loss


def slow_sequence_wise(r: Routing) -> torch.Tensor:
    T, E, K = *r.logits.shape, r.indices.shape[1]
    S = T // r.n_sequences
    losses = []
    for b in range(r.n_sequences):
        tokens = [t for t in range(b * S, (b + 1) * S) if r.mask is None or r.mask[t]]
        if not tokens:
            continue
        loss = torch.zeros((), dtype=r.probs.dtype)
        for i in range(E):
            f = E / (K * len(tokens)) * sum(int(r.indices[t, k]) == i for t in tokens for k in range(K))
            P = sum(r.probs[t, i] / sum(r.probs[t, j] for j in range(E)) for t in tokens) / len(tokens)
            loss = loss + f * P
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0 * r.probs.sum()


def slow_z_loss(r: Routing) -> torch.Tensor:
    rows = [r.logits[t] for t in range(len(r.logits)) if r.mask is None or r.mask[t]]
    return sum(row.exp().sum().log() ** 2 for row in rows) / len(rows) if rows else 0 * r.logits.sum()


SLOW = {"switch": slow_switch, "global_batch": slow_switch, "sequence_wise": slow_sequence_wise, "z_loss": slow_z_loss}


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    B, S, E = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    K, seed, sigmoid = draw(st.integers(1, E)), draw(st.integers(0, 99)), draw(st.booleans())
    mask = draw(st.none() | st.lists(st.booleans(), min_size=B * S, max_size=B * S))
    return routed(B * S, E, K, None if mask is None else torch.tensor(mask), B, seed, sigmoid)


@pytest.mark.parametrize("name", SLOW)
@settings(deadline=None, max_examples=40)
@example(routed(4, 3, 2, torch.zeros(4, dtype=torch.bool), 2))
@given(routings())
def test_losses_and_their_gradients_equal_the_definition(name: str, r: Routing) -> None:
    value, expected = create("balancer", name).loss(r, Biased(2, 2, 1)), SLOW[name](r)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, r.logits, retain_graph=True)[0] for loss in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SLOW)
def test_gradcheck(name: str) -> None:
    mask = torch.tensor([True, True, False, True, True, True, False, False])
    chosen = routed(8, 3, 2).indices

    def loss(logits: torch.Tensor) -> torch.Tensor:
        made = create("balancer", name)
        return made.loss(from_logits(logits, 2, mask, 2, indices=chosen), Biased(2, 3, 2))

    logits = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("name", ["switch", "global_batch", "sequence_wise"])
def test_one_at_perfect_balance_and_more_beside_it(name: str) -> None:
    loss = create("balancer", name).loss
    assert loss(balanced(2, 6, 6, 2), Biased(2, 6, 2)).item() == pytest.approx(1)
    one_sided = torch.zeros(12, 6, dtype=torch.float64)
    one_sided[:, :2] = 3.0
    assert loss(from_logits(one_sided, 2, n_sequences=2), Biased(2, 6, 2)).item() > 1.5


def test_sequence_wise_sees_what_the_batch_hides() -> None:
    """Two sequences, each on its own expert: balanced over the batch, not within a sequence."""
    logits = torch.tensor([[9.0, 0.0]] * 4 + [[0.0, 9.0]] * 4)
    r = from_logits(logits, 1, n_sequences=2)
    assert create("balancer", "switch").loss(r, Biased(2, 2, 1)).item() == pytest.approx(1, abs=1e-3)
    assert create("balancer", "sequence_wise").loss(r, Biased(2, 2, 1)).item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("name", ["switch", "global_batch", "z_loss"])
def test_masked_padding_equals_dropping_the_tokens(name: str) -> None:
    mask = torch.arange(20) % 5 < 3
    r = routed(20, 6, 2, mask)
    dropped = from_logits(r.logits.detach()[mask], 2)
    ours, theirs = (create("balancer", name).loss(x, Biased(2, 6, 2)).item() for x in (r, dropped))
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_sequence_wise_leaves_padding_out() -> None:
    """Sequences of 5, 2 and 0 tokens: the mean of the first two, each alone without its padding."""
    mask = torch.tensor([True] * 7 + [False] * 8)
    r = routed(15, 4, 2, mask, n_sequences=3)
    loss = create("balancer", "sequence_wise").loss
    alone = [loss(from_logits(r.logits.detach()[a:b], 2), Biased(2, 4, 2)).item() for a, b in ((0, 5), (5, 7))]
    assert loss(r, Biased(2, 4, 2)).item() == pytest.approx(sum(alone) / 2, rel=1e-12)


def test_switch_loss_pushes_towards_balance() -> None:
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1.0
    logits.requires_grad_()
    probs = logits.softmax(-1)
    indices = probs.topk(1).indices
    create("balancer", "switch").loss(Routing(logits, probs, probs, indices), Biased(2, 4, 1)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()
    with pytest.raises(UserError, match="coefficient"):
        create("balancer", "switch", coefficient=-1)


def test_global_batch_adds_up_the_micro_batches_of_a_step_per_router() -> None:
    """Layers of 3 and 5 experts; the second micro-batch is weighed with the counts of both, the next step's is not."""
    balancer, routers = create("balancer", "global_batch"), [Biased(2, 3, 2), Biased(2, 5, 2)]
    for step in range(2):
        sums = [torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)]
        for micro in range(3):
            for layer, router in enumerate(routers):
                r = routed(7, router.n_experts, 2, seed=10 * step + micro)
                sums[layer] += r.counts
                expected = slow_switch(r, sums[layer].tolist())
                assert balancer.loss(r, router).item() == pytest.approx(expected.item(), rel=1e-12)
        balancer.after_step(routers, sums)


def test_z_loss_of_equal_logits() -> None:
    assert create("balancer", "z_loss").loss(balanced(1, 6, 6, 2), Biased(2, 6, 2)).item() == pytest.approx(
        math.log(6) ** 2
    )


def test_simbal_from_its_definition() -> None:
    simbal, router = create("balancer", "simbal"), Biased(7, 4, 2)
    W = router.weight.detach().double().requires_grad_()
    expected = sum(
        abs(sum(W[i, d] * W[j, d] for d in range(7)) - (1 if i == j else 0)) for i in range(4) for j in range(4)
    )
    value = simbal.loss(routed(5, 4, 2), router)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    torch.testing.assert_close(router.weight.grad.double(), torch.autograd.grad(expected, W)[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        router.weight.copy_(torch.linalg.qr(router.weight.T).Q.T)
    assert simbal.loss(routed(5, 4, 2), router).item() == pytest.approx(0, abs=1e-5)
    del router.weight
    with pytest.raises(UserError, match="Biased has none"):
        simbal.loss(routed(5, 4, 2), router)


def test_loss_free_moves_every_bias_towards_balance() -> None:
    loss_free, router = create("balancer", "loss_free", u=0.01), Biased(2, 4, 1)
    with torch.no_grad():
        loss_free.after_step([router], [torch.tensor([10, 4, 6, 4])])  # mean 6: signs -1 1 0 1, their mean 0.25
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.0125, 0.0075, -0.0025, 0.0075]))
    with torch.no_grad():
        loss_free.after_step([router], [torch.tensor([5, 5, 5, 5])])
        loss_free.after_step([router], [torch.tensor([0, 0, 0, 0])])
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.0125, 0.0075, -0.0025, 0.0075]))
    with pytest.raises(UserError, match="u must be above 0"):
        create("balancer", "loss_free", u=0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**40), min_size=3, max_size=3), min_size=1, max_size=20))
def test_loss_free_stays_centred_and_bounded(history: list[list[int]]) -> None:
    loss_free, router = create("balancer", "loss_free"), Biased(2, 3, 1)
    for load in history:
        loss_free.after_step([router], [torch.tensor(load)])
    assert abs(router.selection_bias.sum().item()) < 1e-6
    assert router.selection_bias.abs().max() <= 2e-3 * len(history) + 1e-6


def test_loss_free_balances_a_skewed_router() -> None:
    """Two layers of unequal size whose tokens have a common direction, so that few experts take nearly all of them."""
    rng = torch.Generator().manual_seed(0)
    routers, loss_free = [Biased(8, 6, 2), Biased(8, 9, 2)], create("balancer", "loss_free", u=0.002)
    violations = []
    for _ in range(300):
        x = torch.randn(512, 8, generator=rng) * 0.3 + 0.5
        counts = [router(x).counts for router in routers]
        with torch.no_grad():
            loss_free.after_step(routers, counts)
        violations.append(max(load_metrics(count.numpy())["max_vio"] for count in counts))
    assert min(violations[:5]) > 2
    assert max(violations[-50:]) < 0.5
    assert np.mean(violations[-50:]) < 0.25


def test_loss_free_refuses_routers_without_a_bias() -> None:
    softmax = create("router", "softmax", d_model=4, n_experts=3, top_k=1)
    with pytest.raises(
        UserError, match=r"SoftmaxTopK has none; use the router `sigmoid`, or `softmax` with selection_bias: true"
    ):
        create("balancer", "loss_free").loss(routed(5, 3, 1), softmax)
    with pytest.raises(UserError, match=r"bfloat16.*bf16-mixed"):
        create("balancer", "loss_free").loss(routed(5, 3, 1), Biased(4, 3, 1).bfloat16())


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=6, max_size=6))
def test_lpt_places_everyone_once_and_respects_the_bound(load: list[int]) -> None:
    loads = np.array(load)
    best = min(
        max_load_factor(loads, [list(group), [i for i in range(6) if i not in group]])
        for group in itertools.combinations(range(6), 3)
    )
    for name in ("lpt", "contiguous"):
        devices = create("placement", name).place(loads, 2)
        assert sorted(i for device in devices for i in device) == list(range(6))
        assert [len(device) for device in devices] == [3, 3]
        assert lower_bound(loads, 2) - 1e-9 <= best <= max_load_factor(loads, devices) + 1e-9


def test_lpt_worked_example() -> None:
    """Loads 9 7 6 5 4 1 on two devices: 9, then 7, 6 to the second, 5 to the first, 4 to the second, 1 to the first."""
    assert create("placement", "lpt").place(np.array([9, 7, 6, 5, 4, 1]), 2) == [[0, 3, 5], [1, 2, 4]]
    with pytest.raises(UserError, match="multiple_of=4"):
        create("placement", "lpt").place(np.array([1, 2, 3, 4, 5, 6]), 4)
