"""Any criterion as a pruner."""

from __future__ import annotations

from moeprune.pruning.pruner import Allocation, Criterion, ScorePruner
from moeprune_plugins.allocations.uniform import Uniform


class CriterionPruner(ScorePruner):
    """Cuts the experts that a criterion scores lowest: any criterion as a pruner.

    Source: the criterion's own.

    Args:
        criterion: scores the experts.
        ratio: share of each layer's experts to cut, in [0, 1); not used when `allocation` is given.
        allocation: how many each layer keeps; default: uniform at `ratio`.
    """

    def __init__(self, criterion: Criterion, ratio: float = 0.25, allocation: Allocation | None = None) -> None:
        super().__init__(criterion, allocation or Uniform(ratio))
        self.ratio = ratio
