"""LAEP, layer-adaptive expert pruning."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner


class LAEP(Pruner):
    """Layer-adaptive expert pruning: cuts the idle experts of each layer by its own loads.

    With T_i the tokens routed to expert i of a layer over the statistics window, experts are visited by ascending load
    and expert i is cut while both hold:

        T_i <= alpha * mean_j T_j                        (individual load)
        T_1 + ... + T_i < beta * sum_j T_j               (cumulative load)

    so the number cut differs from layer to layer. Of two equal loads the lower id counts as the less loaded. Where the
    rule cuts more than the constraints allow, the best-loaded of the cut experts come back until they hold; where it
    cuts less than `max_keep` or `multiple_of` ask for, the least loaded of the others go as well.

    Source: Yuan3.0 Ultra technical report, arXiv 2601.14327.

    Args:
        alpha: bound on the individual load, in units of the layer's mean load: one number, or one per layer; >= 0.
            Infinity switches it off; smaller prunes less.
        beta: bound on the share of the layer's load that goes with the cut experts: one number, or one per layer;
            in [0, 1]. The paper uses 0.1.

    Raises:
        UserError: alpha or beta out of range.
    """

    needs = frozenset({"counts"})

    def __init__(
        self,
        alpha: float | list[float | Literal["inf"]] | Literal["inf"] = math.inf,
        beta: float | list[float] = 0.1,
    ) -> None:
        for value in _listed(alpha):
            if not value >= 0:
                raise UserError(f"alpha must be at least 0 (infinity switches it off), got {value}")
        for value in _listed(beta):
            if not 0 <= value <= 1:
                raise UserError(f"beta must lie in [0, 1], got {value}")
        self.alpha = list(_listed(alpha)) if isinstance(alpha, list | tuple) else _listed(alpha)[0]
        self.beta = beta

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        """See `Pruner.plan`."""
        evidence.require(self.needs, "pruner 'laep'")
        L = len(evidence.layers)
        alphas, betas = _per_layer("alpha", self.alpha, L), _per_layer("beta", self.beta, L)
        kept = []
        for index, layer in enumerate(evidence.layers):
            if not layer.counts.any():
                raise UserError(
                    f"layer {index} received no tokens: all its counts are 0; record loads over a longer window"
                )
            constraints.feasible(len(layer.ids), evidence.top_k, layer.n_original, index)
            safe = set(constraints.protected_in(index))
            survivors = set(layer.ids) - (set(cut_by_rule(layer, alphas[index], betas[index])) - safe)
            size = layer.n_original // constraints.n_groups
            busiest = max(sum(i // size == group for i in survivors) for group in range(constraints.n_groups))
            n = constraints.nearest_at_least(
                busiest * constraints.n_groups, len(layer.ids), evidence.top_k, layer.n_original, index
            )
            loads = layer.counts.astype(np.float64)
            kept.append(constraints.keep_highest(loads, n, layer, index))
        return PrunePlan.from_kept(kept, evidence, constraints, {"pruner": self.describe()})


def cut_by_rule(layer: LayerEvidence, alpha: float, beta: float) -> list[int]:
    """Original ids that the two load constraints cut from a layer, least loaded first, before any other constraint."""
    total = int(layer.counts.sum())
    mean = total / len(layer.ids)
    cut: list[int] = []
    cumulative = 0
    for load, expert in sorted(zip(layer.counts.tolist(), layer.ids, strict=True)):
        cumulative += load
        if not (load <= alpha * mean and cumulative < beta * total):
            break
        cut.append(expert)
    return cut


def _listed(value: Any) -> list[float]:
    return [float(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _per_layer(name: str, value: float | list[float], n_layers: int) -> list[float]:
    values = list(_listed(value))
    if len(values) not in (1, n_layers) or (isinstance(value, list) and len(values) != n_layers):
        raise UserError(f"{name} holds {len(values)} numbers for {n_layers} layers; give one number, or one per layer")
    return values * n_layers if len(values) == 1 and n_layers > 1 else values
