"""What the layer's output loses with the expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class LeaveOneOut(Criterion):
    """Mean squared error of the layer's output without the expert, over all tokens; 0 without tokens.

    The token's other experts take the weight over; what the router's next choice outside the token's top-k could make up for is
    not counted.

    Source: the expert removal of ModelOpt's Puzzletron, where the router does choose the next expert; see the statistic
    `leave_one_out`.
    """

    needs = frozenset({"leave_one_out"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] errors."""
        return np.asarray(layer.stats["leave_one_out"], dtype=np.float64)
