"""Every registered criterion, allocation and pruner passes the conformance suite, and the suite bites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeprune import Constraints, Criterion, Evidence, PrunePlan, Pruner, create
from moeprune.registry import entries
from moeprune.testing import CHECKS, conformance

# Options for those that cannot be made without.
OPTIONS: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("allocation", "match"): lambda: {"pruner": create("pruner", "laep")},
    ("pruner", "score"): lambda: {"criterion": create("criterion", "reap")},
}
REGISTERED = [(kind, entry.name) for kind in ("criterion", "allocation", "pruner") for entry in entries(kind)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("kind", "name"), REGISTERED, ids=lambda value: value)
def test_registered(kind: str, name: str, check: Callable[..., None]) -> None:
    options = OPTIONS.get((kind, name), dict)
    check(kind, lambda: create(kind, name, **options()))


# A third party's one line:
test_one_line = conformance("criterion", "reap")


class Good(Pruner):
    """Keeps the busiest.

    Source: here.
    """

    keep = 6

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        evidence.require(self.needs, "good")
        kept = []
        for index, layer in enumerate(evidence.layers):
            n = constraints.nearest_at_least(self.keep, len(layer.ids), evidence.top_k, layer.n_original, index)
            kept.append(self.choose(layer, n, constraints, index))
        return PrunePlan(
            tuple(map(tuple, kept)),
            tuple(layer.ids for layer in evidence.layers),
            tuple(layer.n_original for layer in evidence.layers),
            1,
        )

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return list(constraints.keep_highest(layer.counts.astype(float), n, layer, index))


class IgnoresTopK(Good):
    """Keeps one. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return [int(np.argmax(layer.counts))]


class IgnoresGroups(Good):
    """Keeps the busiest of all groups. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return super().choose(layer, n, Constraints(), index)


class Unseeded(Good):
    """Draws lots. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return sorted(np.random.default_rng().permutation(layer.ids)[:n].tolist())


class Mutates(Good):
    """Writes into its evidence. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        kept = super().choose(layer, n, constraints, index)
        if layer.counts.flags.writeable:
            layer.counts[0] += 1
        return kept


class ReadsMore(Good):
    """Reads what it does not declare. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        layer.stats["g1f1"]
        return super().choose(layer, n, constraints, index)


class DependsOnOrder(Good):
    """Keeps the first ones. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return list(layer.ids[:n])


class NoSource(Good):
    """Says nothing about where it comes from."""


class Upside(Criterion):
    """Scores the busiest lowest. Source: here."""

    def score(self, layer: Any, index: int) -> Any:
        return -layer.counts.astype(float)


class Flat(Criterion):
    """Scores all alike. Source: here."""

    def score(self, layer: Any, index: int) -> Any:
        return np.zeros(len(layer.ids))


class Forgets(Criterion):
    """Loses its option. Source: here."""

    def __init__(self, power: float = 2.0) -> None:
        self.power = power + 1

    def score(self, layer: Any, index: int) -> Any:
        return layer.counts.astype(float)


class TrustsNaN(Good):
    """Does not look whether its evidence is finite. Source: here."""

    needs = frozenset({"counts", "taylor"})

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        return create("pruner", "frequency").plan(evidence, constraints)


def failing(kind: str, make: Callable[[], Any]) -> set[str]:
    found = set()
    for check in CHECKS:
        try:
            check(kind, make)
        except Exception:
            found.add(check.__name__)
    return found


def test_a_good_one_passes() -> None:
    assert failing("pruner", Good) == set()


@pytest.mark.parametrize(
    ("kind", "mutant", "check"),
    [
        ("pruner", IgnoresTopK, "plan_obeys_every_constraint"),
        ("pruner", IgnoresGroups, "plan_obeys_every_constraint"),
        ("pruner", Unseeded, "same_seed_same_plan"),
        ("pruner", Mutates, "evidence_is_left_alone"),
        ("pruner", ReadsMore, "evidence_declared_is_evidence_used"),
        ("pruner", DependsOnOrder, "permuted_experts_give_the_permuted_plan"),
        ("pruner", NoSource, "docstring_has_a_source"),
        ("pruner", TrustsNaN, "nan_evidence_is_refused"),
        ("criterion", Upside, "more_of_everything_scores_higher"),
        ("criterion", Flat, "more_of_everything_scores_higher"),
        ("criterion", Forgets, "options_survive_yaml"),
    ],
)
def test_the_suite_bites(kind: str, mutant: type[Any], check: str) -> None:
    assert check in failing(kind, mutant)
