"""The contract of load balancing: a loss on the routing of one layer, a change to the routers after each step, or both."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

from torch import Tensor

from moeprune.errors import UserError
from moeprune.model.router import Router, Routing
from moeprune.pruning.pruner import _Described


class Balancer(_Described, ABC):
    """A term added to the training loss: coefficient * mean over layers of `loss(routing)`.

    Args:
        coefficient: weight of the term, >= 0.

    Raises:
        UserError: coefficient < 0.
    """

    def __init__(self, coefficient: float) -> None:
        if not coefficient >= 0:
            raise UserError(f"coefficient must be at least 0, got {coefficient}")
        self.coefficient = coefficient

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """Scalar for one layer, called once per layer and micro-batch; padding (routing.mask) does not count.

        Layers may differ in E. Recomputation under activation checkpointing does not call it a second time.
        """
        return routing.logits.new_zeros(())

    def after_step(self, routers: Sequence[Router], counts: Sequence[Tensor]) -> None:
        """Called after each optimizer step, under no_grad, when overridden.

        Args:
            routers: of all layers.
            counts: per layer [E] int64 tokens routed to each expert in this step, over all ranks and micro-batches.
        """
