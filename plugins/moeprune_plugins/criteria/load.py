"""Expert load."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Load(Criterion):
    """Tokens routed to the expert, also called frequency.

    Source: the frequency baseline of REAP (arXiv 2510.13999); the load of LAEP (arXiv 2601.14327).
    """

    needs = frozenset({"counts"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] tokens."""
        return layer.counts.astype(np.float64)
