"""Many pruners on the same evidence: how much of what they remove do they share?

The overlap of two plans is the Jaccard index of the sets of experts they remove, per layer, averaged over layers. Two plans that
draw lots share something too: `chance` is the mean over all such draws of the same sizes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune import registry
from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner, Uniform

FORMAT = "moeprune.sweep/1"
RATIOS = (0.1, 0.25, 0.375, 0.5, 0.75)
AGREE = 0.7  # overlap, averaged over budgets, from which pruners count as one family
LAEP = "laep"


@dataclass(frozen=True)
class Budget:
    """Plans that remove the same share of the experts, S of them.

    Args:
        ratio: share asked for; constraints may leave less.
        plans: by the pruner's name.
        jaccard: [L, S, S] overlap of what two plans remove; NaN in a layer where both remove nothing.
        chance: [L, S, S] its mean if both drew lots.
    """

    ratio: float
    plans: Mapping[str, PrunePlan]
    jaccard: NDArray[np.float64]
    chance: NDArray[np.float64]

    @property
    def overlap(self) -> NDArray[np.float64]:
        """[S, S] mean of `jaccard` over layers; NaN for two plans that remove nothing."""
        return _mean(self.jaccard)

    @property
    def expected(self) -> NDArray[np.float64]:
        """[S, S] mean of `chance` over layers."""
        return _mean(self.chance)

    @property
    def removed(self) -> list[float]:
        """[S] share of the experts that each plan removes."""
        return [1 - sum(plan.n_kept) / sum(map(len, plan.before)) for plan in self.plans.values()]


@dataclass(frozen=True)
class Sweep:
    """Plans of S pruners at several budgets.

    Args:
        names: of the pruners, like ones side by side (see `families`).
        budgets: by ascending ratio; their arrays are in the order of `names`.
        families: groups of names whose overlap, averaged over budgets, is at least AGREE (average linkage).
        left_out: pruner -> why it is not in.
    """

    names: tuple[str, ...]
    budgets: tuple[Budget, ...]
    families: tuple[tuple[str, ...], ...]
    left_out: Mapping[str, str]

    def to_dict(self, evidence: Evidence) -> dict[str, Any]:
        """Plain data: every plan's kept ids, and the overlap per layer; null where two plans remove nothing."""
        return {
            "format": FORMAT,
            "provenance": dict(evidence.provenance),
            "names": list(self.names),
            "families": [list(family) for family in self.families],
            "left_out": dict(self.left_out),
            "before": [list(layer.ids) for layer in evidence.layers],
            "budgets": [
                {
                    "ratio": budget.ratio,
                    "removed": budget.removed,
                    "pruners": {name: plan.provenance.get("pruner") for name, plan in budget.plans.items()},
                    "kept": {name: [list(ids) for ids in plan.kept] for name, plan in budget.plans.items()},
                    "overlap": _plain(budget.overlap),
                    "chance": _plain(budget.expected),
                    "jaccard_per_layer": _plain(budget.jaccard),
                }
                for budget in self.budgets
            ],
        }


def sweep(
    evidence: Evidence,
    names: Sequence[str] | None = None,
    ratios: Sequence[float] = RATIOS,
    constraints: Constraints = Constraints(),  # noqa: B008 (immutable)
) -> Sweep:
    """Plan with every pruner at every budget and compare.

    LAEP, which knows no ratio, takes the beta at which it keeps as many experts as a uniform cut does.

    Args:
        evidence: what all of them read.
        names: pruners by short name; default: every criterion that the evidence suffices for, and laep.
        ratios: shares of the experts to remove, in (0, 1).
        constraints: bounds for every plan.

    Raises:
        UserError: a ratio out of range, fewer than two pruners, one that was named and cannot plan from this evidence.
    """
    ratios = sorted(set(ratios))
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise UserError(f"ratios must lie in (0, 1), got {ratio}; they are shares of experts to remove")
    if not ratios:
        raise UserError("ratios are empty; give shares of experts to remove, such as [0.25,0.5]")
    wanted = list(dict.fromkeys(names)) if names is not None else _criteria()
    plans: dict[str, list[PrunePlan]] = {}
    left_out: dict[str, str] = {}
    for name in wanted:
        try:
            plans[name] = [_plan(name, evidence, ratio, constraints) for ratio in ratios]
        except UserError as error:
            if names is not None:
                raise
            left_out[name] = str(error)
    if len(plans) < 2:
        why = f" ({'; '.join(f'{name}: {reason}' for name, reason in left_out.items())})" if left_out else ""
        raise UserError(f"a sweep compares at least two pruners, got {', '.join(plans) or 'none'}{why}; name others")
    found = [[plans[name][i] for name in plans] for i in range(len(ratios))]
    arrays = [(jaccard(each), chance(each, constraints.n_groups)) for each in found]
    order, families = clustered(np.array([_mean(j) for j, _ in arrays]))
    labels = list(plans)
    budgets = [
        Budget(
            ratio,
            {labels[i]: each[i] for i in order},
            j[:, order][:, :, order],
            c[:, order][:, :, order],
        )
        for ratio, each, (j, c) in zip(ratios, found, arrays, strict=True)
    ]
    return Sweep(
        tuple(labels[i] for i in order),
        tuple(budgets),
        tuple(tuple(labels[i] for i in family) for family in families if len(family) > 1),
        left_out,
    )


def jaccard(plans: Sequence[PrunePlan]) -> NDArray[np.float64]:
    """[L, S, S]: shared share of what two plans remove from a layer; NaN where both remove nothing."""
    layers = []
    for before, *kept in zip(plans[0].before, *(plan.kept for plan in plans), strict=True):
        gone = ~np.array([np.isin(before, ids) for ids in kept])
        n = gone.sum(1)
        both = (gone.astype(np.float64) @ gone.T.astype(np.float64)).round()
        union = n[:, None] + n[None, :] - both
        layers.append(np.where(union > 0, both / np.maximum(union, 1), np.nan))
    return np.array(layers)


