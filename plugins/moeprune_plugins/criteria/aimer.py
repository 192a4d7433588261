"""How unevenly the magnitudes of an expert's weights are spread."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Aimer(Criterion):
    """Root mean square over mean magnitude of the expert's weights (gate, up and down projections together); needs no data.

    1 when all weights are equally large, sqrt(N) when one of N is not zero; 0 for an expert whose weights are all zero. Scaling
    an expert changes nothing.

    Source: AIMER, arXiv 2603.18492, eq. 4, of which this is the inverse: there experts with the larger ratio of mean magnitude
    to root mean square go.
    """

    needs = frozenset({"w1", "w2", "w_n"})
    direction = None  # a ratio: it does not grow with everything

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] ratios."""
        total, squares, n = (layer.stats[name].sum(1) for name in ("w1", "w2", "w_n"))
        return np.asarray(np.divide(np.sqrt(squares * n), total, out=np.zeros(len(total)), where=total > 0))
