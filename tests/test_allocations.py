"""Allocations against slow references, under constraints, and protection around any pruner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune import Constraints, Evidence, create
from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import record
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Allocation, Uniform

layers_of_scores = st.lists(st.lists(st.integers(-30, 60), min_size=3, max_size=9), min_size=1, max_size=5)
METHODS = ["mean", "sum", "max", "zscore", "rank"]


def made(
    scores: Sequence[Sequence[float]], top_k: int = 1, acceptance: Any = None, **stats: Sequence[Any]
) -> tuple[list[np.ndarray], Evidence]:
    """Scores as arrays, and evidence of layers of as many experts."""
    layers = tuple(
        LayerEvidence(tuple(range(len(row))), len(row), {name: np.asarray(values[i]) for name, values in stats.items()})
        for i, row in enumerate(scores)
    )
    return [np.asarray(row, dtype=np.float64) for row in scores], Evidence(layers, top_k, acceptance=acceptance)


def allocate(
    allocation: Allocation, scores: Sequence[Sequence[float]], constraints: Constraints, ratio: float, **rest: Any
) -> list[int]:
    arrays, evidence = made(scores, **rest)
    return allocation.allocate(arrays, evidence, constraints, ratio)


# -- global -----------------------------------------------------------------------------------------------------------


def slow_global(scores: list[list[int]], how: str, ratio: float) -> list[int]:
    """Experts that each layer would keep without constraints, in exact arithmetic where the method is rational."""
    entries = []
    for layer, row in enumerate(scores):
        size = [abs(s) for s in row]
        for expert, score in enumerate(row):
            same = len(set(row)) == 1
            value: Any
            if how == "rank":
                below, equal = sum(s < score for s in row), sum(s == score for s in row)
                value = Fraction(2 * below + equal + 1, 2 * len(row))
            elif how == "zscore":
                value = 0 if same else (score - np.mean(row)) / np.std(row)
            elif how == "sum":
                value = Fraction(1, len(row)) if same else Fraction(score, sum(size))
            elif how == "mean":
                value = 1 if same else Fraction(score * len(row), sum(size))
            else:
                value = 1 if same else Fraction(score, max(size))
            place = sum((s, j) <= (score, expert) for j, s in enumerate(row))
            entries.append((round(float(value), 12), Fraction(place, len(row)), layer))
    gone = sorted(entries)[: sum(int(len(row) * ratio) for row in scores)]
    return [len(row) - sum(layer == index for *_, layer in gone) for index, row in enumerate(scores)]


@given(layers_of_scores, st.sampled_from(METHODS), st.floats(0, 0.99))
def test_global_equals_one_sorted_list(scores: list[list[int]], how: str, ratio: float) -> None:
    wanted = slow_global(scores, how, ratio)
    got = allocate(create("allocation", "global", normalize=how), scores, Constraints(), ratio)
    assert sum(got) == max(sum(wanted), len(scores))
    if min(wanted) >= 1:
        assert got == wanted


@given(layers_of_scores, st.sampled_from(METHODS), st.floats(0, 0.9), st.integers(0, 4))
def test_global_does_not_depend_on_a_layers_scale(scores: list[list[int]], how: str, ratio: float, which: int) -> None:
    allocation = create("allocation", "global", normalize=how)
    scaled = [[s * 1000.0 if i == which else s for s in row] for i, row in enumerate(scores)]
    constraints = Constraints()
    assert allocate(allocation, scores, constraints, ratio) == allocate(allocation, scaled, constraints, ratio)


@pytest.mark.parametrize("how", METHODS)
def test_global_on_layers_that_nothing_distinguishes_is_uniform(how: str) -> None:
    allocation = create("allocation", "global", normalize=how)
    flat = [[0.0] * 8, [0.1] * 8, [-3.0] * 8, [1e-320] * 8, [1e308] * 8]
    assert allocate(allocation, flat, Constraints(), 0.5) == [4] * 5
    alike = [[3, 1, 4, 1.5, 9, 2, 6, 5]] * 4
    assert allocate(allocation, alike, Constraints(), 0.25) == [6] * 4
    extreme = [[1e308, 1e308, 1.0, 0.0], [5e-324, 0.0, 0.0, 5e-324]]
    assert sum(allocate(allocation, extreme, Constraints(), 0.5)) == 4


def test_global_takes_from_the_layer_of_idle_experts() -> None:
    scores = [[9, 8, 9, 8], [100, 1, 1, 1]]
    assert allocate(create("allocation", "global"), scores, Constraints(), 0.25) == [4, 2]
    assert allocate(create("allocation", "global", normalize="rank"), scores, Constraints(), 0.25) == [2, 4]


def test_global_leaves_protected_experts_out_of_the_ranking() -> None:
    scores = [[9, 8, 9, 8], [100, 1, 1, 1]]
    protected = Constraints(protected=[[], [1, 2, 3]])
    assert allocate(create("allocation", "global"), scores, protected, 0.25) == [2, 4]
    everything = Constraints(protected=[[0, 1, 2, 3], [0, 1, 2, 3]])
    assert allocate(create("allocation", "global"), scores, everything, 0.25) == [4, 4]


def test_global_refuses_an_unknown_normalisation() -> None:
    with pytest.raises(UserError, match=r"mean, sum, max, zscore, rank, got 'median'"):
        create("allocation", "global", normalize="median")


# -- sensitivity ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 10), min_size=1, max_size=7), st.floats(0, 0.95), st.data())
def test_sensitivity_fills_up_to_a_level(growth: list[float], ratio: float, data: st.DataObject) -> None:
    """Against a level found by bisection; the sum is uniform's."""
    sizes = data.draw(st.lists(st.integers(4, 40), min_size=len(growth), max_size=len(growth)))
    low = data.draw(st.integers(1, 4))
    scores = [[0.0] * size for size in sizes]
    constraints = Constraints(min_keep=low)
    arrays, evidence = made(scores, top_k=2, ablation=growth)
    got = create("allocation", "sensitivity").allocate(arrays, evidence, constraints, ratio)
    uniform = Uniform().allocate(arrays, evidence, constraints, ratio)
    assert sum(got) == sum(uniform)
    positive = [g for g in growth if g > 0]
    weights = [max(g, 0.1 * sum(positive) / len(positive)) if positive else 1.0 for g in growth]

    def filled(level: float) -> list[float]:
        return [min(max(level * w, max(low, 2)), size) for w, size in zip(weights, sizes, strict=True)]

    a, b = 0.0, 50 / min(weights)
    for _ in range(200):
        a, b = ((a + b) / 2, b) if sum(filled((a + b) / 2)) < sum(got) else (a, (a + b) / 2)
    for n, exact in zip(got, filled(b), strict=True):  # whole numbers nearest to the level
        assert abs(n - exact) <= 1 + 1e-6


