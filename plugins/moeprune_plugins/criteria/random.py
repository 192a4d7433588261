"""Random scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class RandomScore(Criterion):
    """Random scores, one stream per (seed, layer).

    Source: the random dropping that MC-Suite (arXiv 2504.05586) compares with.

    Args:
        seed: same seed, same scores.
    """

    needs = frozenset()
    random = True  # draws lots: the order of the experts matters

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] in [0, 1)."""
        return np.random.default_rng((self.seed, index)).random(len(layer.ids))