def chance(plans: Sequence[PrunePlan], n_groups: int = 1) -> NDArray[np.float64]:
    """[L, S, S]: mean of `jaccard` over all draws of as many experts (in each group of a group-limited router).

    Args:
        plans: only how many experts each removes counts.
        n_groups: groups of the router.
    """
    L, S = len(plans[0].before), len(plans)
    found = np.ones((L, S, S))
    for layer, (before, n_original) in enumerate(zip(plans[0].before, plans[0].n_original, strict=True)):
        size = n_original // n_groups
        sizes = [sum(i // size == group for i in before) for group in range(n_groups)]
        cut = [
            [n - sum(i // size == group for i in plan.kept[layer]) for group, n in enumerate(sizes)] for plan in plans
        ]
        for a in range(S):
            for b in range(a + 1):
                expected = _drawn(tuple(sorted(zip(sizes, *sorted((cut[a], cut[b])), strict=True))))
                found[layer, a, b] = found[layer, b, a] = expected
        for a in range(S):
            found[layer, a, a] = 1.0 if sum(cut[a]) else np.nan  # a plan shares with itself what it removes
    return found


@cache
def _drawn(groups: tuple[tuple[int, int, int], ...]) -> float:
    """Mean Jaccard index of two random sets with, in each group of n, a and b members: (n, a, b) per group."""
    shared = np.ones(1)  # distribution of the number of common members
    for n, a, b in groups:
        possible = math.comb(n, b)
        shared = np.convolve(
            shared, [math.comb(a, k) * math.comb(n - a, b - k) / possible for k in range(min(a, b) + 1)]
        )
    total = sum(a + b for _, a, b in groups)
    k = np.arange(len(shared))
    return float(shared @ (k / (total - k))) if total else math.nan


def clustered(overlaps: NDArray[np.float64]) -> tuple[list[int], list[list[int]]]:
    """An order in which like pruners stand together, and the families in it: average linkage on 1 - overlap.

    Args:
        overlaps: [budgets, S, S]; NaN counts for nothing.
    """
    S = overlaps.shape[1]
    if S < 2:
        return list(range(S)), [list(range(S))]
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - np.nan_to_num(_mean(overlaps), nan=1.0)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance.clip(min=0), checks=False), "average", optimal_ordering=True)
    order = [int(i) for i in leaves_list(tree)]
    member = fcluster(tree, 1 - AGREE, "distance")
    return order, [[i for i in order if member[i] == m] for m in dict.fromkeys(member[i] for i in order)]


def laep_plan(evidence: Evidence, ratio: float, constraints: Constraints) -> PrunePlan:
    """LAEP's plan, alpha infinite, at the largest beta that keeps as many experts in all as a uniform cut of `ratio` does."""
    evidence.require({"counts"}, "pruner 'laep'")
    total = sum(Uniform().allocate([], evidence, constraints, ratio))
    shares = []
    for index, layer in enumerate(evidence.layers):
        E = len(layer.ids)
        least = constraints.feasible(E, evidence.top_k, layer.n_original, index)[0]
        most = (
            E - least if constraints.n_groups == 1 else E - 1
        )  # a group may have to lose its busiest to be like others
        shares.append(np.cumsum(np.sort(layer.counts))[:most] / max(1, layer.counts.sum()))
    steps = np.sort(np.concatenate([[0.0], *shares, [1.0]]))  # cumulative loads at which the rule cuts one more
    plans: dict[int, PrunePlan] = {}

    def kept(n: int) -> int:  # experts in all when the rule cuts n; falls with n
        if n not in plans:
            beta = float((steps[n] + steps[n + 1]) / 2) if n else 0.0
            pruner: Pruner = registry.create("pruner", LAEP, beta=beta)
            plans[n] = pruner.plan(evidence, constraints).made_by(pruner)
        return sum(plans[n].n_kept)

    low, high = 0, len(steps) - 1
    guess = min(sum(len(layer.ids) for layer in evidence.layers) - total, high - 1)
    if kept(guess) == total:  # as it is unless constraints round
        return plans[guess]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) >= total else (low, middle)
    kept(low)
    return plans[low]


def mean_of_pairs(values: NDArray[np.float64]) -> float:
    """Mean of an [S, S] array over pairs of different pruners; NaN if none is known."""
    pairs = values[~np.eye(len(values), dtype=bool)]
    known = pairs[np.isfinite(pairs)]
    return float(known.mean()) if known.size else math.nan


def _plan(name: str, evidence: Evidence, ratio: float, constraints: Constraints) -> PrunePlan:
    if name == LAEP:
        return laep_plan(evidence, ratio, constraints)
    if "ratio" not in inspect.signature(registry.lookup("pruner", name).load()).parameters:
        raise UserError(f"pruner {name!r} has no option ratio, so it cannot plan at a budget")
    pruner: Pruner = registry.create("pruner", name, ratio=ratio)
    return pruner.plan(evidence, constraints).made_by(pruner)


def _criteria() -> list[str]:
    return [*dict.fromkeys(entry.name for entry in registry.entries("criterion")), LAEP]


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first dimension, of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _plain(values: NDArray[np.float64]) -> Any:
    """Nested lists of numbers with six digits; None for NaN."""
    return (
        [_plain(row) for row in values]
        if values.ndim > 1
        else [None if math.isnan(x) else round(x, 6) for x in values.tolist()]
    )