@given(st.lists(st.floats(-1, 10), min_size=2, max_size=7), st.floats(0, 0.95), st.sampled_from([1, 2, 4]))
def test_sensitivity_is_monotone(growth: list[float], ratio: float, multiple: int) -> None:
    got = allocate(
        create("allocation", "sensitivity"),
        [[0.0] * 16] * len(growth),
        Constraints(multiple_of=multiple),
        ratio,
        ablation=growth,
    )
    positive = [g for g in growth if g > 0]
    floored = [max(g, 0.1 * np.mean(positive)) if positive else 0 for g in growth]
    order = sorted(range(len(growth)), key=lambda i: floored[i])
    for less, more in pairwise(order):
        assert floored[less] == floored[more] or got[less] <= got[more]


def test_sensitivity_is_a_proportion() -> None:
    scores = [[0.0] * 60] * 3
    of = create("allocation", "sensitivity")
    assert allocate(of, scores, Constraints(), 0.5, ablation=[1.0, 2.0, 3.0]) == [15, 30, 45]
    assert allocate(of, scores, Constraints(), 0.5, ablation=[10.0, 20.0, 30.0]) == [15, 30, 45]
    # the most sensitive takes all of its 60, the others share the remaining 30 as 1.1 (the floor) to 2
    assert allocate(of, scores, Constraints(), 0.5, ablation=[1.0, 2.0, 30.0]) == [11, 19, 60]
    wide = create("allocation", "sensitivity", floor=1e-6)
    assert allocate(wide, scores, Constraints(), 0.5, ablation=[1.0, 2.0, 30.0]) == [10, 20, 60]


