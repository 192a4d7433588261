"""Norm of the router's rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class RouterNorm(Criterion):
    """L2 norm of the expert's row in the router; needs no data.

    Source: the change of the router's norm as a score, Chowdhury et al. 2024 (arXiv 2405.16646); here the norm itself.

    Raises:
        UserError: the router has no `weight` with one row per expert.
    """

    needs = frozenset({"weights"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms."""
        rows = layer.weights.get("router.weight")
        if rows is None or rows.ndim != 2 or len(rows) != len(layer.ids):
            raise UserError(f"criterion 'router_norm': the router of layer {index} has no weight with a row per expert")
        return np.asarray(rows.double().norm(dim=1).cpu())
