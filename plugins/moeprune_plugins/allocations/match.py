"""As many experts as another pruner would keep: the fair budget for a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Allocation, Pruner


class Match(Allocation):
    """Keeps as many experts as another pruner would on the same evidence: the fair budget for a comparison.

    With pruner `laep` this is LAEP's thresholds as an allocation for any criterion. `ratio` plays no part.

    Source: equal-budget comparison as in arXiv 2510.13999, section 4; here the budget is another pruner's plan.

    Args:
        pruner: whose numbers to take.
        spread: `per_layer` takes its number for every layer; `uniform` takes its total and gives every layer the same
            number (the first layers one more where it does not divide), as far as the constraints allow.
    """

    def __init__(self, pruner: Pruner, spread: Literal["per_layer", "uniform"] = "per_layer") -> None:
        self.pruner, self.spread = pruner, spread
        self.needs = pruner.needs

    def allocate(
        self,
        scores: Sequence[NDArray[np.float64]],
        evidence: Evidence,
        constraints: Constraints,
        ratio: float,
    ) -> list[int]:
        """The other pruner's numbers, per layer or spread evenly."""
        n_kept = list(self.pruner.plan(evidence, constraints).n_kept)
        if self.spread == "per_layer":
            return n_kept
        return constraints.distribute([sum(n_kept) / len(n_kept)] * len(n_kept), sum(n_kept), evidence)
