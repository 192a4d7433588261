"""How often an expert is chosen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Frequency(Criterion):
    """Tokens routed to the expert, also called its load.

    Source: the frequency baseline of REAP (arXiv 2510.13999) and MC-SMoE (arXiv 2310.01334); the load of LAEP (arXiv 2601.14327).
    """

    needs = frozenset({"counts"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] tokens."""
        return layer.counts.astype(np.float64)
