"""REAP."""

from __future__ import annotations

from moeprune.pruning.pruner import Allocation, ScorePruner
from moeprune_plugins.allocations.uniform import Uniform
from moeprune_plugins.criteria.calibrated import REAP


class REAPPruner(ScorePruner):
    """Cuts the experts of lowest mean gate-weighted output norm, on calibration text.

    Source: REAP, arXiv 2510.13999. Its protection of super experts is not part of this pruner.

    Args:
        ratio: share of each layer's experts to cut, in [0, 1); not used when `allocation` is given.
        allocation: how many each layer keeps; default: uniform at `ratio`.
    """

    def __init__(self, ratio: float = 0.25, allocation: Allocation | None = None) -> None:
        super().__init__(REAP(), allocation or Uniform(ratio))
        self.ratio = ratio
