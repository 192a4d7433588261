"""Weight magnitude."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Magnitude(Criterion):
    """Norm of the expert's weights (gate, up and down projections together); needs no data.

    Source: magnitude pruning, Han et al. 2015 (arXiv 1506.02626), taken per expert; `l2` is the expert weight norm of MC-Suite,
    arXiv 2504.05586, eq. 6.

    Args:
        norm: `l2` of all weights, `l1` of all weights, or `frobenius_per_matrix`, the sum of the three matrices' Frobenius norms.

    Raises:
        UserError: unknown norm.
    """

    def __init__(self, norm: Literal["l2", "l1", "frobenius_per_matrix"] = "l2") -> None:
        if norm not in ("l2", "l1", "frobenius_per_matrix"):
            raise UserError(f"norm must be l2, l1 or frobenius_per_matrix, got {norm!r}")
        self.norm = norm
        self.needs = frozenset({"w1" if norm == "l1" else "w2"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms."""
        if self.norm == "l1":
            return np.asarray(layer.stats["w1"].sum(1))
        if self.norm == "frobenius_per_matrix":
            return np.asarray(np.sqrt(layer.stats["w2"]).sum(1))
        return np.asarray(np.sqrt(layer.stats["w2"].sum(1)))
