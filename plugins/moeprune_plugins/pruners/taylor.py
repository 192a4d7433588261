"""Pruning by the gradient."""

from __future__ import annotations

from moeprune.pruning.pruner import Allocation, ScorePruner
from moeprune_plugins.allocations.uniform import Uniform
from moeprune_plugins.criteria.taylor import Taylor


class TaylorPruner(ScorePruner):
    """Cuts the experts whose weights matter least to the loss, to first order: sum of |w dL/dw|.

    Source: Molchanov et al. 2017 (arXiv 1611.06440), taken per expert.

    Args:
        ratio: share of each layer's experts to cut, in [0, 1); not used when `allocation` is given.
        allocation: how many each layer keeps; default: uniform at `ratio`.
    """

    def __init__(self, ratio: float = 0.25, allocation: Allocation | None = None) -> None:
        super().__init__(Taylor(), allocation or Uniform(ratio))
        self.ratio = ratio