def test_sensitivity_of_layers_that_the_loss_does_not_miss() -> None:
    of = create("allocation", "sensitivity", floor=0.5)
    scores = [[0.0] * 60] * 3
    assert allocate(of, scores, Constraints(), 0.5, ablation=[-4.0, 2.0, 2.0]) == [18, 36, 36]
    assert allocate(of, scores, Constraints(), 0.5, ablation=[0.0, 2.0, 2.0]) == [18, 36, 36]
    assert allocate(of, scores, Constraints(), 0.5, ablation=[-1.0, 0.0, -3.0]) == [30, 30, 30]
    with pytest.raises(UserError, match="floor must be positive"):
        create("allocation", "sensitivity", floor=0)


# -- evolutionary -----------------------------------------------------------------------------------------------------


class Peak:
    """Acceptance with a known best choice of numbers per layer; counts how often it is asked."""

    def __init__(self, best: Sequence[int]) -> None:
        self.best, self.asked = tuple(best), []

    def __call__(self, kept: Sequence[Sequence[int]]) -> float:
        n_kept = tuple(map(len, kept))
        self.asked.append(n_kept)
        return 1 / (1 + sum((n - b) ** 2 for n, b in zip(n_kept, self.best, strict=True)))


def test_evolutionary_finds_a_known_optimum() -> None:
    peak = Peak([2, 12, 7, 3])
    scores = np.random.default_rng(0).random((4, 12)).tolist()
    constraints = Constraints()
    got = allocate(create("allocation", "evolutionary"), scores, constraints, 0.5, acceptance=peak)
    assert got == [2, 12, 7, 3]
    assert len(set(peak.asked)) == len(peak.asked) <= 1 + 16 * 20  # nothing is tried twice
    assert peak.asked[0] == (6, 6, 6, 6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)]),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(8, 12)),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_evolutionary_is_never_worse_than_uniform(
    worth: list[float], steps: tuple[int, int], low: int, high: int | None, ratio: float, seed: int
) -> None:
    constraints = Constraints(steps[0], low, high, steps[1])

    def acceptance(kept: Sequence[Sequence[int]]) -> float:
        return sum(w * len(ids) ** 0.5 for w, ids in zip(worth, kept, strict=True))

    scores = np.random.default_rng(seed).random((len(worth), 12)).tolist()
    arrays, evidence = made(scores, top_k=2, acceptance=acceptance)
    search = create("allocation", "evolutionary", population=4, generations=4, mutation=3, elite=2, seed=seed)
    got = search.allocate(arrays, evidence, constraints, ratio)
    uniform = Uniform().allocate(arrays, evidence, constraints, ratio)
    assert sum(got) == sum(uniform)
    assert all(n in constraints.feasible(12, 2, 12, index) for index, n in enumerate(got))
    fitness = [acceptance([range(n) for n in counts]) for counts in (got, uniform)]
    assert fitness[0] >= fitness[1]


def test_evolutionary_does_not_look_at_names() -> None:
    rng = np.random.default_rng(0)
    scores, worth, order = rng.random((3, 12)), rng.random((3, 12)), rng.permutation(12)

    def search(scores: Any, worth: Any) -> list[int]:
        def acceptance(kept: Sequence[Sequence[int]]) -> float:
            return float(sum(row[sorted(ids)].sum() for row, ids in zip(worth, kept, strict=True)))

        return allocate(create("allocation", "evolutionary"), scores, Constraints(), 0.4, acceptance=acceptance)

    assert search(scores, worth) == search(scores[:, order], worth[:, order])


