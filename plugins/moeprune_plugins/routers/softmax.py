"""The usual router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeprune.model.router import Router


class SoftmaxTopK(Router):
    """Linear router: softmax over all experts, the K most probable ones, weights renormalised to sum to 1.

    Softmax and choice are computed in float32, under mixed precision as well.

    Source: Mixtral (arXiv 2401.04088) with `renormalize`, Switch / GShard (arXiv 2101.03961) without; the bias on the
    choice alone is that of loss-free balancing (arXiv 2408.15664).

    Args:
        d_model: D.
        n_experts: E.
        top_k: K.
        renormalize: divide the K chosen probabilities by their sum.
        selection_bias: keep a buffer `selection_bias` [E] float32, zero at first, that is added to the probabilities for
            the choice and not for the weights; a balancer moves it.
    """

    expert_dims = {"weight": 0, "selection_bias": 0}  # noqa: RUF012 (a constant of the class)
    selection_bias: Tensor | None

    def __init__(
        self, d_model: int, n_experts: int, top_k: int, renormalize: bool = True, selection_bias: bool = False
    ) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("selection_bias", torch.zeros(n_experts) if selection_bias else None)

    def logits(self, x: Tensor) -> Tensor:
        """See `Router.logits`."""
        return nn.functional.linear(x, self.weight.float())

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Router.choose`."""
        probs = logits.softmax(-1)
        if self.selection_bias is None:
            weights, indices = probs.topk(self.top_k, -1)
        else:
            choice = (probs.detach() + self.selection_bias).masked_fill(logits == -torch.inf, -torch.inf)
            indices = choice.topk(self.top_k, -1).indices
            weights = probs.gather(-1, indices)
        if self.renormalize:  # the bound: experts chosen for their bias alone may have no probability left
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return probs, weights, indices
