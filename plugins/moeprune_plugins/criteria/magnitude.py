"""Weight magnitude."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Magnitude(Criterion):
    """Frobenius norm of the expert's weights (gate, up and down projections together).

    Source: magnitude pruning, Han et al. 2015 (arXiv 1506.02626), taken per expert.
    """

    needs = frozenset({"w2"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms."""
        return np.asarray(np.sqrt(layer.stats["w2"].sum(1)))