def test_evolutionary_tries_nothing_where_nothing_can_move() -> None:
    peak = Peak([1, 2])
    fixed = Constraints(min_keep=[5, 7], max_keep=[5, 7])
    assert allocate(create("allocation", "evolutionary"), [[0.0] * 9] * 2, fixed, 0.4, acceptance=peak) == [5, 7]
    assert allocate(create("allocation", "evolutionary"), [[0.0] * 9], Constraints(), 0.4, acceptance=peak) == [6]
    assert not peak.asked


def test_evolutionary_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match="not a finite number"):
        allocate(
            create("allocation", "evolutionary"),
            [[0.0] * 4] * 2,
            Constraints(),
            0.5,
            acceptance=lambda kept: float("nan"),
        )
    with pytest.raises(UserError, match="tries choices out on the model"):
        allocate(create("allocation", "evolutionary"), [[0.0] * 4] * 2, Constraints(), 0.5)
    for name in ("population", "generations", "mutation", "elite"):
        with pytest.raises(UserError, match=f"{name} must be at least 1"):
            create("allocation", "evolutionary", **{name: 0})


@pytest.mark.parametrize(("terminal", "rank", "shown"), [("1", "0", True), ("0", "0", False), ("1", "1", False)])
def test_evolutionary_shows_a_long_search(
    terminal: str, rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from moeprune_plugins.allocations import evolutionary

    monkeypatch.setattr(evolutionary, "PATIENCE", -1.0)
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    monkeypatch.setenv("LOCAL_RANK", rank)
    allocate(create("allocation", "evolutionary"), [[0.0] * 9] * 3, Constraints(), 0.4, acceptance=Peak([1, 2, 9]))
    out, error = capfd.readouterr()
    assert out == ""
    assert ("searching numbers per layer, acceptance" in error) == shown
    assert shown or error == ""


# -- on a model -------------------------------------------------------------------------------------------------------


def tiny_model() -> MoETransformer:
    config = MoEConfig(
        vocab_size=31, d_model=16, n_layers=3, n_heads=2, n_experts=8, top_k=2, d_expert=8, max_seq_len=12
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MoETransformer(config).eval()
        for parameter in model.parameters():  # experts that matter
            parameter.data *= 3
    return model


def test_sensitivity_and_search_on_a_model() -> None:
    model = tiny_model()
    batches = [torch.arange(26).view(2, 13) % 31, (torch.arange(26) * 7 % 31).view(2, 13)]
    search = create("allocation", "evolutionary", population=6, generations=3, mutation=4)
    for allocation in (search, create("allocation", "sensitivity"), create("allocation", "global")):
        pruner = create("pruner", "frequency", ratio=0.5, allocation=allocation)
        evidence = record(model, batches, pruner.needs | {"acceptance"})
        assert evidence.acceptance is not None
        plan = pruner.plan(evidence)
        assert sum(plan.n_kept) == 12
        if allocation is search:
            uniform = create("pruner", "frequency", ratio=0.5).plan(evidence)
            assert evidence.acceptance(plan.kept) > evidence.acceptance(
                uniform.kept
            )  # on this model it finds something
            assert pruner.plan(evidence) == plan


# -- explicit, match --------------------------------------------------------------------------------------------------


def test_explicit_is_exact() -> None:
    allocation = create("allocation", "explicit", n_kept=[3, 8, 5])
    assert allocate(allocation, [[0.0] * 8] * 3, Constraints(), 0.9) == [3, 8, 5]
    with pytest.raises(UserError, match="3 numbers for 2 MoE layers"):
        allocate(allocation, [[0.0] * 8] * 2, Constraints(), 0.9)


@pytest.mark.parametrize(
    ("n", "constraints", "words"),
    [
        (9, Constraints(), "9 experts in layer 1, which the layer's size of 8 .* nearest allowed: 7 or 8"),
        (1, Constraints(), "1 experts in layer 1, which top_k=2 .* 2 or 3"),
        (0, Constraints(), "top_k=2"),
        (5, Constraints(multiple_of=2), "multiple_of=2 .* 4 or 6"),
        (6, Constraints(n_groups=4), "n_groups=4 .* 4 or 8"),
        (3, Constraints(min_keep=[2, 4]), "layer 1, which min_keep=4 "),
        (7, Constraints(max_keep=6), "max_keep=6"),
        (2, Constraints(protected=[[], [1, 4, 7]]), r"protected=\[1, 4, 7\]"),
        (4, Constraints(n_groups=2, protected=[[], [0, 1, 2]]), r"protected=\[0, 1, 2\] .* 6 or 8"),
    ],
)
def test_explicit_names_layer_number_and_constraint(n: int, constraints: Constraints, words: str) -> None:
    with pytest.raises(UserError, match=words):
        allocate(create("allocation", "explicit", n_kept=[4, n]), [[0.0] * 8] * 2, constraints, 0.5, top_k=2)


def test_match_spreads_the_whole_budget_under_constraints() -> None:
    counts = np.random.default_rng(0).integers(0, 500, (5, 16)) ** 2
    constraints = Constraints(multiple_of=4)
    evidence = Evidence.from_counts(counts.tolist(), 2)
    laep = create("pruner", "laep", beta=0.1)
    spread = create("allocation", "match", pruner=laep, spread="uniform")
    plan = create("pruner", "random", allocation=spread).plan(evidence, constraints)
    assert sum(plan.n_kept) == sum(laep.plan(evidence, constraints).n_kept)
    assert max(plan.n_kept) - min(plan.n_kept) <= 4


# -- all of them under constraints ------------------------------------------------------------------------------------

ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "global": lambda: create("allocation", "global"),
    "sensitivity": lambda: create("allocation", "sensitivity"),
    "evolutionary": lambda: create("allocation", "evolutionary", population=2, generations=2),
    "match": lambda: create("allocation", "match", pruner=create("pruner", "laep"), spread="uniform"),
}


@st.composite
def constrained(draw: st.DrawFn) -> tuple[int, Constraints, bool]:
    """Experts per layer, constraints, and whether a plan can meet them."""
    E = draw(st.sampled_from([6, 8, 12]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if E % g == 0]))
    multiple = draw(st.sampled_from([1, 2, 3, 4]))
    low = draw(st.lists(st.integers(1, E), min_size=3, max_size=3))
    high = draw(st.one_of(st.none(), st.tuples(*(st.integers(n, E) for n in low))))
    protected = draw(
        st.one_of(st.none(), st.lists(st.lists(st.integers(0, E - 1), max_size=3), min_size=3, max_size=3))
    )
    constraints = Constraints(multiple, low, list(high) if high else None, groups, protected)
    possible = True
    for layer in range(3):
        safe = set(protected[layer]) if protected else set()
        fullest = max(sum(i // (E // groups) == g for i in safe) for g in range(groups))
        possible &= any(
            n >= max(2, low[layer], fullest * groups) and n % multiple == 0 and n % groups == 0
            for n in range(1, (high[layer] if high else E) + 1)
        )
    return E, constraints, possible


@settings(max_examples=60, deadline=None)
@given(constrained(), st.sampled_from(list(ALLOCATIONS)), st.floats(0, 0.95), st.integers(0, 9))
def test_every_plan_obeys_every_constraint(
    case: tuple[int, Constraints, bool], name: str, ratio: float, seed: int
) -> None:
    E, constraints, possible = case
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 100, (3, E))
    layers = tuple(
        LayerEvidence(tuple(range(E)), E, {"counts": row, "ablation": rng.normal(), "max_f": rng.random(E)})
        for row in counts
    )
    evidence = Evidence(layers, 2, acceptance=lambda kept: sum(len(ids) ** 0.5 for ids in kept))
    pruner = create("pruner", "frequency", ratio=ratio, allocation=ALLOCATIONS[name]())
    if not possible:
        with pytest.raises(UserError):
            pruner.plan(evidence, constraints)
        return
    plan = pruner.plan(evidence, constraints)  # PrunePlan.from_kept checks every constraint
    for index, kept in enumerate(plan.kept):
        assert len(kept) in constraints.feasible(E, 2, E, index)
        assert set(constraints.protected_in(index)) <= set(kept)
    if name != "match":
        assert sum(plan.n_kept) >= 3 * (E - int(E * ratio)) or all(
            n == constraints.feasible(E, 2, E, i)[-1] for i, n in enumerate(plan.n_kept)
        )


@pytest.mark.parametrize("name", [*ALLOCATIONS, "explicit"])
@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        (Constraints(multiple_of=8, max_keep=5), "multiple_of=8 collides with max_keep=5 in layer 0"),
        (Constraints(min_keep=5, max_keep=[7, 4]), "min_keep=5 is above max_keep=4 in layer 1"),
        (Constraints(max_keep=2, protected=[[], [0, 1, 2]]), "protected experts=3 is above max_keep=2 in layer 1"),
        (Constraints(n_groups=5), "n_groups=5 does not divide the 12 experts of layer 0"),
        (
            Constraints(multiple_of=4, n_groups=3, max_keep=8),
            "multiple_of=4 and n_groups=3 collide with max_keep=8 in layer 0",
        ),
    ],
)
def test_what_collides_is_named(name: str, constraints: Constraints, words: str) -> None:
    allocation = ALLOCATIONS[name]() if name in ALLOCATIONS else create("allocation", "explicit", n_kept=[4, 4])
    counts = np.arange(1, 25).reshape(2, 12)
    layers = tuple(LayerEvidence(tuple(range(12)), 12, {"counts": row, "ablation": 1.0}) for row in counts)
    evidence = Evidence(layers, 2, acceptance=lambda kept: 1.0)
    with pytest.raises(UserError, match=words):
        create("pruner", "frequency", allocation=allocation).plan(evidence, constraints)


