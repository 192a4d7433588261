"""Pruning by weight magnitude."""

from __future__ import annotations

from moeprune.pruning.pruner import Allocation, ScorePruner
from moeprune_plugins.allocations.uniform import Uniform
from moeprune_plugins.criteria.magnitude import Magnitude


class MagnitudePruner(ScorePruner):
    """Cuts the experts with the smallest weights (Frobenius norm); needs no data.

    Source: magnitude pruning, Han et al. 2015 (arXiv 1506.02626), taken per expert.

    Args:
        ratio: share of each layer's experts to cut, in [0, 1); not used when `allocation` is given.
        allocation: how many each layer keeps; default: uniform at `ratio`.
    """

    def __init__(self, ratio: float = 0.25, allocation: Allocation | None = None) -> None:
        super().__init__(Magnitude(), allocation or Uniform(ratio))
        self.ratio = ratio
