"""Merging: what surgery does to the weights, and what M-SMoE and HC-SMoE choose to merge."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moeprune import Constraints, Evidence, PrunePlan, create
from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import record
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.merging import alignment, merge_experts
from moeprune.pruning.plan import Merge
from moeprune.pruning.surgery import apply_plan

E, D, WIDTH = 6, 5, 4


def model_of(n_experts: int = E, n_layers: int = 2, seed: int = 0) -> MoETransformer:
    config = MoEConfig(
        vocab_size=31,
        d_model=8,
        n_layers=n_layers,
        n_heads=2,
        n_experts=n_experts,
        top_k=2,
        d_expert=WIDTH,
        max_seq_len=9,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoETransformer(config).eval()
        for parameter in model.parameters():
            parameter.data.mul_(4)
    return model


def parts_of(layer: Any, expert: int) -> dict[str, Tensor]:
    """gate, up [F, D] and down [D, F] of the expert with this original id."""
    position = layer.ids.index(expert)
    return {name: layer.weights()[name][position].detach().clone() for name in ("gate", "up", "down")}


# -- the slow reference: loops over members, neurons and weights --------------------------------------------------------


def slow_order(own: dict[str, Tensor], other: dict[str, Tensor]) -> list[int]:
    """The order of the other's neurons with the largest total inner product, of all orders."""
    width = len(own["gate"])

    def product(i: int, j: int) -> float:
        found = 0.0
        for d in range(own["gate"].shape[1]):
            found += float(own["gate"][i, d]) * float(other["gate"][j, d])
            found += float(own["up"][i, d]) * float(other["up"][j, d])
            found += float(own["down"][d, i]) * float(other["down"][d, j])
        return found

    gain = [[product(i, j) for j in range(width)] for i in range(width)]
    orders = itertools.permutations(range(width))
    return list(max(orders, key=lambda order: sum(gain[i][j] for i, j in enumerate(order))))


def slow_merge(layer: Any, merge: Merge, align: bool) -> dict[str, Tensor]:
    own = parts_of(layer, merge.into)
    total = {name: torch.zeros_like(part, dtype=torch.float64) for name, part in own.items()}
    for member, share in zip(merge.members, merge.weights, strict=True):
        part = parts_of(layer, member)
        order = slow_order(own, part) if align else list(range(len(part["gate"])))
        for i, j in enumerate(order):
            for d in range(own["gate"].shape[1]):
                total["gate"][i, d] += share * part["gate"][j, d].double()
                total["up"][i, d] += share * part["up"][j, d].double()
                total["down"][d, i] += share * part["down"][d, j].double()
    return {name: value.to(own[name].dtype) for name, value in total.items()}


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_surgery_equals_the_slow_reference(align: bool, seed: int) -> None:
    model = model_of(seed=seed)
    merges = (
        (Merge(1, (1, 0, 4), (0.5, 0.2, 0.3)), Merge(5, (3, 5), (0.25, 0.75))),
        (Merge(2, (2, 3), (0.9, 0.1)),),
    )
    before = tuple(range(E))
    plan = PrunePlan(((1, 2, 5), (0, 1, 2, 4, 5)), (before, before), (E, E), 2, merges=merges, align=align)
    expected = copy.deepcopy(model)
    for layer, theirs in zip(expected.moe_layers, merges, strict=True):
        for merge, parts in [(merge, slow_merge(layer, merge, align)) for merge in theirs]:
            for name, part in parts.items():
                layer.weights()[name].data[merge.into] = part
    apply_plan(expected, PrunePlan(plan.kept, plan.before, plan.n_original, 2))  # which only removes
    routers = [layer.router.weight.detach().clone() for layer in model.moe_layers]
    apply_plan(model, plan)
    for mine, theirs, rows, kept in zip(model.moe_layers, expected.moe_layers, routers, plan.kept, strict=True):
        assert mine.ids == kept
        for name in ("gate", "up", "down"):
            torch.testing.assert_close(mine.weights()[name], theirs.weights()[name], rtol=0, atol=1e-6)
        assert torch.equal(mine.router.weight, rows[list(kept)])  # the row of the expert that stays, and no other
    tokens = torch.arange(27).view(3, 9)
    torch.testing.assert_close(model(tokens), expected(tokens), rtol=0, atol=1e-5)


