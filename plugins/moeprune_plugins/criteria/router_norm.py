"""Norm of the router's rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class RouterNorm(Criterion):
    """L2 norm of the expert's row in the router; needs no data.

    Source: the change of the router's norm as a score, Chowdhury et al. 2024 (arXiv 2405.16646); here the norm itself.
    """

    needs = frozenset({"router_w2"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms."""
        return np.asarray(np.sqrt(layer.stats["router_w2"]))
