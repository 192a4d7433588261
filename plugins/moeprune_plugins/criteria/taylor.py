"""First-order importance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Taylor(Criterion):
    """First-order change of the loss when a weight goes to zero, |w dL/dw|, summed over the expert's weights.

    Source: the first-order Taylor criterion of Molchanov et al. 2017 (arXiv 1611.06440), stated there for activations, here for
    weights; gradients are averaged over the calibration batches before the product is taken.
    """

    needs = frozenset({"taylor"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] sums."""
        return np.asarray(layer.stats["taylor"], dtype=np.float64)
