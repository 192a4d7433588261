"""DeepSeek-V3's router."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moeprune.errors import UserError
from moeprune.model.router import Router


class SigmoidTopK(Router):
    """Linear router of DeepSeek-V3: sigmoid scores, a bias on the choice alone, and optional groups.

    An expert's score is s = sigmoid(logit). The K experts of highest s + selection_bias are chosen, out of the
    `top_groups` best groups; a group's worth is the sum of its two highest s + selection_bias (of its only one, where
    one is left). Weights are the scores s of the chosen, divided by their sum, times `scale`. `probs`, which balancing
    terms read, are the scores divided by their sum over all experts (equation 19).

    Groups are runs of E / n_groups neighbours, so pruning keeps equally many experts in each (`n_groups`), and enough
    that `top_groups` of them hold K (`min_experts`).

    Source: DeepSeek-V3, arXiv 2412.19437, equations 12 to 16. The paper sums the K / top_groups highest scores of a
    group, which are two in its model; two, and the bias's part in them, are as in the released model's code.

    Args:
        d_model: D.
        n_experts: E.
        top_k: K.
        n_groups: groups of experts; 1 for none.
        top_groups: groups a token may choose from.
        renormalize: divide the K chosen scores by their sum.
        scale: factor on the weights (2.5 in DeepSeek-V3).

    Raises:
        UserError: E does not divide into the groups, or fewer than K experts stand in `top_groups` groups.
    """

    expert_dims = {"weight": 0, "selection_bias": 0}  # noqa: RUF012 (a constant of the class)
    selection_bias: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        n_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(d_model, n_experts, top_k)
        if n_groups < 1:
            raise UserError(f"n_groups must be at least 1, got {n_groups}")
        if not 1 <= top_groups <= n_groups:
            raise UserError(f"top_groups must lie between 1 and n_groups={n_groups}, got {top_groups}")
        if not 0 < scale < math.inf:
            raise UserError(f"scale must be above 0 and finite, got {scale}")
        self.n_groups, self.top_groups = n_groups, top_groups
        self.renormalize, self.scale = renormalize, scale
        self._check(n_experts)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("selection_bias", torch.zeros(n_experts))

    @property
    def min_experts(self) -> int:
        """See `Router.min_experts`."""
        return self.n_groups * -(-self.top_k // self.top_groups)

    def _check(self, n_experts: int) -> None:
        if n_experts % self.n_groups:
            raise UserError(
                f"{n_experts} experts do not divide into n_groups={self.n_groups}; keep a multiple of {self.n_groups}"
            )
        if n_experts < self.min_experts:
            raise UserError(
                f"top_k={self.top_k} is more than the {n_experts // self.n_groups * self.top_groups} experts in "
                f"top_groups={self.top_groups} of n_groups={self.n_groups} groups; raise top_groups or keep at least "
                f"{self.min_experts} experts"
            )

    def logits(self, x: Tensor) -> Tensor:
        """See `Router.logits`."""
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Router.choose`."""
        self._check(logits.shape[-1])  # pruning may have cut below what the groups need
        scores = logits.sigmoid()
        choice = (scores.detach() + self.selection_bias).masked_fill(logits == -torch.inf, -torch.inf)
        if self.top_groups < self.n_groups:
            choice = self._in_best_groups(choice)
        indices = choice.topk(self.top_k, -1).indices
        weights = scores.gather(-1, indices)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20), weights * self.scale, indices

    def _in_best_groups(self, choice: Tensor) -> Tensor:
        """`choice` [T, E], with the experts outside of the best groups below all others but above minus infinity."""
        groups = torch.unflatten(choice, -1, (self.n_groups, -1))
        first, second = groups.topk(min(2, groups.shape[-1]), -1).values.tensor_split([1], -1)
        worth = first[..., 0] + second.masked_fill(second == -torch.inf, 0).sum(-1)
        outside = torch.ones_like(worth, dtype=torch.bool)
        outside.scatter_(-1, worth.topk(self.top_groups, -1).indices, False)
        lowest = torch.finfo(choice.dtype).min
        return groups.masked_fill(outside[..., None] & (groups > -torch.inf), lowest).flatten(-2)
