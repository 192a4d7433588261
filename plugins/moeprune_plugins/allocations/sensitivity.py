"""More experts for layers whose loss hurts more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Allocation, Uniform


class Sensitivity(Allocation):
    """Keeps experts in proportion to the layer's sensitivity; as many in total as uniform pruning keeps.

    A layer's sensitivity is the growth of the calibration loss when it alone loses the less frequent half of its experts,
    but at least `floor` times the mean of the positive growths: a layer that the loss does not miss, or is better without,
    keeps a small share, not none. If no layer's growth is positive, all count the same. A layer that its size or the
    constraints stop takes its bound, and the others share the rest in proportion; then allowed numbers nearest to that.

    Source: MAPLE, arXiv 2608.15299, which weights the layers' budgets by sensitivity. Its measure and its formula could not
    be verified: the ablation, the proportion and the floor are our choice.

    Args:
        floor: smallest sensitivity, in units of the mean positive one; > 0. Larger is closer to uniform.

    Raises:
        UserError: floor out of range.
    """

    needs = frozenset({"ablation"})

    def __init__(self, floor: float = 0.1) -> None:
        if not 0 < floor < np.inf:
            raise UserError(f"floor must be positive and finite, got {floor}; without one a layer would keep nothing")
        self.floor = floor

    def allocate(
        self,
        scores: Sequence[NDArray[np.float64]],
        evidence: Evidence,
        constraints: Constraints,
        ratio: float,
    ) -> list[int]:
        """See `Allocation.allocate`."""
        growth = np.maximum([float(layer.stats["ablation"]) for layer in evidence.layers], 0.0)
        unit = growth[growth > 0].mean() if growth.any() else 1.0
        sensitivity = np.maximum(growth / unit, self.floor)
        allowed = [
            constraints.feasible(len(layer.ids), evidence.top_k, layer.n_original, index)
            for index, layer in enumerate(evidence.layers)
        ]
        total = sum(Uniform().allocate(scores, evidence, constraints, ratio))
        least, most = (np.array([numbers[end] for numbers in allowed], dtype=np.float64) for end in (0, -1))
        return constraints.distribute(water_filled(sensitivity, least, most, total).tolist(), total, evidence)


def water_filled(
    weight: NDArray[np.float64], least: NDArray[np.float64], most: NDArray[np.float64], total: float
) -> NDArray[np.float64]:
    """[L] numbers level * weight, each held between `least` and `most`, with the level at which they sum to `total`.

    Args:
        weight: [L] positive.
        least: [L].
        most: [L].
        total: between the sums of `least` and `most`.
    """
    levels = np.unique(np.concatenate([least / weight, most / weight]))  # where a layer leaves or reaches a bound
    sums = np.clip(levels[:, None] * weight, least, most).sum(1)  # linear in between
    level = np.interp(total, sums, levels)
    return np.asarray(np.clip(level * weight, least, most))
