"""The Switch loss over the global batch."""

from __future__ import annotations

from torch import Tensor

from moeprune.balancing.balancer import Balancer, sum_over_ranks
from moeprune.model.router import Router, Routing


class GlobalBatch(Balancer):
    """Switch loss with the counts of the global batch: E * sum_i f_i P_i; 1 at perfect balance.

    f_i is the share of assignments that expert i received in the optimizer step so far: on all ranks, in this micro-batch and
    those before it. P_i is the mean probability it was given in this rank's micro-batch. Experts may then specialise within a
    sequence, which the loss over a small batch forbids.

    Source: Qiu et al. 2025, arXiv 2501.11873; counts of the micro-batches of a step are buffered as it says, the first ones of
    a step thus balance over fewer tokens than the last.

    Args:
        coefficient: weight of the term; ours is that of the Switch loss.
    """

    def __init__(self, coefficient: float = 1e-2) -> None:
        super().__init__(coefficient)
        self._so_far: dict[Router, Tensor] = {}  # counts in this optimizer step, over all ranks

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """See the class."""
        counts = sum_over_ranks(routing.counts)
        if router in self._so_far:
            counts = self._so_far[router] + counts
        self._so_far[router] = counts
        probs = routing.probs if routing.mask is None else routing.probs[routing.mask]
        f = counts.to(probs.dtype) / counts.sum().clamp(min=1)
        return probs.shape[1] * (f @ probs.sum(0)) / max(1, len(probs))

    def after_step(self, routers: object, counts: object) -> None:
        """The next step counts from zero."""
        self._so_far.clear()
