"""Plans and constraints: what comes out obeys every bound at once, or one sentence names the two that collide."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune import Constraints, Evidence, PrunePlan
from moeprune.errors import UserError
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.plan import Merge

PLAN = PrunePlan(((0, 2), (1, 3)), ((0, 1, 2, 3), (0, 1, 2, 3)), (4, 4), 2, {"pruner": "x", "step": 3}, (0.25, 0.5))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Constraints, int, int, int]:
    """Constraints, experts now, top_k, experts at first."""
    n_original = draw(st.integers(1, 48))
    min_keep = draw(st.integers(1, 20))
    constraints = Constraints(
        draw(st.integers(1, 9)),
        min_keep,
        draw(st.none() | st.integers(min_keep, 50)),
        draw(st.sampled_from([1, 1, 2, 3, 4, 8])),
    )
    return constraints, draw(st.integers(1, n_original)), draw(st.integers(1, 9)), n_original


def obeys(n: int, constraints: Constraints, n_experts: int, top_k: int) -> bool:
    upper = n_experts if constraints.max_keep is None else min(n_experts, constraints.max_keep)
    return (
        max(top_k, constraints.min_keep) <= n <= upper
        and n % constraints.multiple_of == 0
        and n % constraints.n_groups == 0
    )


@given(cases())
def test_feasible_is_exactly_what_obeys_every_bound(case: tuple[Constraints, int, int, int]) -> None:
    constraints, n_experts, top_k, n_original = case
    expected = [n for n in range(1, n_experts + 1) if obeys(n, constraints, n_experts, top_k)]
    if n_original % constraints.n_groups or not expected:
        with pytest.raises(UserError, match="layer 5"):
            constraints.feasible(n_experts, top_k, n_original, 5)
    else:
        assert list(constraints.feasible(n_experts, top_k, n_original, 5)) == expected


@given(cases(), st.integers(0, 60))
def test_nearest_at_least(case: tuple[Constraints, int, int, int], wanted: int) -> None:
    constraints, n_experts, top_k, n_original = case
    try:
        allowed = constraints.feasible(n_experts, top_k, n_original)
    except UserError:
        return
    n = constraints.nearest_at_least(wanted, n_experts, top_k, n_original)
    assert obeys(n, constraints, n_experts, top_k)
    assert all(m >= n or m < wanted for m in allowed)
    assert n >= wanted or n == max(allowed)


@pytest.mark.parametrize(
    ("options", "top_k", "words"),
    [
        ({}, 9, ["top_k=9", "8 experts"]),
        ({"multiple_of": 16}, 2, ["multiple_of=16", "8 experts"]),
        ({"min_keep": 9}, 2, ["min_keep=9", "8 experts"]),
        ({"max_keep": 1}, 2, ["top_k=2", "max_keep=1"]),
        ({"max_keep": 3, "multiple_of": 4}, 2, ["multiple_of=4", "max_keep=3"]),
        ({"multiple_of": 3, "min_keep": 7}, 2, ["multiple_of=3", "min_keep=7"]),
        ({"n_groups": 3}, 2, ["n_groups=3", "8 experts", "divisor"]),
        ({"n_groups": 4, "multiple_of": 3}, 2, ["n_groups=4", "multiple_of=3"]),
    ],
)
def test_what_collides_is_named(options: dict[str, int], top_k: int, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        Constraints(**options).feasible(8, top_k)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "options", [{"multiple_of": 0}, {"min_keep": 0}, {"n_groups": -1}, {"max_keep": 1, "min_keep": 2}]
)
def test_senseless_bounds_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Constraints(**options)


@given(st.data())
def test_keep_highest(data: st.DataObject) -> None:
    n_groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    n_original = n_groups * size
    ids = sorted(data.draw(st.sets(st.integers(0, n_original - 1), min_size=1)))
    score = st.integers(0, 5).map(float)  # few values: many ties
    scores = np.array(data.draw(st.lists(score, min_size=len(ids), max_size=len(ids))))
    each = data.draw(st.integers(1, size))
    groups = [[i for i in ids if i // size == group] for group in range(n_groups)]
    layer = LayerEvidence(tuple(ids), n_original, {})
    safe = [i for group in groups for i in data.draw(st.permutations(group))[: data.draw(st.integers(0, each))]]
    constraints = Constraints(n_groups=n_groups, protected=[safe])
    if min(map(len, groups)) < each:
        with pytest.raises(UserError, match="experts left"):
            constraints.keep_highest(scores, each * n_groups, layer, 0)
        return
    kept = constraints.keep_highest(scores, each * n_groups, layer, 0)
    value = {i: (i in safe, scores[position], i) for position, i in enumerate(ids)}
    assert set(safe) <= set(kept)
    assert list(kept) == sorted(set(kept))
    for group in groups:
        stay, go = [i for i in group if i in kept], [i for i in group if i not in kept]
        assert len(stay) == each
        assert not go or min(value[i] for i in stay) > max(value[i] for i in go)


def test_plans_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        PLAN.kept[0] += (3,)  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": ((0, 2),)}, "1 layers does not fit 2"),
        ({"kept": ((2, 0), (1, 3))}, "layer 0: kept ids must ascend"),
        ({"kept": ((0, 0), (1, 3))}, "without repeats"),
        ({"kept": ((0, 2), (1, 9))}, r"layer 1: kept experts \[9\] are not"),
        ({"kept": ((0, 2), (1,))}, "layer 1 would keep 1 experts, fewer than top_k=2"),
    ],
)
def test_plans_are_checked_when_made(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(PLAN, **changes)


def test_from_kept_checks_constraints_and_measures_what_goes() -> None:
    evidence = Evidence.from_counts([[1, 2, 3, 4]], top_k=1)
    plan = PrunePlan.from_kept([(2, 3)], evidence, Constraints(multiple_of=2))
    assert plan.removed_load == (0.3,)
    assert plan.removed == ((0, 1),)
    with pytest.raises(UserError, match="layer 0 would keep 3"):
        PrunePlan.from_kept([(1, 2, 3)], evidence, Constraints(multiple_of=2))
    with pytest.raises(UserError, match="unequal numbers in n_groups=2"):
        PrunePlan.from_kept([(2, 3)], evidence, Constraints(n_groups=2))


def test_json_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    loaded = PrunePlan.load(tmp_path / "plan.json")
    assert loaded == PLAN
    assert (loaded.provenance, loaded.removed_load) == (PLAN.provenance, PLAN.removed_load)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"format": "moeprune.plan/9"}', '{"format": "moeprune.plan/1"}', "{"])
def test_no_plan_in_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match="plan"):
        PrunePlan.load(tmp_path / "plan.json")


def test_then() -> None:
    later = PrunePlan(((0, 2), (3,)), PLAN.kept, (4, 4), 1)
    both = PLAN.then(later)
    assert (both.kept, both.before, both.top_k) == (later.kept, PLAN.before, 1)
    with pytest.raises(UserError, match="other experts"):
        later.then(PLAN)


def test_table() -> None:
    lines = [line.split() for line in str(PLAN).splitlines()]
    assert lines[1] == ["0", "4", "2", "25.00%", "1", "3"]
    assert lines[2] == ["1", "4", "2", "50.00%", "0", "2"]
    assert lines[3][:3] == ["all", "8", "4"]
    assert "50.0%" in lines[3][3]
    assert "load" not in str(dataclasses.replace(PLAN, removed_load=()))


def test_protected_experts_are_there_and_fit() -> None:
    layer = LayerEvidence((0, 1, 2, 3), 4, {})
    with pytest.raises(UserError, match=r"protected experts \[7\] are not among .* layer 0"):
        Constraints(protected=[[7]]).keep_highest(np.zeros(4), 2, layer, 0)
    with pytest.raises(UserError, match="number of protected experts=3 is above max_keep=2 in layer 0"):
        Constraints(protected=[[0, 1, 2]], max_keep=2).feasible(4, 1, layer=0)
    with pytest.raises(UserError, match="number of protected experts=4 is above max_keep=3"):
        Constraints(protected=[[0, 1]], max_keep=3, n_groups=2).feasible(4, 1, layer=0)  # two in one group of two
    with pytest.raises(UserError, match="protected holds 1 lists, too few for layer 1"):
        Constraints(protected=[[0]]).feasible(4, 1, layer=1)


@given(st.data())
def test_distribute(data: st.DataObject) -> None:
    """Against every choice there is: the sum is reached, and no other of that sum is nearer."""
    n_layers, E = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    constraints = Constraints(multiple_of=data.draw(st.sampled_from([1, 2])), min_keep=data.draw(st.integers(1, 2)))
    wanted = data.draw(st.lists(st.floats(-2, 8), min_size=n_layers, max_size=n_layers))
    total = data.draw(st.integers(0, n_layers * E + 3))
    evidence = Evidence.from_counts([[1] * E] * n_layers, 1)
    numbers = constraints.distribute(wanted, total, evidence)
    allowed = constraints.feasible(E, 1)
    assert all(n in allowed for n in numbers)
    assert sum(numbers) >= min(total, allowed[-1] * n_layers)
    assert sum(numbers) < max(total, allowed[0] * n_layers + 1) + allowed.step

    def distance(choice: tuple[int, ...]) -> float:
        return sum((n - w) ** 2 for n, w in zip(choice, wanted, strict=True))

    rivals = [c for c in itertools.product(allowed, repeat=n_layers) if sum(c) == sum(numbers)]
    assert distance(tuple(numbers)) <= min(map(distance, rivals)) + 1e-9


def test_merges_are_checked_and_survive_json() -> None:
    plan = PrunePlan(((0, 2),), ((0, 1, 2, 3),), (4,), 2, merges=((Merge(0, (0, 1), (0.25, 0.75)),),), align=True)
    assert PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    for merge, words in (
        (Merge(1, (0, 1), (0.5, 0.5)), "which does not stay"),
        (Merge(0, (0, 7), (0.5, 0.5)), "not among"),
        (Merge(0, (0, 1), (0.5, 0.6)), "sum to 1"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(plan, merges=((merge,),))
    with pytest.raises(UserError, match="do not combine"):
        plan.then(plan)
