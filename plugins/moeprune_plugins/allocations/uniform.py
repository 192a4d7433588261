"""The same share of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Allocation


class Uniform(Allocation):
    """Cuts the same share of every layer's experts, int(E * ratio) of them, as far as the constraints allow.

    Source: REAP, arXiv 2510.13999.

    Args:
        ratio: share to cut, in [0, 1).

    Raises:
        UserError: ratio out of range.
    """

    def __init__(self, ratio: float = 0.25) -> None:
        if not 0 <= ratio < 1:
            raise UserError(f"ratio must lie in [0, 1), got {ratio}; it is the share of experts to cut")
        self.ratio = ratio

    def allocate(
        self,
        scores: Sequence[NDArray[np.float64]],
        evidence: Evidence,
        constraints: Constraints,
    ) -> list[int]:
        """E - int(E * ratio) per layer, raised to the next allowed number."""
        return [
            constraints.nearest_at_least(
                len(layer.ids) - int(len(layer.ids) * self.ratio),
                len(layer.ids),
                evidence.top_k,
                layer.n_original,
                index,
            )
            for index, layer in enumerate(evidence.layers)
        ]
