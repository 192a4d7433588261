"""Criteria on the expert's outputs outside the calibrated family. f(t) is the output before the gate weight is applied."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class MaxActivation(Criterion):
    """Largest magnitude of a channel of f(t) over the tokens; experts without tokens score 0.

    Source: the mark of super experts, arXiv 2507.23279.
    """

    needs = frozenset({"max_f"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] maxima."""
        return np.asarray(layer.stats["max_f"], dtype=np.float64)


class OutputVariance(Criterion):
    """Mean squared distance of f(t) from its mean: an expert that always says the same can go.

    Source: one half of the redundancy score of MoNE, arXiv 2507.00390: by its authors' code, the root of this variance (with
    N - 1 tokens) times its gate weight, and the mean output stays in the expert's place. Here the variance stands alone.
    """

    needs = frozenset({"var_f"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] variances."""
        return np.asarray(layer.stats["var_f"], dtype=np.float64)


class Characteristic(Criterion):
    """Norm of the mean output: what the expert says on average.

    Source: ours, after the mean outputs that HC-SMoE (arXiv 2410.08589) clusters, but does not score; there the mean is taken
    over all tokens, here over those routed to the expert.
    """

    needs = frozenset({"norm_mean_f"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms."""
        return np.asarray(layer.stats["norm_mean_f"], dtype=np.float64)
