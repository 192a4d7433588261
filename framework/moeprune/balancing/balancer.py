"""The contract of load-balancing terms: a loss on the routing of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from moeprune.errors import UserError
from moeprune.model.router import Routing
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

    @abstractmethod
    def loss(self, routing: Routing) -> Tensor:
        """Scalar for one layer; padding (routing.mask) does not count."""
