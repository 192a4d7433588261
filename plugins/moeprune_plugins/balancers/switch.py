"""The Switch / GShard loss."""

from __future__ import annotations

from torch import Tensor

from moeprune.balancing.balancer import Balancer
from moeprune.model.router import Router, Routing


class Switch(Balancer):
    """Switch / GShard loss: E * sum_i f_i P_i; 1 at perfect balance, per layer, over the rank's batch.

    f_i = c_i / (K T) is the share of assignments that expert i received, P_i the mean probability it was given.

    Source: Switch Transformer, arXiv 2101.03961, equations 4 to 6.

    Args:
        coefficient: weight of the term; the paper uses 1e-2.
    """

    def __init__(self, coefficient: float = 1e-2) -> None:
        super().__init__(coefficient)

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """See the class."""
        counts = routing.counts
        probs = routing.probs if routing.mask is None else routing.probs[routing.mask]
        f = counts.to(probs.dtype) / counts.sum().clamp(min=1)
        return probs.shape[1] * (f @ probs.sum(0)) / max(1, len(probs))
