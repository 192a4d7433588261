"""The usual router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeprune.model.router import Router, Routing


class SoftmaxTopK(Router):
    """Linear router: softmax over all experts, the K most probable ones, weights renormalised to sum to 1.

    Softmax and choice are computed in float32, under mixed precision as well.

    Source: Mixtral (arXiv 2401.04088) with `renormalize`, Switch / GShard (arXiv 2101.03961) without.

    Args:
        d_model: D.
        n_experts: E.
        top_k: K.
        renormalize: divide the K chosen probabilities by their sum.
    """

    expert_dims = {"weight": 0}  # noqa: RUF012 (a constant of the class)

    def __init__(self, d_model: int, n_experts: int, top_k: int, renormalize: bool = True) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """See `Router.forward`."""
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())
            probs = logits.softmax(-1)
            weights, indices = probs.topk(self.top_k, -1)
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, probs, weights, indices, mask)
