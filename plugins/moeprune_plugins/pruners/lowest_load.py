"""Pruning by load with the same number per layer."""

from __future__ import annotations

from moeprune.pruning.pruner import Allocation, ScorePruner
from moeprune_plugins.allocations.uniform import Uniform
from moeprune_plugins.criteria.load import Load


class LowestLoadPruner(ScorePruner):
    """Cuts the experts that receive the fewest tokens, the same number in every layer unless told otherwise.

    Source: the frequency baseline of REAP (arXiv 2510.13999) and MC-SMoE (arXiv 2310.01334).

    Args:
        ratio: share of each layer's experts to cut, in [0, 1); not used when `allocation` is given.
        allocation: how many each layer keeps; default: uniform at `ratio`.
    """

    def __init__(self, ratio: float = 0.25, allocation: Allocation | None = None) -> None:
        super().__init__(Load(), allocation or Uniform(ratio))
        self.ratio = ratio
