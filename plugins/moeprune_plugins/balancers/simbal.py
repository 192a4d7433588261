"""Balancing by a router that keeps similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.balancing.balancer import Balancer
from moeprune.errors import UserError
from moeprune.model.router import Router, Routing


class Simbal(Balancer):
    """SimBal: the L1 norm of W W^T - I, the sum of its E^2 absolute values; 0 when the router's rows are orthonormal.

    W [E, D] is the router's weight, one row per expert. Such a router keeps the similarity between tokens, and its experts are
    told apart by directions that share nothing. Rows can be orthonormal only if E <= D.

    Source: Omi et al. 2025, arXiv 2506.14038: L1 norm of R^T R - I_E with R = W^T. It is read as the norm over entries, not
    divided by their number; the paper starts from an orthogonal router, this term alone does not. The coefficient is ours.

    Args:
        coefficient: weight of the term.
    """

    def __init__(self, coefficient: float = 1e-2) -> None:
        super().__init__(coefficient)

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """See the class.

        Raises:
            UserError: a router without a weight [E, D].
        """
        W = getattr(router, "weight", None)
        if not isinstance(W, Tensor) or W.shape != (routing.probs.shape[1], router.d_model):
            raise UserError(
                f"the balancer `simbal` needs a router with a weight [E, D], one row per expert, and {type(router).__name__} "
                f"has none; use the router `softmax` (model.config.router)"
            )
        with torch.autocast(W.device.type, enabled=False):
            gram = W.float() @ W.float().T
            return (gram - torch.eye(len(W), device=W.device)).abs().sum()
