"""Criteria on the expert's outputs outside the calibrated family. f(t) is the output before the gate weight is applied."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class MaxActivation(Criterion):
    """Largest |f(t)| over tokens and channels; experts without tokens score 0.

    Source: the mark of super experts, arXiv 2507.23279.
    """

    needs = frozenset({"max_f"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] maxima."""
        return np.asarray(layer.stats["max_f"], dtype=np.float64)


class OutputVariance(Criterion):
    """Mean squared distance of f(t) from its mean: an expert that always says the same can go.

    Source: MoNE, arXiv 2507.00390, whose redundancy score combines it with the frequency; here it stands alone.
    """

    needs = frozenset({"var_f"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] variances."""
        return np.asarray(layer.stats["var_f"], dtype=np.float64)


class Characteristic(Criterion):
    """Norm of the mean output: what the expert says on average.

    Source: the mean outputs that HC-SMoE clusters, arXiv 2410.08589, as a score.
    """

    needs = frozenset({"norm_mean_f"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] norms."""
        return np.asarray(layer.stats["norm_mean_f"], dtype=np.float64)
