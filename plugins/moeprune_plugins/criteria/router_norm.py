"""Norm of the router's rows."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class RouterNorm(Criterion):
    """L2 norm of the expert's row in the router; needs no data.

    Source: the router weight norm of MC-Suite, arXiv 2504.05586, eq. 4, where the experts of largest norm are the better ones to
    drop (`keep=low`). Chowdhury et al. 2024 (arXiv 2405.16646) keep the experts whose norm fine-tuning changed most.

    Args:
        keep: experts of `high` or of `low` norm.

    Raises:
        UserError: neither.
    """

    needs = frozenset({"router_w2"})

    def __init__(self, keep: Literal["high", "low"] = "high") -> None:
        if keep not in ("high", "low"):
            raise UserError(f"keep must be high or low, got {keep!r}")
        self.keep = keep
        self.direction = "high" if keep == "high" else None  # see the conformance suite

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms, negative for `low`."""
        norms = np.asarray(np.sqrt(layer.stats["router_w2"]))
        return norms if self.keep == "high" else -norms