# -- protection -------------------------------------------------------------------------------------------------------


def slow_super_experts(peaks: list[list[float]]) -> list[list[int]]:
    """REAP's rule, from its definition."""
    values = sorted(p for row in peaks for p in row)
    at = 0.995 * (len(values) - 1)
    below = int(at)
    above = min(below + 1, len(values) - 1)
    percentile = values[below] + (at - below) * (values[above] - values[below])
    threshold = max(percentile, 0.1 * values[-1])
    return [
        [i for i, p in enumerate(row) if p > threshold and layer < int(0.75 * len(peaks))]
        for layer, row in enumerate(peaks)
    ]


def evidence_of(peaks: list[list[float]], seed: int = 0, **stats: Any) -> Evidence:
    rng = np.random.default_rng(seed)
    return Evidence(
        tuple(
            LayerEvidence(
                tuple(range(len(row))),
                len(row),
                {
                    "max_f": np.asarray(row, dtype=float),
                    "counts": rng.integers(1, 1000, len(row)),
                    "g0f0": rng.random(len(row)) + 1,
                    "g1f1": rng.random(len(row)),
                    "logit_gram": np.eye(len(row)),
                    "mean_f": rng.normal(size=(len(row), 4)),
                },
            )
            for row in peaks
        ),
        2,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(4, 40), st.integers(0, 99))
