"""The calibrated family: S_j(b, alpha, beta) = N_j^-b * sum over tokens t routed to j of g_j(t)^alpha |f_j(t)|^beta.

N_j tokens are routed to expert j as the model itself routes; g is the gate weight, by the gate definition that was asked for, f
the expert's output before that weight is applied. Nine sums from one pass over the calibration text give the whole family. An expert without a token scores 0, the
lowest score there is. Scores compare within a layer only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Criterion


class Calibrated(Criterion):
    """N^-b * sum of g^alpha |f|^beta over the tokens routed to the expert: any member of the calibrated family.

    Source: the family is spelt out in arXiv 2606.15716; REAP (arXiv 2510.13999) is (1, 1, 1).

    Args:
        b: exponent of the number of tokens: 0 for a sum, 1 for a mean; >= 0.
        alpha: exponent of the gate weight: 0, 1 or 2.
        beta: exponent of the norm of the expert's output: 0, 1 or 2.

    Raises:
        UserError: an exponent out of range.
    """

    def __init__(self, b: float = 1.0, alpha: int = 1, beta: int = 1) -> None:
        if not b >= 0:
            raise UserError(f"b must be at least 0, got {b}")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value not in (0, 1, 2):
                raise UserError(f"{name} must be 0, 1 or 2, got {value}")
        self.b, self.alpha, self.beta = b, alpha, beta
        self.needs = frozenset({"g0f0", f"g{alpha}f{beta}"})

    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] scores, 0 without tokens."""
        n = np.maximum(layer.stats["g0f0"], 1.0)
        return np.asarray(layer.stats[f"g{self.alpha}f{self.beta}"] / n**self.b, dtype=np.float64)


class SeerSoft(Calibrated):
    """Sum of the gate weights, also called weighted frequency.

    Source: the soft count of SEER-MoE, arXiv 2404.05089, over the tokens routed to the expert (whether the paper adds up the
    probabilities of experts that were not chosen as well, we could not check); REAP's code calls it weighted frequency.
    """

    def __init__(self) -> None:
        super().__init__(0, 1, 0)


class EAN(Calibrated):
    """Sum of the norms of the expert's outputs.

    Source: the expert-activation-norm baseline of REAP, arXiv 2510.13999. MC-Suite (arXiv 2504.05586, eq. 13), where the name
    comes from, takes the norm over the tokens, channel by channel, and adds up channels.
    """

    def __init__(self) -> None:
        super().__init__(0, 0, 1)


class WeightedEAN(Calibrated):
    """Sum of gate weight times norm of the expert's output.

    Source: the weighted form of the expert activation norm in the code of REAP, arXiv 2510.13999.
    """

    def __init__(self) -> None:
        super().__init__(0, 1, 1)


class MAN(Calibrated):
    """Mean norm of the expert's outputs.

    Source: arXiv 2606.15716.
    """

    def __init__(self) -> None:
        super().__init__(1, 0, 1)


class MSAN(Calibrated):
    """Mean squared norm of the expert's outputs.

    Source: arXiv 2606.15716.
    """

    def __init__(self) -> None:
        super().__init__(1, 0, 2)


class MeanGate(Calibrated):
    """Mean gate weight over the tokens routed to the expert.

    Source: the member (1, 1, 0) of the family in arXiv 2606.15716.
    """

    def __init__(self) -> None:
        super().__init__(1, 1, 0)


class REAP(Calibrated):
    """Mean of gate weight times norm of the expert's output: router-weighted expert activation.

    Source: REAP, arXiv 2510.13999. Its code takes the router's softmax as g, renormalised over the chosen experts for models
    that do so: the gate definitions `softmax` and `topk`.
    """

    def __init__(self) -> None:
        super().__init__(1, 1, 1)


class REAPSquared(Calibrated):
    """Mean of (gate weight times norm of the expert's output), squared.

    Source: the member (1, 2, 2) of the family in arXiv 2606.15716.
    """

    def __init__(self) -> None:
        super().__init__(1, 2, 2)
