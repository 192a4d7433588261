"""Output-aware importance, weighted by the tokens' contribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class EasyEP(Criterion):
    """Sum of gate weight times norm of the expert's output, times how far the layer turns the token's residual stream.

    How far: 1 - cosine of the stream before and after the routed experts. 0 without tokens.

    Source: EASY-EP, arXiv 2504.06792; made for calibration on a few texts of the domain that the model is to keep.
    """

    needs = frozenset({"easy_ep"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] sums."""
        return np.asarray(layer.stats["easy_ep"], dtype=np.float64)