def test_super_experts_by_definition(L: int, E: int, seed: int) -> None:
    from moeprune_plugins.pruners.protect import super_experts

    peaks = (np.random.default_rng(seed).lognormal(sigma=2, size=(L, E))).tolist()
    assert super_experts(evidence_of(peaks)) == slow_super_experts(peaks)


def peaks_with(outliers: dict[tuple[int, int], float], L: int = 4, E: int = 16) -> list[list[float]]:
    peaks = [[1.0 + 0.01 * i for i in range(E)] for _ in range(L)]
    for (layer, expert), value in outliers.items():
        peaks[layer][expert] = value
    return peaks


@pytest.mark.parametrize("name", ["frequency", "reap", "laep", "m_smoe", "hc_smoe"])
def test_any_pruner_leaves_protected_experts_alone(name: str) -> None:
    evidence = evidence_of(peaks_with({(1, 3): 500.0, (3, 2): 400.0}))  # layer 3 lies beyond three quarters
    # idle: without protection they go
    idle = np.array([[50, 40, 60, 1, 30, 20, 70, 0, *[90] * 8], [50, 40, 60, 1, 0, 20, 70, 30, *[90] * 8]] * 2)
    layers = tuple(
        LayerEvidence(layer.ids, layer.n_original, {**layer.stats, "counts": row, "g1f1": row * 1.0})
        for layer, row in zip(evidence.layers, idle, strict=True)
    )
    evidence = Evidence(layers, 2)
    bare = create("pruner", name)
    assert 3 not in bare.plan(evidence).kept[1] or name == "hc_smoe"
    pruner = create("pruner", "protect", pruner=create("pruner", name), experts=[[7], [], [], []])
    assert pruner.needs == bare.needs | {"max_f"}
    plan = pruner.plan(evidence, Constraints(protected=[[], [], [0], []]))
    assert 3 in plan.kept[1]
    assert 7 in plan.kept[0]
    assert 0 in plan.kept[2]
    assert plan.provenance["protected"] == [[7], [3], [0], []]
    assert plan.provenance["super_experts"] == [[], [3], [], []]
    assert plan.provenance["pruner"]["pruner"] == bare.describe()
    for merges, safe in zip(plan.merges, plan.provenance["protected"], strict=False):
        assert not set(safe) & {member for merge in merges for member in merge.members}
    if name != "laep":
        assert plan.n_kept == bare.plan(evidence).n_kept


