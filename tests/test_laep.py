"""LAEP against a brute-force reading of the paper's two constraints, and its behaviour under constraints."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeprune
from moeprune import Constraints, Evidence, create
from moeprune.errors import UserError

loads = st.lists(st.integers(0, 60), min_size=2, max_size=14).filter(any)


def brute_force(load: list[int], alpha: float, beta: float) -> set[int]:
    """Experts that fulfil both constraints, each checked for itself, from its definition."""
    cut = set()
    for i, own in enumerate(load):
        less_loaded = [
            other for j, other in enumerate(load) if (other, j) <= (own, i)
        ]  # ties: the lower id is less loaded
        if own <= alpha * (sum(load) / len(load)) and sum(less_loaded) < beta * sum(load):
            cut.add(i)
    return cut


@given(loads, st.one_of(st.just(math.inf), st.floats(0, 3)), st.floats(0, 1), st.integers(1, 3))
def test_equals_brute_force(load: list[int], alpha: float, beta: float, top_k: int) -> None:
    top_k = min(top_k, len(load))
    plan = create("pruner", "laep", alpha=alpha, beta=beta).plan(Evidence.from_counts([load], top_k))
    cut = brute_force(load, alpha, beta)
    if len(load) - len(cut) >= top_k:
        assert set(plan.removed[0]) == cut
    else:  # the best-loaded of the cut experts come back until top_k are left
        order = sorted(range(len(load)), key=lambda i: (load[i], i))
        assert list(plan.kept[0]) == sorted(order[-top_k:])


@given(st.lists(loads, min_size=1, max_size=4), st.floats(0, 0.6), st.data())
def test_every_plan_obeys_every_constraint(layers: list[list[int]], beta: float, data: st.DataObject) -> None:
    E = min(map(len, layers))
    layers = [layer[:E] if any(layer[:E]) else [1] * E for layer in layers]
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 4) if E % g == 0]))
    multiple = data.draw(st.integers(1, E))
    low = data.draw(st.integers(1, E))
    high = data.draw(st.one_of(st.none(), st.integers(low, E)))
    constraints = Constraints(multiple, low, high, groups)
    allowed = [n for n in range(max(2, low), (high or E) + 1) if n % multiple == 0 and n % groups == 0]
    evidence = Evidence.from_counts(layers, top_k=2)
    if not allowed:
        with pytest.raises(UserError):
            create("pruner", "laep", beta=beta).plan(evidence, constraints)
        return
    plan = create("pruner", "laep", beta=beta).plan(evidence, constraints)
    for load, kept in zip(layers, plan.kept, strict=True):
        assert len(kept) in allowed
        per_group = [sum(i // (E // groups) == g for i in kept) for g in range(groups)]
        assert len(set(per_group)) == 1
        for g in range(groups):  # inside a group nobody that goes carries more than anybody that stays
            members = [i for i in range(E) if i // (E // groups) == g]
            gone = [(load[i], i) for i in members if i not in kept]
            stays = [(load[i], i) for i in members if i in kept]
            assert not gone or not stays or max(gone) < min(stays)


@given(loads, st.floats(0, 1), st.floats(0, 1))
def test_monotone_in_beta(load: list[int], a: float, b: float) -> None:
    evidence = Evidence.from_counts([load], 1)
    small, large = (create("pruner", "laep", beta=beta).plan(evidence) for beta in sorted((a, b)))
    assert set(small.removed[0]) <= set(large.removed[0])
    assert sum(load[i] for i in small.removed[0]) <= min(a, b) * sum(load)


def test_worked_example() -> None:
    """Loads 1 3 5 6 10 25 50: sum 100, mean 14.3. Cumulative 1 4 9 15: three are below beta = .1; with alpha = .3 (4.29) two."""
    load = [50, 3, 10, 1, 25, 5, 6]
    evidence = Evidence.from_counts([load], 2)
    assert create("pruner", "laep", beta=0.1).plan(evidence).removed == ((1, 3, 5),)
    assert create("pruner", "laep", beta=0.1, alpha=0.3).plan(evidence).removed == ((1, 3),)
    assert create("pruner", "laep", beta=0.1).plan(evidence).removed_load == (0.09,)


def test_cumulative_constraint_is_strict() -> None:
    assert create("pruner", "laep", beta=0.25).plan(Evidence.from_counts([[1, 1, 2, 4]], 1)).removed == ((0,),)


def test_ties_break_by_id() -> None:
    assert create("pruner", "laep", beta=0.5).plan(Evidence.from_counts([[5, 5, 5, 5]], 1)).removed == ((0,),)


def test_alpha_and_beta_per_layer() -> None:
    evidence = Evidence.from_counts([[1, 2, 3, 94]] * 2, 1)
    plan = create("pruner", "laep", alpha=[0.0, math.inf], beta=0.1).plan(evidence)
    assert plan.removed == ((), (0, 1, 2))
    assert create("pruner", "laep", alpha=[0.0, "inf"], beta=0.1).plan(evidence).removed == ((), (0, 1, 2))
    with pytest.raises(UserError, match="3 numbers for 2 layers"):
        create("pruner", "laep", beta=[0.1, 0.1, 0.1]).plan(evidence)


def test_dead_experts_go_first_but_only_if_beta_is_positive() -> None:
    evidence = Evidence.from_counts([[0, 0, 7, 9]], 1)
    assert create("pruner", "laep", alpha=0, beta=0.1).plan(evidence).removed == ((0, 1),)
    assert create("pruner", "laep", beta=0).plan(evidence).removed == ((),)


def test_best_loaded_of_the_cut_come_back() -> None:
    """The rule would leave 3 of 8; a multiple of 4 brings the best-loaded of the cut ones back."""
    load = [1, 2, 3, 4, 5, 100, 200, 300]
    plan = create("pruner", "laep", beta=0.1).plan(Evidence.from_counts([load], 2), Constraints(multiple_of=4))
    assert plan.kept == ((4, 5, 6, 7),)


def test_skewed_layer_does_not_kill_the_run() -> None:
    plan = create("pruner", "laep", beta=0.5).plan(Evidence.from_counts([[0, 1, 0, 10**9, 0]], 2))
    assert plan.kept == ((1, 3),)


def test_max_keep_cuts_more_than_the_rule() -> None:
    plan = create("pruner", "laep", beta=0.0).plan(Evidence.from_counts([[4, 1, 3, 2]], 1), Constraints(max_keep=2))
    assert plan.kept == ((0, 2),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta": 1.1}, "beta"),
        ({"beta": -1}, "beta"),
        ({"beta": [0.1, 2]}, "beta"),
        ({"gamma": 1}, "gamma"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create("pruner", "laep", **options)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([[1, 2], [1, 2, 3]], "layers differ in length"),
        ([], "no layer"),
        ([[], []], "layer 0 has no experts"),
        ([[1, -2]], "negative"),
        ([[1, math.nan]], "NaN"),
        ([[1, 0.5]], "whole numbers"),
        ([[0, 0], [1, 1]], "layer 0 received no tokens"),
        ([[1, "x"]], "layer 0"),
        ([[1]], "top_k=2"),
    ],
)
def test_bad_counts(counts: list[list[int]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Evidence.from_counts(counts, top_k=2)


def test_errors_name_layer_and_step() -> None:
    with pytest.raises(UserError, match="layer 1 at step 300"):
        Evidence.from_counts([[1, 2], [0, 0]], 1, provenance={"step": 300})


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="n_groups=64"):
        create("pruner", "laep").plan(Evidence.from_counts([[1, 2, 3, 4]]), Constraints(n_groups=64))


def test_same_numbers_for_the_controls() -> None:
    """Random pruning with LAEP's budget keeps LAEP's numbers; the uniform spread keeps its total."""
    rng = np.random.default_rng(0)
    evidence = Evidence.from_counts(rng.integers(0, 500, (5, 16)) ** 2, 2)
    laep = create("pruner", "laep", beta=0.1)
    reference = laep.plan(evidence)
    per_layer = create("pruner", "random", allocation=create("allocation", "match", pruner=laep)).plan(evidence)
    assert per_layer.n_kept == reference.n_kept
    assert per_layer.kept != reference.kept
    uniform = create(
        "pruner", "frequency", allocation=create("allocation", "match", pruner=laep, spread="uniform")
    ).plan(evidence)
    assert sum(uniform.n_kept) == sum(reference.n_kept)
    assert max(uniform.n_kept) - min(uniform.n_kept) <= 1


def test_random_is_seeded() -> None:
    evidence = Evidence.from_counts([list(range(1, 33))] * 3, 2)
    plans = [create("pruner", "random", seed=seed).plan(evidence).kept for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0][0] != plans[0][1]  # layers draw independently


def test_stable_name() -> None:
    assert moeprune.create("pruner", "laep", alpha=0.4, beta=0.2).describe()["alpha"] == 0.4
    assert moeprune.create("pruner", "laep").describe()["alpha"] == "inf"  # JSON has no infinity