def test_a_merge_of_one_changes_nothing() -> None:
    model = model_of()
    whole = copy.deepcopy(model)
    for align in (False, True):
        merge_experts(model.moe_layers[0], [Merge(i, (i,), (1.0,)) for i in range(E)], align)
    merge_experts(model.moe_layers[1], [], True)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def permuted(layer: Any, expert: int, order: Sequence[int]) -> None:
    """Permute the hidden neurons of one expert in place: it computes the same."""
    position, chosen = layer.ids.index(expert), list(order)
    with torch.no_grad():
        weights = layer.weights()
        for name in ("gate", "up"):
            weights[name][position] = weights[name][position][chosen].clone()
        weights["down"][position] = weights["down"][position][:, chosen].clone()


@given(st.permutations(range(WIDTH)), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_aligned_merges_do_not_depend_on_the_order_of_neurons(order: list[int], seed: int) -> None:
    model = model_of(n_layers=1, seed=seed)
    other = copy.deepcopy(model)
    permuted(other.moe_layers[0], 4, order)
    merge = Merge(1, (0, 1, 4), (0.2, 0.5, 0.3))
    for each in (model, other):
        merge_experts(each.moe_layers[0], [merge], True)
    for name, mine in parts_of(model.moe_layers[0], 1).items():
        torch.testing.assert_close(parts_of(other.moe_layers[0], 1)[name], mine, rtol=0, atol=1e-6)


@given(st.permutations(range(WIDTH)), st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_merged_with_a_permuted_copy_of_itself_it_is_itself(order: list[int], share: float) -> None:
    model = model_of(n_layers=1)
    layer = model.moe_layers[0]
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            layer.weights()[name][3] = layer.weights()[name][2]
    permuted(layer, 3, order)
    own = parts_of(layer, 2)
    bare = copy.deepcopy(model)
    merge = Merge(2, (2, 3), (1 - share, share))
    merge_experts(layer, [merge], True)
    for name, part in parts_of(layer, 2).items():
        torch.testing.assert_close(part, own[name], rtol=0, atol=1e-6)
    merge_experts(bare.moe_layers[0], [merge], False)
    if list(order) != list(range(WIDTH)):  # without alignment it is not
        assert not torch.allclose(parts_of(bare.moe_layers[0], 2)["gate"], own["gate"], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_is_the_best_of_all_orders(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (WIDTH, D), "up": (WIDTH, D), "down": (D, WIDTH)}
    for _ in range(5):
        own, other = (
            {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
            for _ in range(2)
        )
        assert alignment(own, other).tolist() == slow_order(own, other)


class Biased:
    """A layer as a transformers model with biases shows it: gates and ups in one tensor, neurons alternating."""

    def __init__(self, gated: bool = True, extra: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        self.ids = tuple(range(E))
        self.gated = gated
        self.both = draw(E, D, (2 if gated else 1) * WIDTH)  # [E, in, out]
        self.both_bias = draw(E, (2 if gated else 1) * WIDTH)
        self.down, self.down_bias = draw(E, WIDTH, D), draw(E, D)
        self.extra = draw(E, 3) if extra else None

    def weights(self) -> dict[str, Tensor]:
        both = self.both.transpose(1, 2)
        found = {"down": self.down.transpose(1, 2), "down_bias": self.down_bias, "router": torch.zeros(E, D)}
        if not self.gated:
            return found | {"up": both, "up_bias": self.both_bias}
        halves = {"gate": both[:, ::2], "up": both[:, 1::2]}
        return found | halves | {"gate_bias": self.both_bias[:, ::2], "up_bias": self.both_bias[:, 1::2]}

    def expert_parameters(self) -> dict[str, tuple[Tensor, int]]:
        tensors = {"both": self.both, "both_bias": self.both_bias, "down": self.down, "down_bias": self.down_bias}
        return {
            name: (tensor, 0)
            for name, tensor in (tensors | ({"extra": self.extra} if self.extra is not None else {})).items()
        }

    def output(self, expert: int, x: Tensor) -> Tensor:
        parts = {name: tensor[expert] for name, tensor in self.weights().items()}
        hidden = F.gelu(x @ parts["up"].T + parts["up_bias"])
        if self.gated:
            hidden = hidden * F.silu(x @ parts["gate"].T + parts["gate_bias"])
        return hidden @ parts["down"].T + parts["down_bias"]


@pytest.mark.parametrize("gated", [True, False])
def test_biases_are_averaged_and_permuted_too(gated: bool) -> None:
    layer: Any = Biased(gated)
    with torch.no_grad():  # expert 3 is expert 2 with its neurons in another order
        order = torch.tensor([2, 0, 3, 1])
        for name, tensor in layer.weights().items():
            if name != "router":
                copied = tensor[2].clone()
                tensor[3] = copied if name == "down_bias" else copied[:, order] if name == "down" else copied[order]
    x = torch.randn(7, D)
    torch.testing.assert_close(layer.output(3, x), layer.output(2, x))
    before, other = layer.output(2, x), {name: tensor[4].clone() for name, tensor in layer.weights().items()}
    merge_experts(layer, [Merge(2, (2, 3), (0.4, 0.6)), Merge(5, (4, 5), (1.0, 0.0))], True)
    torch.testing.assert_close(layer.output(2, x), before)
    torch.testing.assert_close(layer.weights()["down_bias"][5], other["down_bias"])
    torch.testing.assert_close(layer.output(5, x), layer.output(4, x))


def test_experts_with_more_than_weights_and_biases_are_refused() -> None:
    layer: Any = Biased(extra=True)
    with pytest.raises(UserError, match="weights and biases that can be averaged"):
        merge_experts(layer, [Merge(0, (0, 1), (0.5, 0.5))], False)


# -- what to merge ------------------------------------------------------------------------------------------------------


def layer_evidence(
    counts: Sequence[int], logits: np.ndarray, means: np.ndarray, ids: Sequence[int] | None = None, n: int = 0
) -> LayerEvidence:
    counted = np.asarray(counts)
    stats = {
        "counts": counted,
        "logit_gram": logits.T @ logits,
        "mean_f": np.where(counted[:, None] > 0, means, 0.0),
        "max_f": np.ones(len(counted)),
    }
    chosen = tuple(range(len(counted))) if ids is None else tuple(ids)
    return LayerEvidence(chosen, n or len(counted), stats)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Evidence, np.ndarray, Constraints, float]:
    """Evidence of 2 layers with some idle experts, the logits behind it, constraints that a plan can meet, and a ratio."""
    n = draw(st.sampled_from([4, 6, 8, 12]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    idle = draw(st.integers(0, n))
    layers, logits = [], []
    for _ in range(2):
        counts = rng.permutation(np.arange(n) * 10 + 5 + rng.integers(0, 5, n))
        counts[rng.permutation(n)[:idle]] = 0
        logits.append(rng.normal(size=(40, n)))
        layers.append(layer_evidence(counts, logits[-1], rng.normal(size=(n, D))))
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if n % g == 0]))
    multiple = draw(st.sampled_from([1, 2, 3]))
    protected = draw(
        st.one_of(st.none(), st.lists(st.lists(st.integers(0, n - 1), max_size=3), min_size=2, max_size=2))
    )
    low = draw(st.integers(1, n))
    high = draw(st.one_of(st.none(), st.integers(low, n)))
    constraints = Constraints(multiple, low, high, groups, protected)
    try:
        for index in range(2):
            constraints.feasible(n, 2, n, index)
    except UserError:
        constraints = Constraints()
    return Evidence(tuple(layers), 2), np.stack(logits), constraints, draw(st.floats(0, 0.95))


def budget(evidence: Evidence, constraints: Constraints, ratio: float) -> list[int]:
    return list(create("pruner", "frequency", ratio=ratio).plan(evidence, constraints).n_kept)


def check_plan(plan: PrunePlan, evidence: Evidence, constraints: Constraints) -> None:
    """What every merging plan promises; PrunePlan.from_kept checked numbers, groups and protection."""
    for index, (layer, merges) in enumerate(zip(evidence.layers, plan.merges, strict=bool(plan.merges))):
        tokens = dict(zip(layer.ids, layer.counts.tolist(), strict=True))
        size = layer.n_original // constraints.n_groups
        members = [i for merge in merges for i in merge.members]
        assert len(set(members)) == len(members)
        assert not set(members) & set(constraints.protected_in(index))
        for merge in merges:
            assert len(merge.members) > 1
            assert set(plan.kept[index]) & set(merge.members) == {merge.into}
            assert len({i // size for i in merge.members}) == 1
            total = sum(tokens[i] for i in merge.members)
            assert merge.weights == pytest.approx([tokens[i] / total for i in merge.members])
            assert all(weight > 0 for weight in merge.weights)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_m_smoe_by_definition(case: tuple[Evidence, np.ndarray, Constraints, float]) -> None:
    evidence, logits, constraints, ratio = case
    plan = create("pruner", "m_smoe", ratio=ratio).plan(evidence, constraints)
    check_plan(plan, evidence, constraints)
    for index, (layer, n) in enumerate(zip(evidence.layers, budget(evidence, constraints, ratio), strict=True)):
        tokens, safe = layer.counts.tolist(), constraints.protected_in(index)
        size = layer.n_original // constraints.n_groups
        found = {i: merge.into for merge in (plan.merges[index] if plan.merges else ()) for i in merge.members}
        kept = set()
        for group in range(constraints.n_groups):
            inside = [i for i in layer.ids if i // size == group]
            frequent = sorted(inside, key=lambda i: (i in safe, tokens[i], i))[
                len(inside) - n // constraints.n_groups :
            ]
            kept |= set(frequent)
            targets = [i for i in frequent if i not in safe]
            for i in set(inside) - set(frequent):
                if tokens[i] == 0 or not targets:
                    assert i not in found
                    continue

                def cosine(j: int, i: int = i, seen: np.ndarray = logits[index]) -> float:
                    a, b = seen[:, i], seen[:, j]
                    return float(a @ b / np.sqrt((a @ a) * (b @ b)))

                assert found[i] == max(targets, key=cosine)
        assert set(plan.kept[index]) == kept


def test_m_smoe_of_equally_similar_ones_takes_the_more_frequent() -> None:
    logits = np.array([[1.0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])  # the last one's are all 0: similar to none
    layer = layer_evidence([9, 20, 20, 3, 4], logits, np.zeros((5, D)))
    plan = create("pruner", "m_smoe", ratio=0.4).plan(Evidence((layer,), 2))
    assert plan.kept == ((0, 1, 2),)
    assert plan.merges == ((Merge(2, (2, 3, 4), (20 / 27, 3 / 27, 4 / 27)),),)
    assert plan.align


def test_m_smoe_takes_dominant_experts_of_all_layers_with_the_global_allocation() -> None:
    rng = np.random.default_rng(0)
    rows = [[100, 90, 80, 70, 60, 50], [100, 90, 1, 1, 1, 1]]
    layers = tuple(layer_evidence(row, rng.normal(size=(9, 6)), rng.normal(size=(6, D))) for row in rows)
    allocation = create("allocation", "global", normalize="max")
    plan = create("pruner", "m_smoe", ratio=1 / 3, allocation=allocation).plan(Evidence(layers, 2))
    assert plan.n_kept == (6, 2)


def slow_clusters(points: np.ndarray, n_clusters: int, linkage: str) -> set[frozenset[int]]:
    """Agglomerative clustering from its definition: join the two nearest clusters until few enough are left."""

    def distance(a: frozenset[int], b: frozenset[int]) -> float:
        pairs = [float(np.linalg.norm(points[i] - points[j])) for i in a for j in b]
        if linkage == "ward":  # growth of the sum of squares, up to a monotone function
            gap = points[list(a)].mean(0) - points[list(b)].mean(0)
            return float(np.sqrt(2 * len(a) * len(b) / (len(a) + len(b))) * np.linalg.norm(gap))
        return {"average": sum(pairs) / len(pairs), "complete": max(pairs), "single": min(pairs)}[linkage]

    clusters = {frozenset({i}) for i in range(len(points))}
    while len(clusters) > n_clusters:
        a, b = min(itertools.combinations(clusters, 2), key=lambda pair: distance(*pair))
        clusters = (clusters - {a, b}) | {a | b}
    return clusters


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["average", "complete", "single", "ward"]))
def test_hc_smoe_by_definition(case: tuple[Evidence, np.ndarray, Constraints, float], linkage: str) -> None:
    evidence, _, constraints, ratio = case
    plan = create("pruner", "hc_smoe", ratio=ratio, linkage=linkage).plan(evidence, constraints)
    check_plan(plan, evidence, constraints)
    assert not plan.align
    for index, (layer, n) in enumerate(zip(evidence.layers, budget(evidence, constraints, ratio), strict=True)):
        tokens, safe = layer.counts.tolist(), set(constraints.protected_in(index))
        size = layer.n_original // constraints.n_groups
        merges = plan.merges[index] if plan.merges else ()
        kept: set[int] = set()
        expected: set[frozenset[int]] = set()
        for group in range(constraints.n_groups):
            inside = [i for i in layer.ids if i // size == group]
            kept |= safe & set(inside)
            room = n // constraints.n_groups - len(safe & set(inside))
            live = [i for i in inside if i not in safe and tokens[i] > 0]
            if room and len(live) > room:
                clusters = slow_clusters(layer.stats["mean_f"][live], room, linkage)
                named = [frozenset(live[p] for p in cluster) for cluster in clusters]
                expected |= {cluster for cluster in named if len(cluster) > 1}
                kept |= {max(cluster, key=lambda i: (tokens[i], i)) for cluster in named}
            elif room:
                idle = sorted(set(inside) - safe - set(live))
                kept |= set(live) | set(idle[len(idle) - (room - len(live)) :])
        assert set(plan.kept[index]) == kept
        assert {frozenset(merge.members) for merge in merges} == expected


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["m_smoe", "hc_smoe"]), st.integers(2, 12), st.floats(0, 0.95), st.integers(0, 999))
def test_merges_do_not_depend_on_the_order_of_experts(name: str, n: int, ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    evidence = Evidence(  # no ties; up to one expert without tokens
        tuple(
            layer_evidence(rng.permutation(n) * 10, rng.normal(size=(40, n)), rng.normal(size=(n, D))) for _ in range(2)
        ),
        2,
    )
    order = rng.permutation(n)
    shuffled = Evidence(
        tuple(
            LayerEvidence(
                layer.ids,
                n,
                {key: v[order][:, order] if key == "logit_gram" else v[order] for key, v in layer.stats.items()},
            )
            for layer in evidence.layers
        ),
        2,
    )
    pruner = create("pruner", name, ratio=ratio)
    plan, other = pruner.plan(evidence), pruner.plan(shuffled)
    for kept, theirs in zip(plan.kept, other.kept, strict=True):
        assert {int(order[i]) for i in theirs} == set(kept)
    named = [
        {(int(order[m.into]), frozenset(int(order[i]) for i in m.members)) for m in merges} for merges in other.merges
    ]
    assert named == [{(m.into, frozenset(m.members)) for m in merges} for merges in plan.merges]


def test_hc_smoe_with_equal_distances_keeps_the_number_asked_for() -> None:
    layer = layer_evidence([5, 6, 7, 8, 9, 10], np.eye(6), np.ones((6, D)))  # all outputs the same: all distances 0
    for ratio, n in ((0.2, 5), (0.5, 3), (0.7, 2)):
        plan = create("pruner", "hc_smoe", ratio=ratio).plan(Evidence((layer,), 2))
        assert plan.n_kept == (n,)
        assert sum(len(merge.members) - 1 for merge in plan.merges[0]) == 6 - n


def test_hc_smoe_leaves_experts_without_tokens_out() -> None:
    """Their mean output of 0 would make them alike, and near to experts that say little."""
    rng = np.random.default_rng(0)
    layer = layer_evidence([0, 30, 0, 20, 10, 40], np.eye(6), rng.normal(size=(6, D)))
    plan = create("pruner", "hc_smoe", ratio=0.4).plan(Evidence((layer,), 2))  # keeps 4: all that have tokens
    assert plan.kept == ((1, 3, 4, 5),)
    assert plan.merges == ()
    plan = create("pruner", "hc_smoe", ratio=0.17).plan(Evidence((layer,), 2))  # keeps 5: an idle one as well
    assert plan.kept == ((1, 2, 3, 4, 5),)
    assert not any(plan.merges)


def test_pruned_before_and_in_groups() -> None:
    """Ids with gaps: groups are those of the original numbering."""
    rng = np.random.default_rng(0)
    ids = (0, 1, 3, 8, 10, 11)
    layer = layer_evidence([5, 60, 7, 80, 9, 10], rng.normal(size=(9, 6)), rng.normal(size=(6, D)), ids, 12)
    for name in ("m_smoe", "hc_smoe"):
        plan = create("pruner", name, ratio=0.6).plan(Evidence((layer,), 2), Constraints(n_groups=2))
        assert plan.n_kept == (4,)
        assert sum(i < 6 for i in plan.kept[0]) == 2
        assert all(len({i // 6 for i in merge.members}) == 1 for merge in plan.merges[0])


@pytest.mark.parametrize("name", ["m_smoe", "hc_smoe"])
def test_nothing_to_merge_is_a_plan_that_only_removes(name: str) -> None:
    rng = np.random.default_rng(0)
    layer = layer_evidence([5, 6, 7, 8], rng.normal(size=(9, 4)), rng.normal(size=(4, D)))
    plan = create("pruner", name, ratio=0.0).plan(Evidence((layer,), 2))
    assert plan.kept == ((0, 1, 2, 3),)
    assert plan.merges == ()
    with pytest.raises(UserError, match=r"ratio must lie in \[0, 1\)"):
        create("pruner", name, ratio=1.0)
    # where only protected experts stay in a layer there is nobody to merge into
    safe = Constraints(protected=[[0, 1]], max_keep=2)
    plan = create("pruner", name, ratio=0.5).plan(Evidence((layer,), 2), safe)
    assert plan.kept == ((0, 1),)
    assert plan.merges == ()


def test_unknown_linkage() -> None:
    with pytest.raises(UserError, match="linkage must be one of average, complete, single, ward, got 'median'"):
        create("pruner", "hc_smoe", linkage="median")


# -- on a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m_smoe", "hc_smoe"])
@pytest.mark.parametrize("align", [False, True])
def test_from_calibration_to_the_merged_model(name: str, align: bool) -> None:
    """The plan of recorded evidence, carried out, equals the slow reference; through JSON and back it is the same plan."""
    model = model_of(n_experts=8)
    batches = [torch.arange(40).view(4, 10) * k % 31 for k in (1, 7)]
    pruner = create("pruner", name, ratio=0.5, align=align)
    plan = pruner.plan(record(model, batches, pruner.needs))
    assert any(plan.merges)
    again = PrunePlan.from_dict(plan.to_dict())
    assert again == plan
    expected = copy.deepcopy(model)
    for layer, merges in zip(expected.moe_layers, plan.merges, strict=True):
        found = [(merge, slow_merge(layer, merge, align)) for merge in merges]
        for merge, parts in found:
            for part_name, part in parts.items():
                layer.weights()[part_name].data[merge.into] = part
    apply_plan(expected, PrunePlan(plan.kept, plan.before, plan.n_original, 2))
    apply_plan(model, again)
    tokens = torch.arange(27).view(3, 9)
    torch.testing.assert_close(model(tokens), expected(tokens), rtol=0, atol=1e-5)


def test_copies_cluster_and_merge_into_themselves() -> None:
    """Experts that are copies of each other with permuted neurons."""
    model = model_of(n_experts=4, n_layers=1)
    layer = model.moe_layers[0]
    with torch.no_grad():
        for part in ("gate", "up", "down"):
            weights = layer.weights()[part]
            weights[1], weights[3] = weights[0], weights[2]
        layer.router.weight[1] = layer.router.weight[0] * 1.01
        layer.router.weight[3] = layer.router.weight[2] * 1.01
    permuted(layer, 1, (3, 1, 0, 2))
    permuted(layer, 3, (1, 2, 3, 0))
    batches = [torch.arange(40).view(4, 10) * k % 31 for k in (1, 7)]
    pruner = create("pruner", "hc_smoe", ratio=0.5, align=True)
    plan = pruner.plan(record(model, batches, pruner.needs))
    assert {frozenset(merge.members) for merge in plan.merges[0]} == {frozenset({0, 1}), frozenset({2, 3})}
    before = {i: parts_of(layer, i) for i in plan.kept[0]}
    apply_plan(model, plan)
    for i, parts in before.items():
        for part, value in parts_of(layer, i).items():
            torch.testing.assert_close(value, parts[part], rtol=0, atol=1e-5)