def test_protect_without_super_experts_needs_no_activations() -> None:
    pruner = create("pruner", "protect", pruner=create("pruner", "frequency"), super_experts=False, experts=[[0], [1]])
    assert pruner.needs == {"counts"}
    plan = pruner.plan(Evidence.from_counts([[1, 5, 6, 7], [5, 1, 6, 7]]))
    assert plan.kept == ((0, 2, 3), (1, 2, 3))
    plain = create("pruner", "protect", pruner=create("pruner", "frequency"), super_experts=False)
    assert plain.plan(Evidence.from_counts([[1, 5, 6, 7]])).kept == ((1, 2, 3),)


def test_protect_refuses_what_it_cannot_do() -> None:
    evidence = evidence_of(peaks_with({}))
    inner = create("pruner", "frequency")
    with pytest.raises(UserError, match="1 lists for 4 MoE layers"):
        create("pruner", "protect", pruner=inner, experts=[[1]]).plan(evidence)
    for name in ("frequency", "m_smoe", "hc_smoe", "laep"):
        named = create("pruner", "protect", pruner=create("pruner", name), experts=[[], [99], [], []])
        with pytest.raises(UserError, match=r"protected experts \[99\] are not among the experts of layer 1"):
            named.plan(evidence)
    with pytest.raises(UserError, match="protected experts=3 is above max_keep=2"):
        create("pruner", "protect", pruner=inner, experts=[[1, 2, 3], [], [], []]).plan(
            evidence, Constraints(max_keep=2)
        )


# -- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["global", "sensitivity", "m_smoe"])
def test_a_large_model_is_planned_at_once(name: str) -> None:
    rng = np.random.default_rng(0)
    gram = rng.normal(size=(128, 300))
    stats = [
        {"counts": rng.integers(1, 10**6, 128), "ablation": rng.random(), "logit_gram": gram @ gram.T}
        for _ in range(94)
    ]
    evidence = Evidence(tuple(LayerEvidence(tuple(range(128)), 128, each) for each in stats), 8)
    pruner = (
        create("pruner", name, ratio=0.5)
        if name == "m_smoe"
        else create("pruner", "frequency", ratio=0.5, allocation=create("allocation", name))
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        pruner.plan(evidence, replace(Constraints(), multiple_of=2))
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0  # 0.1 s on one idle core
