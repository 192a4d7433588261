"""The usual router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeprune.model.router import Router


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

    def logits(self, x: Tensor) -> Tensor:
        """See `Router.logits`."""
        return nn.functional.linear(x, self.weight.float())

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Router.choose`."""
        probs = logits.softmax(-1)
        weights, indices = probs.topk(self.top_k, -1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return probs, weights, indices
