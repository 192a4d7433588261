"""Acme's strategies for moeprune: the pruner `acme_quota` and the criterion `acme_careful`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune import Constraints, Criterion, Evidence, PrunePlan, Pruner
from moeprune.errors import UserError
from moeprune.pruning.evidence import LayerEvidence


class Quota(Pruner):
    """Keeps, in each layer, the fewest experts that together receive a given share of its tokens.

    Source: Acme's own; nucleus sampling (arXiv 1904.09751) applied to loads.

    Args:
        share: of the layer's tokens, in (0, 1].

    Raises:
        UserError: share out of range.
    """

    needs = frozenset({"counts"})  # which statistics it reads; only those are recorded

    def __init__(self, share: float = 0.9) -> None:
        if not 0 < share <= 1:
            raise UserError(f"share must lie in (0, 1], got {share}; it is the share of tokens whose experts stay")
        self.share = share

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        """See `Pruner.plan`."""
        evidence.require(self.needs, "pruner 'acme_quota'")
        kept = []
        for index, layer in enumerate(evidence.layers):
            served = np.cumsum(np.sort(layer.counts)[::-1])
            wanted = 1 + int(np.argmax(served >= self.share * served[-1]))
            n = constraints.nearest_at_least(wanted, len(layer.ids), evidence.top_k, layer.n_original, index)
            kept.append(constraints.keep_highest(layer.counts, n, layer, index))
        return PrunePlan.from_kept(kept, evidence, constraints, {"pruner": self.describe()})


class Careful(Criterion):
    """Mean of gate weight times norm of the expert's output, minus z standard errors: few tokens prove little.

    The square of the standard error is the mean square over the number of tokens, so that an expert seen once scores 0 at z = 1,
    as one never seen does.

    Source: Acme's own, on REAP (arXiv 2510.13999), which is z = 0.

    Args:
        z: standard errors to subtract, in [0, 1].

    Raises:
        UserError: z out of range.
    """

    needs = frozenset({"g0f0", "g1f1", "g2f2"})  # per expert: number of tokens, sum of g |f|, of (g |f|)^2

    def __init__(self, z: float = 1.0) -> None:
        if not 0 <= z <= 1:
            raise UserError(f"z must lie in [0, 1], got {z}; more would rank experts with tokens below those without")
        self.z = z

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E], high = keep."""
        tokens, total, squares = (layer.stats[name] for name in ("g0f0", "g1f1", "g2f2"))
        return np.asarray((total - self.z * np.sqrt(squares)) / np.maximum(tokens, 1))
