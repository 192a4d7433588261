"""Empirical Fisher information."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Fisher(Criterion):
    """Sum of (dL/dw)^2 over the expert's weights: the trace of the empirical Fisher information, with a batch as a sample.

    Source: after Fisher pruning, Theis et al. 2018 (arXiv 1801.05787), which weighs the squares by w^2 and takes gradients of
    single samples; here the trace alone, squares averaged over calibration batches.
    """

    needs = frozenset({"fisher"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] sums."""
        return np.asarray(layer.stats["fisher"], dtype=np.float64)
