"""The contract of load balancing: a loss on the routing of one layer, a change to the routers after each step, or both."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

import torch
from torch import Tensor

from moeprune.errors import UserError
from moeprune.model.router import Router, Routing
from moeprune.pruning.pruner import _Described


class Balancer(_Described, ABC):
    """A term added to the training loss: coefficient * mean over layers of `loss(routing, router)`.

    With coefficient 0 the loss is computed without gradients, for the log alone.

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


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` summed over all ranks, in place; the same numbers on every rank. All ranks call it, in the same order."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
