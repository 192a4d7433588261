"""Balancing by a bias on the choice, without a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeprune.balancing.balancer import Balancer
from moeprune.errors import UserError
from moeprune.model.router import Router, Routing


class LossFree(Balancer):
    """Auxiliary-loss-free balancing: experts are chosen by score + b, and after each step b moves towards balance.

    With c_i the tokens that expert i received in the step, over all ranks and micro-batches:

        d_i = u * sign(mean_j c_j - c_i)
        b_i = b_i + d_i - mean_j d_j

    The weights of the chosen experts come from the scores alone, so there is no gradient of it and nothing in the loss.

    Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1; used by DeepSeek-V3 (arXiv 2412.19437). The mean of the change is
    subtracted, which alters no choice and keeps b from drifting; the paper does not.

    Args:
        u: how far b moves in a step, > 0; the paper uses 1e-3.

    Raises:
        UserError: u <= 0.
    """

    def __init__(self, u: float = 1e-3) -> None:
        super().__init__(0.0)
        if not u > 0:
            raise UserError(f"u must be above 0, got {u}")
        self.u = u

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """Zero.

        Raises:
            UserError: a router without a `selection_bias` in float32.
        """
        bias = getattr(router, "selection_bias", None)
        if not isinstance(bias, Tensor):
            raise UserError(
                f"the balancer `loss_free` moves a router's selection_bias, and {type(router).__name__} has none; use the router "
                f"`sigmoid`, or `softmax` with selection_bias: true (model.config.router, model.config.router_options)"
            )
        if bias.dtype != torch.float32:
            raise UserError(
                f"the balancer `loss_free` needs selection_bias in float32, it is {bias.dtype}, in which steps of {self.u} are "
                f"lost; use --trainer.precision=bf16-mixed or 32"
            )
        return super().loss(routing, router)

    def after_step(self, routers: Sequence[Router], counts: Sequence[Tensor]) -> None:
        """See the class."""
        for router, count in zip(routers, counts, strict=True):
            bias: Tensor = router.selection_bias  # type: ignore[assignment]
            change = self.u * (count.sum() - len(count) * count).sign().to(bias.dtype)
            bias += change - change.mean()
