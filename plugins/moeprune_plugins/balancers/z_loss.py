"""The router z-loss."""

from __future__ import annotations

from torch import Tensor

from moeprune.balancing.balancer import Balancer
from moeprune.model.router import Router, Routing


class ZLoss(Balancer):
    """Router z-loss: mean over tokens of logsumexp(logits)^2; keeps logits small, and training stable.

    It does not balance by itself.

    Source: ST-MoE, arXiv 2202.08906, equation 5.

    Args:
        coefficient: weight of the term; the paper uses 1e-3.
    """

    def __init__(self, coefficient: float = 1e-3) -> None:
        super().__init__(coefficient)

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """See the class."""
        logits = routing.logits if routing.mask is None else routing.logits[routing.mask]
        return logits.logsumexp(1).square().sum() / max(1, len(logits))
