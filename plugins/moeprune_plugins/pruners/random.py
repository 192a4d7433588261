"""Random pruning, the control that every other pruner has to beat."""

from __future__ import annotations

from moeprune.pruning.pruner import Allocation, ScorePruner
from moeprune_plugins.allocations.uniform import Uniform
from moeprune_plugins.criteria.random import RandomScore


class RandomPruner(ScorePruner):
    """Cuts experts at random, seeded: the control that every other pruner has to beat.

    Source: the random baseline of REAP, arXiv 2510.13999.

    Args:
        ratio: share of each layer's experts to cut, in [0, 1); not used when `allocation` is given.
        allocation: how many each layer keeps; default: uniform at `ratio`.
        seed: same seed, same plan.
    """

    def __init__(self, ratio: float = 0.25, allocation: Allocation | None = None, seed: int = 0) -> None:
        super().__init__(RandomScore(seed), allocation or Uniform(ratio))
        self.ratio, self.seed = ratio, seed
